"""The two ways in which processes come to one copy of the data."""

import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden

from app.errors import Refused
from app.process.random_state import random_state, sampling_state, set_random_state
from app.sharing.key import (
    Key,
    digest,
    key_of,
    names_of,
    ranks_of,
    state_of,
    with_files,
)
from app.sharing.memory import InMemory, NoSpace, Private, new_shared_memory, release_memory
from app.sharing.packing import Limits, Packed, Plan, Use, unpack
from app.sharing.store import Store

LARGE = 2**24
"""Bytes that are worth the tenths of a second that it takes to give them back to the system."""
NONE = "type sharing=none to be told no more"


class Given(NamedTuple):
    """Data that the process that started this one has set up; travels between processes.

    A chunk is memory of a region, from a first byte to an end.
    """

    skeleton: bytes
    chunks: list[tuple[InMemory, int, int]]

    def packed(self) -> Packed:
        """Map the memory."""
        maps = {region: region.map(mmap.ACCESS_COPY) for region, _, _ in self.chunks}
        chunks = [maps[region][start:end] for region, start, end in self.chunks]
        return Packed(self.skeleton, chunks)


Packs = Mapping[str, Given]
"""By what decides the data, see `names_of`."""

_given: list[Packs] = []
"""What this process was given, once: a process may build its data more than once."""


class Early(Exception):  # noqa: N818  # reads as the sentence it is
    """Data cannot be set up before there are ranks."""


class Noted:
    """Stands in for the trainer while data are set up, and notes what else than `world_size` is
    asked of it; None stands for a trainer that is not there yet."""

    def __init__(self, trainer: pl.Trainer | None, world_size: int) -> None:
        vars(self).update(_trainer=trainer, world_size=world_size, _asked=[])

    def __getattr__(self, name: str) -> Any:
        self._asked.append(name)
        if self._trainer is None:
            raise Early(f"they ask for trainer.{name}")
        return getattr(self._trainer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._asked.append(name)
        setattr(self._trainer, name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("it holds the trainer")


class Call(NamedTuple):
    """The call of a data module's own setup, in a run of so many processes.

    Attributes:
        is_early: whether these are not started yet.
    """

    data: pl.LightningDataModule
    config: Mapping[str, Any]
    setup: Callable[[Any], None]
    stage: Any
    world_size: int
    is_early: bool

    @contextmanager
    def noted(self) -> Iterator[Noted]:
        """Let the trainer be asked through what notes it."""
        trainer = vars(self.data).get("trainer")
        noted = Noted(trainer, self.world_size)
        if trainer is not None or self.is_early:
            self.data.trainer = noted  # type: ignore[assignment]
        try:
            yield noted
        finally:
            self.data.trainer = trainer


class Sharing:
    """Replaces `setup` of a data module: what it makes is shared, or taken from who made it.

    Acts in `setup(stage)`. Afterwards the data module has the same attributes over other memory,
    and the random state is that behind setup: the run does not differ.

    Args:
        cache: folder of the files.
        key: names what decides the data and is not seen; None = nothing does.
        min_bytes: arrays below this size stay with each process.
        min_items: length from which lists are shared; None = none is.

    Attributes:
        collects_before_start: whether the process that starts the ranks is to `collect`.
    """

    collects_before_start = False

    def __init__(
        self, *, cache: str, key: str | None, min_bytes: int, min_items: int | None
    ) -> None:
        self.store = Store(Path(cache))
        self.key = key
        self.limits = Limits(min_bytes, min_items)

    def attach(self, data: pl.LightningDataModule, config: Mapping[str, Any]) -> None:
        """Act on a data module that was built from the run's resolved configuration."""
        data.setup = partial(self._called, data, config["data"], data.setup)  # type: ignore[method-assign]

    def _called(self, data: Any, config: Any, setup: Any, stage: Any = None) -> None:
        self._set_up(Call(data, config, setup, stage, ranks_of(data)[1], False))

    def _set_up(self, call: Call) -> None:
        """Map what the cache folder holds, or make it and put it there."""
        key = with_files(self._key(call), call.data, call.config, self.store.folder)
        try:
            if key.unseen and self.key is None:
                call.setup(call.stage)
                what, why = next(iter(key.unseen.items()))
                raise Private(
                    f"{what} of {type(call.data).__name__} cannot be compared with that of other "
                    f"processes ({why})",
                    "type sharing.key=1, and another one whenever it changes",
                )
            if self._take(call, key):
                return
            with self.store.turn(key.text) as has_failed:
                if has_failed:
                    call.setup(call.stage)
                elif not self._take(call, key):
                    self._make(call, key, self.store.keep)
        except Private as reason:
            tell(reason)

    def _take(self, call: Call, key: Key) -> bool:
        use = partial(adopt, call.data)
        return any(self.store.take(name, use) for name in names_of(key))

    def _key(self, call: Call) -> Key:
        stage = str(getattr(call.stage, "value", call.stage))
        return key_of(call.data, call.config, [stage, call.world_size, self.key, *self.limits])

    def _make(self, call: Call, key: Key, keep: Callable[[str, Plan, Use], None]) -> None:
        """Set up and share the result; raises Private, having set up, where that cannot be.

        Args:
            keep: puts it, by a name, where others find it, and uses it from there.
        """
        data, name, names = call.data, type(call.data).__name__, names_of(key)
        outside = {"": data, **{n: vars(data)[n] for n in key.unseen if n in vars(data)}}
        cuda = digest(random_state()["cuda"])
        with call.noted() as noted:
            call.setup(call.stage)
        if noted._asked:
            raise Private(f"{name}.setup reads trainer.{noted._asked[0]}, which others lack", NONE)
        if digest(random_state()["cuda"]) != cuda:
            raise Private(f"{name}.setup draws random numbers on the GPU", NONE)
        drawn = names_of(key) != names
        content = {"state": state_of(data), "after": sampling_state() if drawn else None}
        try:
            plan = Plan(content, self.limits, outside)
            keep(names[drawn], plan, partial(adopt, data))
        except (Private, Refused):
            raise
        except Exception as error:  # whatever an object raises that makes sense only here
            what = self._culprit(data, outside)
            why = f"{what} of {name} cannot be shared ({error})"
            raise Private(why, f"make it of what a module defines, or {NONE}") from error
        is_large = sum(plan.sizes) >= LARGE
        del content, plan  # which hold, until now, what was set up
        if is_large:
            release_memory()

    def _culprit(self, data: pl.LightningDataModule, outside: Mapping[str, Any]) -> str:
        for attribute, value in state_of(data).items():
            try:
                Plan(value, self.limits, outside)
            except Exception:
                return attribute
        return "what setup makes"


class Mmap(Sharing):
    """Files in a cache folder, mapped by every process, also by those of other runs."""


class Shared(Sharing):
    """Shared memory, filled by the process that starts the others.

    `collect` fills it there, `give` hands it to each of those. Without these, a process alone
    shares with its workers, and several do as `Mmap`.
    """

    collects_before_start = True

    @staticmethod
    def give(packs: Packs) -> None:
        """Make known in this process what `collect` returned in the one that started it."""
        _given[:] = [packs]

    def collect(
        self,
        data: pl.LightningDataModule,
        config: Mapping[str, Any],
        *,
        stages: Sequence[str],
        num_processes: int,
    ) -> Packs:
        """Prepare the data, and set them up for the stages, as each of the processes would.

        Call it in the random state in which they set up, on data that nobody else uses. They set
        up by themselves, and share by files, what the packs lack.
        """
        packs: dict[str, Given] = {}
        name = type(data).__name__
        about, last = (data, config["data"], data.setup), (num_processes, True)
        calls = [Call(*about, stage, *last) for stage in stages]
        try:
            key = self._key(calls[0])
            if key.rank is not None:
                raise Early(f"{name} names {key.rank} in its source")
            before = names_of(key)
            with calls[0].noted():
                data.prepare_data()
            if names_of(self._key(calls[0])) != before:
                raise Early(f"{name}.prepare_data draws random numbers, or sets attributes")
            for call in calls:
                key = self._key(call)
                if key.unseen and self.key is None:
                    break
                self._make(call, key, partial(self._keep, packs))
        except (Early, NoSpace) as reason:
            rank_zero_warn(
                f"sharing=shared sets up the data before there are ranks, and {reason.args[0]}; "
                "using sharing=mmap instead"
            )
        except Private:
            pass  # each rank sets up by itself, and says why
        return packs

    def attach(self, data: pl.LightningDataModule, config: Mapping[str, Any]) -> None:
        super().attach(data, config)
        if _given and _given[0] and is_overridden("prepare_data", data, pl.LightningDataModule):
            data.prepare_data = _prepared_before  # type: ignore[method-assign]

    def _set_up(self, call: Call) -> None:
        key = self._key(call)
        found = [packs[name] for packs in _given for name in names_of(key) if name in packs]
        if found:
            adopt(call.data, found[0].packed())
        elif _given or call.world_size > 1:
            if not _given:
                rank_zero_warn(
                    "sharing=shared hands memory to the processes that this program starts, and "
                    "another one has started these; using sharing=mmap instead"
                )
            super()._set_up(call)
        else:
            try:
                self._make(call, key, partial(self._keep, {}))
            except Private as reason:
                tell(reason)

    def _keep(self, packs: dict[str, Given], name: str, plan: Plan, use: Use) -> None:
        """Put a plan into shared memory and `packs`; what earlier ones hold is not stored again."""
        held = {
            sha256(chunk.data).hexdigest(): place
            for given in packs.values()
            for chunk, place in zip(given.packed().chunks, given.chunks, strict=True)
        }
        names = [plan.digest(number) if held else str(number) for number in range(len(plan.sizes))]
        missing = [number for number, digest_ in enumerate(names) if digest_ not in held]
        bounds = [0, *accumulate(plan.sizes[number] for number in missing)]
        if missing:
            region = new_shared_memory(bounds[-1])
            memory = region.map(mmap.ACCESS_WRITE)
            for number, (start, end) in zip(missing, pairwise(bounds), strict=True):
                plan.write(number, memory[start:end])
                held[names[number]] = region, start, end
        given = Given(plan.skeleton, [held[name] for name in names])
        use(given.packed())
        packs[name] = given


def adopt(data: pl.LightningDataModule, packed: Packed) -> None:
    """Let a data module and the random state be what they were when they were packed."""
    content = unpack(packed, {"": data, **vars(data)})
    for name in state_of(data).keys() - content["state"].keys():
        delattr(data, name)
    vars(data).update(content["state"])
    if content["after"] is not None:
        set_random_state(content["after"])


def tell(reason: Private) -> None:
    """Warn of data that stay each process's own."""
    why, instead = reason.args
    rank_zero_warn(f"sharing: {why}; each process keeps its own copy of the data; {instead}")


def _prepared_before() -> None:
    """Do nothing: the starting process has prepared the data."""

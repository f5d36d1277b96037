"""The two ways in which processes come to one copy of the data."""

import logging
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden

from app.process.random_state import random_state, set_random_state
from app.sharing.needs import (
    NeedsTrainer,
    Watch,
    broken,
    key_of,
    names_rank,
    ranks_of,
    sources,
    state_of,
)
from app.sharing.packing import UNPICKLABLE, Packed, Plan, unpack
from app.sharing.regions import (
    DEV_SHM,
    InMemory,
    NoSpace,
    map_region,
    new_shared_memory,
    readable,
    release_memory,
)
from app.sharing.store import Store

log = logging.getLogger(__name__)

LARGE = 2**24
"""Bytes that are worth the tenths of a second that it takes to give them back to the system."""
OWN_COPY = "each process keeps its own copy of the data"


@dataclass(kw_only=True)
class Given:
    """Data that the process that started this one has set up; travels between processes.

    `sizes` are those of the chunks, which lie in the region one behind the other.
    """

    needs: Mapping[str, Any]
    skeleton: bytes
    region: InMemory | None
    sizes: Sequence[int]

    def packed(self) -> Packed:
        """Map the memory."""
        if self.region is None:
            return Packed(skeleton=self.skeleton, chunks=[])
        memory, bounds = map_region(self.region), np.cumsum([0, *self.sizes]).tolist()
        chunks = [memory[start:end] for start, end in pairwise(bounds)]
        return Packed(skeleton=self.skeleton, chunks=chunks)


Packs = Mapping[str, Given]
"""By what decides the data, see `key_of`."""

_given: list[Packs] = []
"""What this process was given, once: a process may build its data more than once."""


@dataclass(kw_only=True)
class SetUp:
    """The call of a data module's own setup."""

    data: pl.LightningDataModule
    config: Mapping[str, Any]
    setup: Callable[[Any], None]
    stage: Any

    def key(self) -> str:
        """Of what decides the result."""
        return key_of(self.data, self.config, str(getattr(self.stage, "value", self.stage)))


@dataclass(kw_only=True)
class Made:
    """What a setup has made, to be kept where others find it.

    `needs` is None where only this process can use it; `let_go` drops this process's copy, when
    nothing can fail any more.
    """

    key: str
    needs: Mapping[str, Any] | None
    plan: Plan
    let_go: Callable[[], None]


class Sharing(ABC):
    """Replaces `setup` of a data module: what it makes is shared, or taken from who made it.

    Acts in `setup(stage)`. Afterwards the data module has the same attributes over other memory,
    and the random state is that behind setup: the run does not differ.

    Args:
        cache: folder of the files.
        min_bytes: arrays below this size stay with each process.
        min_items: length from which lists are shared; None = none is.
    """

    def __init__(self, *, cache: str, min_bytes: int, min_items: int | None) -> None:
        self.store = Store(Path(cache))
        self.min_bytes = min_bytes
        self.min_items = min_items

    def attach(self, data: pl.LightningDataModule, config: Mapping[str, Any]) -> None:
        """Act on a data module that was built from the run's resolved configuration."""
        data.setup = partial(self._called, data, config, data.setup)  # type: ignore[method-assign]

    def _called(
        self,
        data: pl.LightningDataModule,
        config: Mapping[str, Any],
        setup: Callable[[Any], None],
        stage: Any = None,
    ) -> None:
        self._set_up(SetUp(data=data, config=config, setup=setup, stage=stage))

    @abstractmethod
    def _set_up(self, call: SetUp) -> None:
        """Do what the call would do."""

    def _by_file(self, call: SetUp) -> None:
        """Map what the cache folder holds, or make it and put it there."""
        key = call.key()
        if self._take_stored(key, call.data):
            return
        with self.store.turn(key) as turn:
            if self._take_stored(key, call.data):
                return
            if not turn.failed:
                kept = self._make(call, key, self._in_file, known=None, alone=False)
                turn.failed = not kept
                return
        call.setup(call.stage)

    def _take_stored(self, key: str, data: pl.LightningDataModule) -> bool:
        packed = self.store.find(key, lambda needs: broken(needs, data))
        if packed is not None:
            adopt(data, packed)
        return packed is not None

    def _make(
        self,
        call: SetUp,
        key: str,
        keep: Callable[[Made], Packed | None],
        *,
        known: Mapping[str, Any] | None,
        alone: bool,
    ) -> bool:
        """Set up and share the result; False, with a warning, where it stays this process's own.

        Args:
            keep: puts it where others find it; None, with a warning, where there is no room.
            known: what may be asked of a trainer that there is not yet.
            alone: whether to share also what no other process could use.
        """
        data, name = call.data, type(call.data).__name__
        before = state_of(data)
        with Watch(data, call.config, known=known) as watch:
            call.setup(call.stage)
        state = state_of(data)
        why = None
        if watch.private is not None:
            why = f"sharing: {name}.setup reads trainer.{watch.private}, which is one process's"
        plan, left = self._plan(data, state, watch.after)
        for attribute, error in left.items():
            text = f"sharing: {name}.{attribute} cannot be pickled ({error})"
            if attribute in before and before[attribute] is state[attribute]:
                rank_zero_warn(f"{text}; it is not shared")
            elif why is None:
                why = f"{text}, and setup makes it"
        if why is not None:
            rank_zero_warn(f"{why}; " + ("it is not shared" if alone else OWN_COPY))
            if not alone:
                return False
        if alone and not plan.num_bytes:
            return False
        is_large = plan.num_bytes >= LARGE

        def let_go() -> None:
            for attribute in state.keys() - left.keys():
                delattr(data, attribute)
            state.clear()
            before.clear()
            if is_large:
                release_memory()

        made = Made(key=key, needs=None if why else watch.needs, plan=plan, let_go=let_go)
        packed = keep(made)
        if packed is None:
            return False
        adopt(data, packed)
        del made, plan  # which holds, until now, the regions that it refers to
        if is_large:
            release_memory()
        return True

    def _plan(
        self, data: pl.LightningDataModule, state: Mapping[str, Any], after: Mapping[str, Any]
    ) -> tuple[Plan, dict[str, str]]:
        """How to pack the state; what had to be left out of it, and why."""
        left: dict[str, str] = {}
        while True:
            content = {name: value for name, value in state.items() if name not in left}
            try:
                packed = {"state": content, "left": list(left), "after": after}
                return self._plan_of(data, packed), left
            except UNPICKLABLE as error:
                found = self._unpicklable(data, content)
                left |= found or dict.fromkeys(content, str(error))

    def _unpicklable(
        self, data: pl.LightningDataModule, state: Mapping[str, Any]
    ) -> dict[str, str]:
        found: dict[str, str] = {}
        for name, value in state.items():
            try:
                self._plan_of(data, value)
            except UNPICKLABLE as error:
                found[name] = str(error)
        return found

    def _plan_of(self, data: pl.LightningDataModule, value: Any) -> Plan:
        outside: dict[str, Any] = {"data": data}
        if vars(data).get("trainer") is not None:
            outside["trainer"] = data.trainer
        return Plan(value, min_bytes=self.min_bytes, min_items=self.min_items, outside=outside)

    def _in_file(self, made: Made) -> Packed | None:
        assert made.needs is not None
        try:
            return self.store.keep(made.key, made.needs, made.plan, before_writing=made.let_go)
        except NoSpace as lack:
            rank_zero_warn(
                f"sharing=mmap needs {readable(lack.needed)} in {self.store.folder}, and its disk "
                f"has {readable(lack.free)} free; {OWN_COPY} (sharing.cache=PATH is for another "
                "disk)"
            )
            return None


class Mmap(Sharing):
    """Files in a cache folder, mapped by every process, also by those of other runs."""

    def _set_up(self, call: SetUp) -> None:
        self._by_file(call)


class Shared(Sharing):
    """Shared memory, filled by the process that starts the others.

    `collect` fills it there, `give` hands it to each of those. Without these, a process alone
    shares with its workers, and several do as `Mmap`.
    """

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
        rank = names_rank(sources(type(data)))
        if rank is not None:
            self._tell(data, f"names {rank} in its source")
            return packs
        known = {"world_size": num_processes}
        try:
            with Watch(data, config, known=known) as watch:
                data.prepare_data()
            if watch.after:
                self._tell(data, "draws random numbers in prepare_data")
                return packs
            for stage in stages:
                call = SetUp(data=data, config=config, setup=data.setup, stage=stage)
                keep = partial(self._in_memory, packs)
                if not self._make(call, call.key(), keep, known=known, alone=False):
                    break
        except NeedsTrainer as asked:
            self._tell(data, f"asks for trainer.{asked}")
        return packs

    def attach(self, data: pl.LightningDataModule, config: Mapping[str, Any]) -> None:
        super().attach(data, config)
        if _given and _given[0] and is_overridden("prepare_data", data, pl.LightningDataModule):
            data.prepare_data = _prepared_before  # type: ignore[method-assign]

    def _set_up(self, call: SetUp) -> None:
        if not _given and ranks_of(call.data)[1] == 1:
            self._make(call, call.key(), partial(self._in_memory, {}), known=None, alone=True)
            return
        found = _given[0].get(call.key()) if _given else None
        if found is not None and broken(found.needs, call.data) is None:
            adopt(call.data, found.packed())
            return
        if not _given:
            rank_zero_warn(
                "sharing=shared hands memory to the processes that this program starts, and "
                "another one has started these; using sharing=mmap instead"
            )
        self._by_file(call)

    def _in_memory(self, packs: dict[str, Given], made: Made) -> Packed | None:
        """Into shared memory and `packs`, or into files where it does not fit."""
        plan, size, region = made.plan, made.plan.num_bytes, None
        if size:
            try:
                memory = new_shared_memory(size)
            except NoSpace as lack:
                rank_zero_warn(
                    f"sharing=shared needs {readable(lack.needed)} of shared memory, and {DEV_SHM} "
                    f"has {readable(lack.free)} free (in a container: --shm-size); using "
                    "sharing=mmap instead"
                )
                if made.needs is None:
                    return None
                self.store.make_folder()
                return self._in_file(made)
            region = InMemory(name=secrets.token_hex(8), memory=memory)
        made.let_go()
        if region is not None:
            bounds = np.cumsum([0, *plan.sizes]).tolist()
            for number, (start, end) in enumerate(pairwise(bounds)):
                plan.write(number, region.memory.numpy()[start:end])
        given = Given(
            needs=made.needs or {}, skeleton=plan.skeleton, region=region, sizes=plan.sizes
        )
        packs[made.key] = given
        return given.packed()

    def _tell(self, data: pl.LightningDataModule, what: str) -> None:
        rank_zero_warn(
            f"sharing=shared sets up the data before there are ranks, and {type(data).__name__} "
            f"{what}; using sharing=mmap instead"
        )


def adopt(data: pl.LightningDataModule, packed: Packed) -> None:
    """Let a data module and the random state be what they were when they were packed."""
    outside = {"data": data, "trainer": vars(data).get("trainer")}
    content = unpack(packed, outside=outside)
    for name in state_of(data).keys() - content["state"].keys() - set(content["left"]):
        delattr(data, name)
    vars(data).update(content["state"])
    if content["after"]:
        set_random_state({**random_state(), **content["after"]})


def _prepared_before() -> None:
    """The starting process has prepared the data."""

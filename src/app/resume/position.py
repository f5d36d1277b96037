"""Where a training loader stands: in plain values, and found again in a loader made anew."""

import copy
import inspect
import logging
from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain, count
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.trainer.connectors import data_connector
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset

from app.data.in_memory import generator_of
from app.errors import NoBatch, Refused
from app.parallel.split import SharedSampler, copied, second_loader
from app.process.random_state import random_state, sampling_state, set_random_state
from app.resume.held import Held, holders_of

log = logging.getLogger(__name__)

NUMBERS_SEEN = 32
"""Of a tensor, by which a batch is known again."""


class ResumableLoader:
    """A loader of training batches whose position a checkpoint can hold.

    A loader with `state_dict` and `load_state_dict` finds its place itself. Any other one is
    started from the random state its epoch began with, and the batches that were trained on are
    drawn again and dropped: samplers, augmentations and worker processes then stand where they
    stood. What is not map-style may serve other batches the second time, and says so.

    The fit iterates it through a CombinedLoader, and its iterating begins when the first batch is
    asked for: of all loaders that make a step, in their order, as in stock Lightning. Whoever else
    iterates it gets batches of its own, and the position stays.

    Args:
        fillers: where a batch that is None is to be taken down, and the one before it served in
            its place, for the ranks to train together; None: it is served as it is.
        asks_ahead: whether Lightning asks for a batch before the one before it is trained on: it
            does where some loader has no length.

    Attributes:
        asks_ahead: as given.
        waits: whether it is not iterated before an epoch has started.
        beside: the loaders that make a step, itself among them.
    """

    def __init__(self, loader: Any, *, asks_ahead: bool, fillers: set[int] | None = None) -> None:
        self.loader = without_persistent_workers(loader)
        self.waits = False
        self.beside = [self]
        self._kept_workers = self.loader is not loader
        self._num_begun = 0
        self._is_asked = False  # for an epoch that has not begun
        self._begun_ahead: Iterator[Any] | None = None
        self.asks_ahead = asks_ahead
        self._fillers = fillers
        self._holds = Held(partial(holders_of, self.loader))
        self._start: dict[str, Any] = {}
        self._num_served = 0
        self._last: dict[str, Any] = {}  # drawn: from which random state, and what
        self._ahead: dict[str, Any] = {}  # the position before the last batch drawn
        self._restored: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not yet set: a copy is being made
            raise AttributeError(name)
        return getattr(self.loader, name)

    @property
    def worker_init_fn(self) -> Any:
        """The loader's own, where it has workers: Lightning sets it."""
        return self.loader.worker_init_fn

    @worker_init_fn.setter
    def worker_init_fn(self, init: Any) -> None:
        self.loader.worker_init_fn = init

    def state_dict(self) -> dict[str, Any]:
        """Empty: Lightning asks, and restores it in some cases only; ExactResume does in all."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Nothing: see `state_dict`."""

    def __iter__(self) -> Iterator[Any]:
        if asked_by(CombinedLoader.__module__):
            self._is_asked = True
            return self._served()
        if asked_by(data_connector.__name__) and isinstance(self.loader, DataLoader):
            return iter(())  # it tries whether what is no DataLoader can be iterated
        return iter(second_loader(self.loader))

    def _served(self) -> Iterator[Any]:
        if self.waits:  # for its epoch to start: Lightning has asked too early, and drops this
            yield None
            return
        restored = self._restored
        if self._begun_ahead is None:
            is_inside = restored is not None and not restored["is_new_epoch"]
            is_of_fit = any(one is self for one in self.beside)  # and no copy
            begin_all = is_of_fit and not is_inside and all(one._is_asked for one in self.beside)
            for one in self.beside if begin_all else [self]:
                one._begin()
        batches, self._begun_ahead = self._begun_ahead, None
        assert batches is not None
        keeps_last = self.asks_ahead or not (self._finds_itself or _is_map_style(self.loader))
        while True:
            if self.asks_ahead:
                self._ahead = {**self._now(), "before_next": sampling_state()}
            drawn_from = sampling_state() if keeps_last else {}
            if "first_drawn_from" not in self._start:
                self._start["first_drawn_from"] = sampling_state()
            try:
                batch = next(batches)
            except StopIteration:
                if not self._num_served and restored is None:
                    raise NoBatch(
                        f"train_dataloader must serve a batch in each epoch, got none of "
                        f"{_name_of(self.loader)}; return what has samples and can be iterated "
                        "again, as a DataLoader can"
                    ) from None
                return
            self._num_served += 1
            if keeps_last:
                self._last = {"drawn_from": drawn_from, "seen": seen(batch)}
            yield batch

    def _begin(self) -> None:
        restored, self._restored = self._restored, None
        self._is_asked = False
        self._begun_ahead = self._begun() if restored is None else self._found(restored)

    def _begun(self) -> Iterator[Any]:
        self._start = {
            "epoch_start": random_state(),
            "held_start": self._holds.state(),
            "num_begun": self._num_begun,
        }
        self._num_served = 0
        self._last = {}
        batches = self._iterated()
        self._num_begun += 1
        if self._fillers is None:
            return batches
        self._fillers.clear()
        return filled(batches, self._fillers)

    def _iterated(self) -> Iterator[Any]:
        if not self._kept_workers or self._num_begun == 0:
            return iter(self.loader)
        own = self.loader.generator  # kept workers would not draw a seed again
        self.loader.generator = generator_of(torch.initial_seed(), self._num_begun)
        try:
            return iter(self.loader)
        finally:
            self.loader.generator = own

    def _found(self, restored: dict[str, Any]) -> Iterator[Any]:
        """The batches behind a position."""
        after = random_state()
        self._num_begun = restored["num_begun"]
        if restored["is_new_epoch"]:
            if "loader" not in restored:
                # again: Lightning has tried whether it can iterate
                self._holds.set_state(restored["held"])
                return self._begun()
            batches = self._begun()
            # one that ended with its last batch, and was not asked for another, ends now
            first = next(batches, self)
            if first is not self:
                return chain([first], batches)
            set_random_state(after)
            self._num_begun = restored["num_begun"]
            return self._begun()
        self._holds.set_state(restored["held_start"])
        set_random_state(restored["epoch_start"])
        batches = self._begun()
        self._start["first_drawn_from"] = restored["first_drawn_from"]
        set_random_state(restored["first_drawn_from"])
        if "loader" not in restored:
            if not self._drops(batches, restored):
                batches = self._begun()
            self._holds.set_state(restored["held"])
        set_random_state(restored.get("before_next", after))
        return batches

    def _drops(self, batches: Iterator[Any], restored: dict[str, Any]) -> bool:
        """Draw what was trained on again; False where there is less of it now, as is told."""
        num, last = restored["num_served"], restored["last"]
        found = None
        for self._num_served in range(1, num + 1):
            if last and self._num_served == num:
                set_random_state(last["drawn_from"])
            found = next(batches, self)
            if found is self:
                break
        is_whole = found is not self
        if not is_whole or (last and seen(found) != last["seen"]):
            rank_zero_warn(
                f"resuming in epoch {restored['epoch']}: {_name_of(self.loader)} has no state_dict "
                f"and serves other batches than before, so of the {num} already trained on some "
                "may be served again"
            )
        self._last = last
        return is_whole

    @property
    def _finds_itself(self) -> bool:
        # of what this project has split the sampler draws, and the loader cannot know
        is_split = isinstance(getattr(self.loader, "batch_sampler", None), SharedSampler)
        return _is_stateful(self.loader) and not is_split

    def _now(self) -> dict[str, Any]:
        if self._finds_itself:
            return {**self._start, "loader": copy.deepcopy(self.loader.state_dict())}
        served = {"num_served": self._num_served, "held": self._holds.state(), "last": self._last}
        return {**self._start, **served}

    def position(self, *, mid_epoch: bool, is_ahead: bool) -> dict[str, Any]:
        """Where the loader stands, in plain values.

        Args:
            mid_epoch: whether the epoch has batches that were not trained on.
            is_ahead: whether the last batch served is one of them.
        """
        if self._restored is not None:  # no batch was asked for since
            return self._restored
        if is_ahead and self.asks_ahead:
            return {**self._ahead, "is_new_epoch": False}
        keeps_data = hasattr(getattr(self.loader, "dataset", self.loader), "state_dict")
        if mid_epoch or (self._finds_itself and keeps_data):
            begun = {} if mid_epoch else {"num_begun": self._num_begun}
            return {**self._now(), **begun, "is_new_epoch": not mid_epoch}
        return {"held": self._holds.state(), "is_new_epoch": True, "num_begun": self._num_begun}

    def restore(self, position: Mapping[str, Any], *, epoch: int) -> None:
        """Go on from what `position` returned with the next batch asked for."""
        self._restored = {**position, "epoch": epoch}
        self.waits = self.asks_ahead and position["is_new_epoch"]
        if "loader" in position:
            self.loader.load_state_dict(position["loader"])
        elif not position["is_new_epoch"]:
            log.info(
                f"resuming in epoch {epoch}: drawing {position['num_served']} batches again to "
                "find the place in the data"
            )


def filled(batches: Iterator[Any], fillers: set[int]) -> Iterator[Any]:
    """Batches of which each None is taken down, and another one served in its place."""
    instead = None
    waiting: deque[Any] = deque()
    for number in count():
        batch = waiting.popleft() if waiting else next(batches, batches)
        while batch is None and instead is None:  # the first ones: look for one that is not
            waiting.append(next(batches, batches))
            instead = waiting[-1]
        if batch is batches or instead is batches:
            return
        if batch is None:
            fillers.add(number)
        else:
            instead = batch
        yield instead


def resumable(loaders: Any, fillers: set[int] | None = None) -> tuple[Any, list[ResumableLoader]]:
    """What `train_dataloader` returned with each loader in it made resumable, and those loaders.

    Args:
        fillers: of a loader alone: a batch of several is not None.
    """
    if not isinstance(loaders, CombinedLoader):
        if not isinstance(loaders, Mapping | list | tuple):
            is_endless = sized_len(loaders) is None
            loader = ResumableLoader(loaders, asks_ahead=is_endless, fillers=fillers)
            return loader, [loader]
        loaders = CombinedLoader(loaders, "max_size_cycle")
    asks_ahead = any(sized_len(loader) is None for loader in loaders.flattened)
    found = [ResumableLoader(loader, asks_ahead=asks_ahead) for loader in loaders.flattened]
    for loader in found:
        loader.beside = found
    loaders.flattened = found
    return loaders, found


def refuse_empty(loaders: Any, limit: int | float | None) -> Any:
    """The loaders. Raises Refused where there is nothing to train on: Lightning calls it finished.

    Args:
        limit: of Lightning's `limit_train_batches`.
    """
    is_combined = isinstance(loaders, CombinedLoader)
    for loader in loaders.flattened if is_combined else tree_leaves(loaders):
        num_batches = sized_len(loader)
        if num_batches == 0:
            raise NoBatch(f"train_dataloader must serve a batch, got none: {_why_empty(loader)}")
        if isinstance(limit, float) and num_batches and int(num_batches * limit) == 0:
            raise Refused(
                f"trainer.limit_train_batches must leave one of the {num_batches} batches of an "
                f"epoch, got {limit}; type trainer.limit_train_batches=1"
            )
    return loaders


def _why_empty(loader: Any) -> str:
    num_samples = sized_len(getattr(loader, "dataset", loader))
    sampler = getattr(loader, "batch_sampler", None)
    drawn = sized_len(getattr(sampler, "sampler", None))
    size = getattr(sampler, "batch_size", None)
    if num_samples == 0 or drawn is None or size is None:
        return f"{_name_of(loader)} is empty; give it samples"
    if drawn == 0:
        return f"the sampler draws none of the {num_samples} samples; let it draw some"
    ranks = sampler.share.size if isinstance(sampler, SharedSampler) else 1
    of_ranks = f" for each of {ranks} ranks" if ranks > 1 else ""
    return (
        f"{drawn} samples are fewer than a batch of {size}{of_ranks}, and drop_last leaves them "
        f"out; type data.batch_size={max(1, drawn // ranks)}, or give it drop_last=False"
    )


def without_persistent_workers(loader: Any) -> Any:
    """The same loader with new workers every epoch: the random state of kept ones is out of reach.

    One that finds its place itself knows its workers.
    """
    if not getattr(loader, "persistent_workers", False) or _is_stateful(loader):
        return loader
    return copied(loader, persistent_workers=False)


def seen(batch: Any) -> str:
    """A batch as far as it is looked at, to know it again: a few numbers of each tensor."""
    return repr([_seen_of(leaf) for leaf in tree_leaves(batch)])


def _seen_of(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor | np.ndarray):
        shape = tuple(leaf.shape)
        is_dense = isinstance(leaf, np.ndarray) or (
            leaf.layout == torch.strided and not leaf.is_nested
        )
        if not is_dense or 0 in shape:
            return shape
        first = leaf[(0,) * (leaf.ndim - 1)] if leaf.ndim > 1 else leaf.reshape(-1)
        last = leaf[(-1,) * (leaf.ndim - 1)] if leaf.ndim > 1 else first
        return shape, first[:NUMBERS_SEEN].tolist(), last[-NUMBERS_SEEN:].tolist()
    return leaf if isinstance(leaf, str | bytes | int | float) else type(leaf).__name__


def asked_by(module: str) -> bool:
    """Whether the function that asks this was called by one of a module."""
    frame = inspect.currentframe()
    for _ in range(2):
        frame = frame.f_back if frame is not None else None
    return frame is not None and frame.f_globals.get("__name__") == module


def _name_of(loader: Any) -> str:
    return type(getattr(loader, "dataset", loader)).__name__


def _is_stateful(loader: Any) -> bool:
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def _is_map_style(loader: Any) -> bool:
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)

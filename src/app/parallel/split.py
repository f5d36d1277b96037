"""Which samples of an epoch a rank serves: one order for all ranks, split step by step.

A step of `size` ranks takes the samples that one process would take with a batch `size` times as
large. Where the last ones do not divide evenly, the ranks serve one more or less, and weights make
the step the mean over its samples all the same. Nothing is repeated and nothing left out.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
)

from app.process.random_state import random_state, sampling_state, set_random_state, under
from app.process.ranks import ranks

Order = Sequence[Any] | Tensor
"""Samples, or their positions, in the order of an epoch."""


class KeepsRandomState(Strategy):
    """A strategy in which a run draws on from where model and data were built.

    Lightning's strategies of several processes seed all generators anew, and the data of a run
    would be split and shuffled in another way than in one process.
    """

    def setup_environment(self) -> None:
        before = random_state()
        super().setup_environment()
        set_random_state(before)


class Share(NamedTuple):
    """Which of how many ranks that split the data: 0 to size - 1."""

    rank: int
    size: int


WHOLE = Share(0, 1)


def share_of(trainer: pl.Trainer) -> Share:
    """Which share of the data this process serves: tensor parallel ranks serve the same one."""
    if not isinstance(trainer.strategy, ParallelStrategy):
        return WHOLE
    split_by = trainer.strategy.distributed_sampler_kwargs
    return Share(split_by["rank"], split_by["num_replicas"])


def num_parts(num_samples: int, *, batch_size: int, share: Share, drop_last: bool) -> int:
    """Batches that every rank serves in an epoch; `batch_size` is one rank's."""
    whole, rest = divmod(num_samples, batch_size * share.size)
    return whole if drop_last or rest == 0 else whole + 1


def training_part(order: Order, index: int, *, batch_size: int, share: Share) -> Any:
    """A rank's samples of step `index`; where it has none, one of another's, of weight 0."""
    step = batch_size * share.size
    samples = order[index * step : (index + 1) * step]
    mine = samples[share.rank :: share.size]
    return mine if len(mine) else samples[:1]


def training_weight(num_samples: int, index: int, *, batch_size: int, share: Share) -> float:
    """What a rank's loss counts in step `index`, so that the ranks' mean is that of the samples."""
    step = batch_size * share.size
    served = min(step, num_samples - index * step)
    mine = len(range(share.rank, served, share.size))
    return mine * share.size / served


def evaluation_part(order: Order, index: int, *, batch_size: int, share: Share) -> Any:
    """A rank's samples of evaluation batch `index`: every rank serves as many batches.

    A rank with fewer samples than batches repeats one: sharded models need all ranks in each batch.
    """
    mine = order[share.rank :: share.size]
    parts = num_parts(len(order), batch_size=batch_size, share=share, drop_last=False)
    part = mine[index * len(mine) // parts : (index + 1) * len(mine) // parts]
    if len(part):
        return part
    return mine[-1:] if len(mine) else order[:1]


def evaluation_repeats(num_samples: int, index: int, *, batch_size: int, share: Share) -> bool:
    """Whether `evaluation_part` repeats a sample that is in another batch."""
    mine = len(range(share.rank, num_samples, share.size))
    parts = num_parts(num_samples, batch_size=batch_size, share=share, drop_last=False)
    return index * mine // parts == (index + 1) * mine // parts


def mean_over_ranks(trainer: pl.Trainer, tensor: Tensor) -> Tensor:
    """The mean of a tensor that every rank has; every rank calls it."""
    if trainer.world_size == 1:
        return tensor
    mean = trainer.strategy.reduce(tensor.clone(), reduce_op="mean")  # in place, hence the clone
    assert isinstance(mean, Tensor)
    return mean


class SharedSampler:
    """A rank's batches of what a sampler draws, as the batch sampler of a DataLoader.

    All ranks draw the order that rank 0 draws, as it would alone.

    Args:
        sampler: of samples, or of batches or items that are served as they are.
        batch_size: samples of a batch; None serves what the sampler draws, one at a time.
        evaluates: whether the batches are evaluated, not trained on.
    """

    def __init__(
        self,
        *,
        sampler: Any,
        batch_size: int | None,
        drop_last: bool,
        share: Share,
        evaluates: bool,
    ) -> None:
        self.sampler = sampler  # where Lightning looks for `set_epoch`
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.share = share
        self.evaluates = evaluates

    def __len__(self) -> int:
        return num_parts(
            len(self.sampler),
            batch_size=self.batch_size or 1,
            share=self.share,
            drop_last=self.drop_last and not self.evaluates,
        )

    def __iter__(self) -> Iterator[Any]:
        order = self._drawn()
        part = evaluation_part if self.evaluates else training_part
        for index in range(len(self)):
            mine = part(order, index, batch_size=self.batch_size or 1, share=self.share)
            yield mine if self.batch_size is not None else mine[0]

    def weight(self, index: int) -> float:
        """Of this rank's loss in step `index`."""
        return training_weight(
            len(self.sampler), index, batch_size=self.batch_size or 1, share=self.share
        )

    def repeats(self, index: int) -> bool:
        """Whether this rank's evaluation batch `index` only repeats what is in another one."""
        return evaluation_repeats(
            len(self.sampler), index, batch_size=self.batch_size or 1, share=self.share
        )

    def _drawn(self) -> list[Any]:
        state = ranks().first(sampling_state)
        with nullcontext() if ranks().is_first else under(state):
            return self._drawn_here()

    def _drawn_here(self) -> list[Any]:
        """As far as one process draws: behind that a sampler's own generator would go on."""
        if self.batch_size is None or self.evaluates:
            return list(islice(iter(self.sampler), len(self.sampler)))
        step = self.batch_size * self.share.size
        batches = BatchSampler(self.sampler, step, self.drop_last)
        return [sample for batch in islice(iter(batches), len(self)) for sample in batch]


def split(loader: Any, *, share: Share, evaluates: bool) -> tuple[Any, bool]:
    """A loader of this rank's share, and whether it could be split.

    A loader of ours splits itself (`shard`), a DataLoader over a map-style data set is made anew
    around its samplers. One that already splits is left as it is. Neither an iterable data set nor
    any other iterable can be split from outside.
    """
    if share.size == 1 or isinstance(getattr(loader, "sampler", None), DistributedSampler):
        return loader, True
    if hasattr(loader, "shard"):
        return loader.shard(share, evaluates=evaluates), True
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader, False
    if isinstance(getattr(loader.batch_sampler, "sampler", None), DistributedSampler):
        return loader, True
    shared: dict[str, Any] = {"share": share, "evaluates": evaluates}
    batches = loader.batch_sampler
    if batches is None:  # the sampler draws what is served
        one = SharedSampler(sampler=loader.sampler, batch_size=None, drop_last=False, **shared)
        return copied(loader, sampler=one), True
    if type(batches) is BatchSampler:
        sampler = SharedSampler(
            sampler=batches.sampler,
            batch_size=batches.batch_size,
            drop_last=batches.drop_last,
            **shared,
        )
    else:
        sampler = SharedSampler(sampler=batches, batch_size=None, drop_last=False, **shared)
    return rebuilt(loader, batch_sampler=sampler), True


def each(change: Callable[[Any], Any], loaders: Any) -> Any:
    """What a loader's method returned, with each loader in it changed."""
    if isinstance(loaders, CombinedLoader):
        loaders.flattened = [change(loader) for loader in loaders.flattened]
        return loaders
    return tree_map(change, loaders)


def in_order(loader: Any) -> Any:
    """A loader that serves its samples as the data set has them, in each epoch alike; one whose
    order is its own is left as it is, with a warning."""
    if hasattr(loader, "shard"):
        twin = copy.copy(loader)
        twin.shuffle = False
        return twin
    batches = getattr(loader, "batch_sampler", None)
    is_own = batches is not None and type(batches) is not BatchSampler
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or is_own:
        what = type(batches if is_own else getattr(loader, "dataset", loader)).__name__
        rank_zero_warn(
            f"trainer.overfit_batches leaves the order to {what}: where it shuffles, other batches "
            "are trained on in each epoch"
        )
        return loader
    sampler = SequentialSampler(loader.dataset)  # type: ignore[arg-type]  # as Lightning does
    if batches is None:
        return copied(loader, sampler=sampler)
    batches = BatchSampler(sampler, batches.batch_size, batches.drop_last)
    return copied(loader, sampler=sampler, batch_sampler=batches)


def copied(loader: DataLoader[Any], **changes: Any) -> DataLoader[Any]:
    """The same loader, of the same class, with other attributes than a DataLoader lets be set."""
    twin = copy.copy(loader)
    vars(twin).update(changes, _iterator=None)
    return twin


def rebuilt(loader: DataLoader[Any], *, batch_sampler: Any) -> DataLoader[Any]:
    """The same loader, of the same class, that serves the batches of another batch sampler."""
    return copied(loader, batch_sampler=batch_sampler, batch_size=None, drop_last=False)


def micro_batch_size(loader: Any) -> int | None:
    """Samples in a full batch of one rank, no more than it has; None where they are not known."""
    size = _typed_batch_size(loader)
    num_samples = samples_of_epoch(loader)
    if size is None or num_samples is None:
        return size
    return min(size, math.ceil(num_samples / _share_of(loader).size))


def samples_of_epoch(loader: Any) -> int | None:
    """Samples in the batches that all ranks serve in an epoch; None where they are not known."""
    size, batches = _typed_batch_size(loader), getattr(loader, "batch_sampler", None)
    if isinstance(batches, list | tuple) and not isinstance(loader, Mapping):
        return sum(map(len, batches))
    drawn: Any = loader.dataset if hasattr(loader, "shard") else getattr(batches, "sampler", None)
    try:
        num_samples, num_batches = len(drawn), len(loader)
    except (TypeError, NotImplementedError):  # without a length, as of a data set or a sampler
        return None
    if size is None:
        return None
    return min(num_samples, num_batches * size * _share_of(loader).size)


def _typed_batch_size(loader: Any) -> int | None:
    """What was asked for; None where the batches are of different sizes."""
    batches = getattr(loader, "batch_sampler", None)
    if isinstance(batches, list | tuple):
        sizes = {len(batch) for batch in batches}
        return sizes.pop() if len(sizes) == 1 else None
    size = getattr(loader, "batch_size", None)
    if size is None:
        size = getattr(batches, "batch_size", None)
    return size if isinstance(size, int) else None


def _share_of(loader: Any) -> Share:
    """Of a loader that has been split."""
    found = getattr(getattr(loader, "batch_sampler", None), "share", None)
    return found if isinstance(found, Share) else WHOLE


def second_loader(loader: Any) -> Any:
    """A loader of the same data whose iteration leaves the position of the first alone."""
    try:
        twin = copy.copy(loader)
    except TypeError:  # a generator, which there is once
        return loader
    for name in ("loader", "batch_sampler", "sampler", "generator"):
        if getattr(loader, "__dict__", {}).get(name) is not None:
            vars(twin)[name] = second_loader(vars(loader)[name])
    if isinstance(twin, DataLoader):
        vars(twin)["_iterator"] = None  # that of persistent workers
    return twin

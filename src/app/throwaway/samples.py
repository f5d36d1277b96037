"""What the training data of a run are: how many samples, how long, and what a batch holds."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.optim import LBFGS
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from app.config import SINGLE, Config, is_single
from app.errors import Refused
from app.parallel.split import micro_batch_size, rebuilt
from app.run.build import holds_whole_model
from app.throwaway.run import Steps, end_before_training, fit, release_memory, throwaway

MANY_BATCHES = 100_000
"""Batches of a sampler of the user's whose sizes are counted."""


class Looks(Steps):
    """Notes the training loaders and the model, and ends the run before its first step."""

    def __init__(self) -> None:
        super().__init__(enough=math.inf)
        self.loaders: Any = None
        self.accumulates = False

    def serves(self, loaders: Any) -> Any:
        """Note what `train_dataloader` returned."""
        self.loaders = loaders
        return loaders

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        is_closed = any(isinstance(one, LBFGS) for one in trainer.optimizers)
        self.accumulates = pl_module.automatic_optimization and not is_closed
        end_before_training(trainer)


def look(
    config: Config, shares: int | None, given: float | None = None
) -> tuple[Looks, int | None]:
    """What a run begins with, and the samples of an epoch over all ranks; None where the data do
    not tell. Raises Refused where there are none.

    Args:
        shares: ranks that serve different samples; None for one.
        given: of `samples_of`.
    """
    looks = Looks()
    num_ranks, parts = None, shares or 1
    if not is_single(config.strategy) and holds_whole_model(config):
        num_ranks, parts = parts, 1
        config = config.but(strategy={"_target_": SINGLE})
    run = throwaway(config, steps=looks, validates=False, num_ranks=num_ranks, served=looks.serves)
    fit(run)
    loaders = looks.loaders
    if not isinstance(loaders, CombinedLoader):
        loaders = CombinedLoader(loaders, "max_size_cycle")
    of_each = [samples_of(loader, given) for loader in loaders.flattened]
    known = [samples for samples in of_each if samples is not None]
    mode: Any = loaders._mode
    del run, loaders
    release_memory()
    if not known or (len(known) < len(of_each) and mode != "min_size"):
        return looks, None
    samples = parts * (min(known) if mode == "min_size" else max(known))
    if samples == 0:
        raise Refused(
            "tuner.batch_size needs training data, got a loader of 0 samples; look at the data "
            "and its sampler"
        )
    return looks, samples


def samples_of(loader: Any, given: float | None = None) -> int | None:
    """Samples that a loader serves in an epoch, by its sampler; None where it does not tell.

    Args:
        given: the size of a batch by its key. A sampler of the user's whose batches have another
            one counts something else, as tokens, of which the samples are no bound.
    """
    batches = getattr(loader, "batch_sampler", None)
    try:
        is_iterable = isinstance(getattr(loader, "dataset", None), IterableDataset)
        if type(batches) is BatchSampler and not is_iterable:
            return len(batches.sampler)  # type: ignore[arg-type]
        size = micro_batch_size(loader)
        if size is not None:
            return min([len(loader) * size, *_length(getattr(loader, "dataset", None))])
        if isinstance(loader, DataLoader) and batches is not None:
            sizes = [len(batch) for batch in islice(batches, MANY_BATCHES)]
            counts_others = given is not None and len(sizes) > 1 and max(sizes) != given
            return None if counts_others else sum(sizes)
    except TypeError:  # without a length
        return None
    return None


def _length(dataset: Any) -> list[int]:
    return [len(dataset)] if hasattr(dataset, "__len__") else []


def longest_first_of_all(loaders: Any) -> Any:
    """Training loaders that serve the longest samples first, where lengths differ: the worst."""

    def one(loader: Any) -> Any:
        return longest_first(loader) if type(loader) is DataLoader else loader

    if isinstance(loaders, CombinedLoader):
        loaders.flattened = [one(loader) for loader in loaders.flattened]
        return loaders
    return tree_map(one, loaders)


def longest_first(loader: DataLoader[Any], *, limit_s: float = 2.0) -> DataLoader[Any]:
    """A loader whose every batch is of the longest samples; the same one where all are alike, or
    where it draws no batches of `batch_size` samples.

    Looks for `limit_s` seconds at the samples that its sampler draws.
    """
    is_iterable = isinstance(loader.dataset, IterableDataset)
    if is_iterable or type(loader.batch_sampler) is not BatchSampler:
        return loader
    until = time.monotonic() + limit_s
    lengths = []
    for index in loader.sampler:
        lengths.append((num_elements(loader.dataset[index]), index))
        if time.monotonic() > until:
            break
    lengths.sort(key=lambda found: -found[0])
    if not lengths or lengths[0][0] == lengths[-1][0]:
        return loader
    longest = [index for _, index in lengths[: loader.batch_size]]
    return rebuilt(loader, batch_sampler=[longest] * len(loader))


def shapes_of(batch: Any) -> list[list[int]] | None:
    """The shapes of all that a batch holds; None where it holds an object that does not tell."""
    found: list[list[int]] = []
    for leaf in tree_leaves(batch):
        inner = shapes_of(vars(leaf)) if is_dataclass(leaf) else None
        if inner is not None:
            found += inner
        elif hasattr(leaf, "shape"):
            found.append([int(size) for size in leaf.shape])
        elif leaf is None or isinstance(leaf, int | float | str | bytes):
            found.append([])
        else:
            return None
    return found


class FirstBatch(pl.Callback):
    """Notes what the first batch of an evaluation holds."""

    def __init__(self) -> None:
        self.shapes: list[list[int]] | None = None

    def on_test_batch_start(self, *args: Any) -> None:
        self.shapes = shapes_of(args[2])

    def on_validation_batch_start(self, *args: Any) -> None:
        self.on_test_batch_start(*args)

    def on_predict_batch_start(self, *args: Any) -> None:
        self.on_test_batch_start(*args)


def num_elements(sample: Any) -> int:
    """Numbers in all tensors and sequences of a sample."""
    if isinstance(sample, torch.Tensor):
        return sample.numel()
    if isinstance(sample, str | bytes):
        return len(sample)
    if isinstance(sample, Mapping):
        return sum(num_elements(value) for value in sample.values())
    if isinstance(sample, Sequence):
        return sum(num_elements(value) for value in sample)
    size = getattr(sample, "size", 1)
    return size if isinstance(size, int) else 1

"""What the training data and the accumulation allow a micro-batch to be, and what one changes."""

import math
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import CombinedLoader
from torch.optim import LBFGS
from torch.utils.data import BatchSampler, DataLoader

from app.accumulate import Accumulation, ConstantAccumulation, EffectiveBatch
from app.config import FACTOR, SINGLE, Config, is_single
from app.errors import Refused
from app.parallel.split import micro_batch_size
from app.run.build import build_techniques, holds_whole_model
from app.tuner.keys import LR_KEYS, shares, value_at
from app.tuner.throwaway import Steps, end, fit, release_memory, throwaway

if TYPE_CHECKING:
    from conf.tuner.schema import BatchSize

LARGEST = 8192
"""Where a search ends that neither a key nor the data bounds."""

MANY_BATCHES = 100_000
"""Batches of a sampler of the user's whose sizes are counted."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the configuration trains on as it is.

    Attributes:
        samples: of an epoch, over all ranks; None where the data do not tell.
        accumulates: whether the model lets gradients be accumulated.
        factor: micro-batches of the first optimizer step; None where no object tells.
        total: samples of a rank that the micro-batches of a step must add up to; None for any.
        is_solved: whether the factor follows the micro-batch by itself.
    """

    samples: int | None
    accumulates: bool
    factor: int | None
    total: int | None
    is_solved: bool


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
        end(trainer)


def given(config: Config, settings: "BatchSize", *, key: str) -> Given:
    """Build what a configuration trains, and look at it."""
    looks, samples = _look(config)
    found = next((c for c in build_techniques(config) if isinstance(c, Accumulation)), None)
    factor = _first_factor(config, found)
    total = None
    if isinstance(found, EffectiveBatch):
        total = found.batch_size // (shares(config.plain) or 1)
    elif settings.effective == "keep" and looks.accumulates and factor is not None:
        total = value_at(config.plain, key) * factor
    return Given(
        samples=samples,
        accumulates=looks.accumulates,
        factor=factor,
        total=total,
        is_solved=isinstance(found, EffectiveBatch),
    )


def num_samples(config: Config) -> int | None:
    """Samples of an epoch, over all ranks; None where the data do not tell.

    Raises Refused where there are none.
    """
    return _look(config)[1]


def _look(config: Config) -> tuple[Looks, int | None]:
    looks = Looks()
    num_ranks, parts = None, shares(config.plain) or 1
    if not is_single(config.strategy) and holds_whole_model(config):
        num_ranks, parts = parts, 1
        config = config.but(strategy={"_target_": SINGLE})
    run = throwaway(config, steps=looks, validates=False, num_ranks=num_ranks, served=looks.serves)
    fit(run)
    loaders = looks.loaders
    if not isinstance(loaders, CombinedLoader):
        loaders = CombinedLoader(loaders, "max_size_cycle")
    of_each = [samples_of(loader) for loader in loaders.flattened]
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


def samples_of(loader: Any) -> int | None:
    """Samples that a loader serves in an epoch, by its sampler; None where it does not tell."""
    batches = getattr(loader, "batch_sampler", None)
    try:
        if isinstance(loader, DataLoader) and type(batches) is BatchSampler:
            return len(batches.sampler)  # type: ignore[arg-type]
        size = micro_batch_size(loader)
        if size is not None:
            return min([len(loader) * size, *_length(getattr(loader, "dataset", None))])
        if isinstance(loader, DataLoader) and batches is not None:
            return sum(len(batch) for batch in islice(batches, MANY_BATCHES))
    except TypeError:  # without a length
        return None
    return None


def _length(dataset: Any) -> list[int]:
    return [len(dataset)] if hasattr(dataset, "__len__") else []


def _first_factor(config: Config, found: Accumulation | None) -> int | None:
    """The factor of a run that is the same throughout; None where no object tells one."""
    if config.accumulate is None:
        return 1
    return found.factor if isinstance(found, ConstantAccumulation) else None


def largest_allowed(
    config: Config, settings: "BatchSize", about: Given, *, key: str
) -> tuple[int, str]:
    """The largest micro-batch that is allowed, and why."""
    bounds = []
    if settings.max_val is not None:
        bounds.append((settings.max_val, "tuner.batch_size.max_val is reached"))
    if about.samples is not None:
        size = max(1, about.samples // (settings.min_batches * (shares(config.plain) or 1)))
        bounds.append(
            (
                size,
                f"the data set has {about.samples} samples, and an epoch at least "
                f"tuner.batch_size.min_batches={settings.min_batches} micro-batches",
            )
        )
    if settings.effective == "keep" and not about.accumulates:
        why = "the model steps by itself, which no accumulation makes up for"
        bounds.append((value_at(config.plain, key), why))
    return min(bounds, default=(LARGEST, f"a search without a bound ends at {LARGEST}"))


def made_up_for(
    config: Config, settings: "BatchSize", about: Given, *, key: str, size: int
) -> tuple[dict[str, Any], str]:
    """The overrides that go with a micro-batch, and what it changes, in a line; empty for nothing.

    By `effective` the accumulation keeps the effective batch, or the learning rate follows it.
    """
    before = value_at(config.plain, key)
    overrides: dict[str, Any] = {}
    if about.factor is None:
        return overrides, "" if about.is_solved or size == before else f"batch {before} -> {size}"
    factor = about.factor if about.total is None else about.total // size
    if factor != about.factor:
        overrides[FACTOR] = factor
    if size == before and not overrides:
        return overrides, ""
    world = shares(config.plain) or 1
    old, new = before * about.factor * world, size * factor * world
    said = f"batch {before} -> {size}"
    steps = [_steps(config, about.samples, batch=n * world, factor=f)
             for n, f in ((before, about.factor), (size, factor))]  # fmt: skip
    if None not in steps:
        said += f": {steps[0]} -> {steps[1]} optimizer steps"
    said += f", effective batch {old}" + (f" -> {new}" if new != old else " as before")
    assert config.tuner is not None
    if settings.effective == "root" and config.tuner.lr is None and new != old:
        name = next((n for n in LR_KEYS if isinstance(value_at(config.plain, n), float)), None)
        if name is None:
            said += "; no key holds the learning rate, which stays"
        else:
            lr = value_at(config.plain, name)
            overrides[name] = float(f"{lr * math.sqrt(new / old):.3g}")
            said += f", {name} {lr:g} -> {overrides[name]:g} with its root"
    return overrides, said


def _steps(config: Config, samples: int | None, *, batch: int, factor: int) -> int | None:
    """Optimizer steps of a run; None where neither data nor limits tell."""
    epochs, limit = config.trainer.max_epochs, config.trainer.limit_train_batches
    if samples is None or epochs is None:
        return config.trainer.max_steps
    batches = math.ceil(samples / batch)
    if limit is not None:
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    steps = epochs * math.ceil(batches / factor)
    return min(steps, config.trainer.max_steps or steps)

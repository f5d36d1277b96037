"""What the training data and the accumulation allow a micro-batch to be, and what one changes."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app.accumulate import Accumulation, ConstantAccumulation, EffectiveBatch
from app.config import FACTOR, Config
from app.run.build import build_techniques
from app.throwaway.samples import look
from app.tuner.keys import LR_KEYS, shares, value_at

if TYPE_CHECKING:
    from conf.tuner.schema import BatchSize

LARGEST = 8192
"""Where a search ends that neither a key nor the data bounds."""


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


def given(config: Config, settings: "BatchSize", *, key: str) -> Given:
    """Build what a configuration trains, and look at it."""
    looks, samples = look(config, shares(config.plain), value_at(config.plain, key))
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
    epochs, limit = config.trainer.max_epochs, config.train_limit
    if samples is None or epochs is None:
        return config.trainer.max_steps
    batches = math.ceil(samples / batch)
    if limit is not None:
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    steps = epochs * math.ceil(batches / factor)
    return min(steps, config.trainer.max_steps or steps)

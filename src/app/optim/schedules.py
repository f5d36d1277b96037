"""The learning rate over the run, in place of the model's own schedules."""

import math
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from inspect import signature
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import LRSchedulerConfigType
from torch.optim import Optimizer, lr_scheduler

from app.errors import Refused
from app.monitored import mode_of
from app.process.targets import BESIDE, given_by_run, located, makes_itself

MakeSchedule = Callable[[Optimizer, pl.Trainer], LRSchedulerConfigType]


def warmup_decay(step: int, *, shape: str, warmup: int, final: float, total: int) -> float:
    """Multiplier of the peak learning rate at an optimizer step, counted from 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if shape == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    left = (1 + math.cos(math.pi * done)) / 2 if shape == "cosine" else 1 - done
    return final + (1 - final) * left


class WarmupDecay:
    """A linear warm-up, then a cosine, a line or a constant; once per optimizer step.

    Args:
        shape: cosine, linear or constant.
        warmup: optimizer steps (int) or share of the run (float).
        final: share of the peak at the end, 0 to 1.
    """

    def __init__(self, *, shape: str, warmup: int | float, final: float) -> None:
        self.shape = shape
        self.warmup = warmup
        self.final = final

    def __call__(self, optimizer: Optimizer, total: int) -> LRSchedulerConfigType:
        warmup = self.warmup if isinstance(self.warmup, int) else round(self.warmup * total)
        if warmup >= total:
            raise Refused(
                f"scheduler.warmup must be below the {total} optimizer steps of the run, "
                f"got {warmup}; type scheduler.warmup=0.05"
            )

        def multiplier(step: int) -> float:
            return warmup_decay(
                step, shape=self.shape, warmup=warmup, final=self.final, total=total
            )

        return _by("step", lr_scheduler.LambdaLR(optimizer, multiplier))


DECAYS: dict[str, Callable[[float], float]] = {
    "sqrt": lambda done: 1 - math.sqrt(done),
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}
"""What is left of the rate, from 1 to 0, by the share of a decay that is done."""


def warmup_stable_decay(
    step: int, *, shape: str, warmup: int, decay: int, final: float, total: int
) -> float:
    """Multiplier of the peak learning rate at an optimizer step, counted from 0.

    `final` belongs to step `total`, which the run does not make: its last one is a step short of
    it, as torchtitan's and timm's are.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, max(0, step - (total - decay)) / decay)
    return 1.0 if done == 0 else final + (1 - final) * DECAYS[shape](done)


class WarmupStableDecay:
    """A linear warm-up, a constant, and a decay that ends with the run; once per optimizer step.

    Source: arXiv 2404.06395; 1 - sqrt: arXiv 2405.18392.

    Args:
        shape: sqrt, linear or cosine: how the rate falls.
        warmup, decay: optimizer steps (int) or share of the run (float).
        final: share of the peak at the end, 0 to 1.
    """

    def __init__(
        self, *, shape: str, warmup: int | float, decay: int | float, final: float
    ) -> None:
        self.shape = shape
        self.warmup = warmup
        self.decay = decay
        self.final = final

    def __call__(self, optimizer: Optimizer, total: int) -> LRSchedulerConfigType:
        warmup = self.warmup if isinstance(self.warmup, int) else round(self.warmup * total)
        decay = self.decay if isinstance(self.decay, int) else max(1, round(self.decay * total))
        if warmup + decay > total:
            raise Refused(
                f"scheduler.warmup and scheduler.decay must be at most the {total} optimizer steps "
                f"of the run, got {warmup} + {decay}; type scheduler.warmup=0.05 "
                "scheduler.decay=0.2"
            )
        settings = {"warmup": warmup, "decay": decay, "final": self.final, "total": total}

        def multiplier(step: int) -> float:
            return warmup_stable_decay(step, shape=self.shape, **settings)  # type: ignore[arg-type]

        return _by("step", lr_scheduler.LambdaLR(optimizer, multiplier))


class OneCycle:
    """The 1cycle policy (arXiv 1708.07120); once per optimizer step.

    Args:
        peak: share of the run at which the peak, the optimizer's learning rate, is reached.
        start_divisor: the start is the peak over this.
        final_divisor: the end is the start over this.
    """

    def __init__(self, *, peak: float, start_divisor: float, final_divisor: float) -> None:
        self.peak = peak
        self.start_divisor = start_divisor
        self.final_divisor = final_divisor

    def __call__(self, optimizer: Optimizer, total: int) -> LRSchedulerConfigType:
        defaults = optimizer.defaults
        schedule = lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            total_steps=total,
            pct_start=self.peak,
            div_factor=self.start_divisor,
            final_div_factor=self.final_divisor,
            cycle_momentum=bool(defaults.get("momentum") or defaults.get("betas")),
        )
        return _by("step", schedule)


class Steps:
    """Multiply the learning rate by `gamma` at the epochs `milestones`, counted from 0."""

    def __init__(self, *, milestones: Sequence[int], gamma: float) -> None:
        self.milestones = list(milestones)
        self.gamma = gamma

    def __call__(self, optimizer: Optimizer, total: int) -> LRSchedulerConfigType:
        return _by("epoch", lr_scheduler.MultiStepLR(optimizer, self.milestones, self.gamma))


class Plateau:
    """Multiply by `factor` after `patience` measured epochs in which `monitor` did not improve."""

    def __init__(self, *, monitor: str, mode: str, factor: float, patience: int) -> None:
        self.monitor = monitor
        self.mode = mode
        self.factor = factor
        self.patience = patience

    def __call__(self, optimizer: Optimizer, total: int) -> LRSchedulerConfigType:
        schedule = lr_scheduler.ReduceLROnPlateau(
            optimizer, "max" if self.mode == "max" else "min", self.factor, self.patience
        )
        return {**_by("epoch", schedule), "monitor": self.monitor, "reduce_on_plateau": True}


def _by(interval: str, schedule: lr_scheduler.LRScheduler) -> LRSchedulerConfigType:
    return {"scheduler": schedule, "interval": interval, "frequency": 1}


def total_steps(trainer: pl.Trainer) -> int:
    """The optimizer steps of the run. Raises Refused where nothing tells them."""
    steps = trainer.estimated_stepping_batches
    if steps == math.inf:
        raise Refused(
            "scheduler needs the number of optimizer steps, and neither the data nor the limits "
            "tell it; type trainer.max_steps=1000, or use scheduler=none"
        )
    return int(steps)


def total_epochs(trainer: pl.Trainer) -> int:
    """The epochs of the run. Raises Refused where nothing bounds them."""
    if trainer.max_epochs in (None, -1):
        raise Refused(
            "scheduler needs the number of epochs, which nothing bounds; type "
            "trainer.max_epochs=30, or total_steps with scheduler.interval=step"
        )
    return int(trainer.max_epochs or 0)


LENGTHS = {"total_steps": total_steps, "total_epochs": total_epochs}
"""Words that stand for the length of the run among the settings of a schedule."""


def with_lengths(settings: Any, trainer: pl.Trainer) -> Any:
    """Settings in plain containers, each word of `LENGTHS` replaced by the number.

    Raises Refused where a word is nearly one.
    """
    if isinstance(settings, Mapping):
        return {key: with_lengths(value, trainer) for key, value in settings.items()}
    if isinstance(settings, list):
        return [with_lengths(value, trainer) for value in settings]
    if isinstance(settings, str) and settings not in LENGTHS:
        for near in get_close_matches(settings, LENGTHS, n=1, cutoff=0.8):
            raise Refused(f"scheduler: {settings} is no length of the run; did you mean {near}?")
    is_word = isinstance(settings, str) and settings in LENGTHS
    return LENGTHS[settings](trainer) if is_word else settings


def schedule_of(config: Mapping[str, Any], make: Callable[[Any], Any]) -> MakeSchedule:
    """What makes the schedule of a configuration.

    Args:
        config: names a class whose objects make a schedule of an optimizer and the number of
            steps, as those here, or anything that makes one of an optimizer, as torch's classes;
            then with `interval`, `frequency` and `monitor`, as Lightning reads them, and with the
            words of `LENGTHS`.
        make: instantiates what a mapping names.
    """
    found = located("scheduler", config["_target_"])
    theirs = set(BESIDE["scheduler"]) - set(signature(found).parameters)
    settings = {key: value for key, value in config.items() if key not in theirs}
    if makes_itself(found, config):
        ours = make(settings)
        return lambda optimizer, trainer: ours(optimizer, total_steps(trainer))
    when = {"interval": config.get("interval", "epoch"), "frequency": config.get("frequency", 1)}
    if isinstance(found, type) and issubclass(found, lr_scheduler.ReduceLROnPlateau):
        when["monitor"] = config.get("monitor")
        settings.setdefault("mode", _mode(config))
    name = given_by_run("scheduler", found)

    def schedule(optimizer: Optimizer, trainer: pl.Trainer) -> LRSchedulerConfigType:
        ready = make({**with_lengths(settings, trainer), "_partial_": True})
        given = {key: _parts(value, optimizer) for key, value in ready.keywords.items()}
        given |= {name: optimizer} if name else {}
        made: Any = {"scheduler": ready.func(*ready.args, **given), **when}
        return made  # type: ignore[no-any-return]

    return schedule


def _parts(value: Any, optimizer: Optimizer) -> Any:
    """An argument, in which what takes an optimizer, as a part of a SequentialLR, is given it."""
    if isinstance(value, list):
        return [_parts(item, optimizer) for item in value]
    return value(optimizer) if isinstance(value, partial) else value


def _mode(config: Mapping[str, Any]) -> str:
    """Which way the metric of a plateau is better. Raises Refused where nothing tells it."""
    monitor = config.get("monitor")
    if monitor is None:
        raise Refused(
            "scheduler.monitor is required by ReduceLROnPlateau; type scheduler.monitor=val_loss"
        )
    mode = config.get("mode") or mode_of(monitor)
    if mode is None:
        raise Refused(
            f"scheduler.mode must be min or max where scheduler.monitor={monitor}, a name that "
            "does not tell which values are better; type +scheduler.mode=max"
        )
    return str(mode)

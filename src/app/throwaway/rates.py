"""Another learning rate in mid-run: for the optimizer, and for the schedules that compute it."""

import copy
import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from app.config import Config

IN_GROUPS = ("lr", "initial_lr", "max_lr", "min_lr")
"""Entries of a parameter group that schedules compute the learning rate from."""

IN_SCHEDULES = ("base_lrs", "max_lrs", "min_lrs", "default_min_lr", "eta_min", "_last_lr")
"""Attributes of the schedules of torch that are learning rates."""

NUM_STEPS = 20
"""Of the schedules, that are looked ahead."""


def is_torchs(config: Config, key: str) -> bool:
    """Whether a key is the rate of an optimizer of torch's, which is known to follow it."""
    optimizer = config.plain["optimizer"] or {}
    return key == "optimizer.lr" and str(optimizer.get("_target_", "")).startswith("torch.optim.")


def scale_rates(trainer: pl.Trainer, multiplier: float) -> str | None:
    """Multiply the learning rates of all groups, and all that their schedules make of them.

    Returns None, or the class of a schedule that would not go on from the multiplied rates, as a
    schedule of the user's may not: then nothing is changed. It is tried before, on copies without
    weights.
    """
    configs = trainer.lr_scheduler_configs
    for optimizer in trainer.optimizers:
        mine = [config for config in configs if config.scheduler.optimizer is optimizer]
        try:
            before, after = (_ahead(trainer, optimizer, mine, by) for by in (1.0, multiplier))
        except Exception:  # a class of the user's: of what cannot be tried nothing is known
            return _name(mine)
        is_scaled = len(before) == len(after) and all(
            math.isclose(rate * multiplier, scaled, rel_tol=1e-6, abs_tol=1e-30)
            for rate, scaled in zip(before, after, strict=True)
        )
        if not is_scaled:
            return _name(mine)
    for optimizer in trainer.optimizers:
        _scale(
            optimizer,
            (c.scheduler for c in configs if c.scheduler.optimizer is optimizer),
            multiplier,
        )
    return None


def number(lr: Any) -> float:
    """A learning rate; 0 where an optimizer, as Adafactor may, has none."""
    return 0.0 if lr is None else float(lr)


def set_rate(group: dict[str, Any], lr: float) -> None:
    """Set the learning rate of a parameter group, which may keep it in a tensor."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def _scale(optimizer: Optimizer, schedules: Iterable[Any], multiplier: float) -> None:
    for group in optimizer.param_groups:
        for name in IN_GROUPS:
            if name in group:
                group[name] = _times(group[name], multiplier)
    for schedule in (part for whole in schedules for part in _parts(whole)):
        for name in IN_SCHEDULES:
            if hasattr(schedule, name):
                setattr(schedule, name, _times(getattr(schedule, name), multiplier))


def _parts(schedule: Any) -> Iterator[Any]:
    """A schedule and those in it."""
    yield schedule
    for part in getattr(schedule, "_schedulers", ()):
        yield from _parts(part)


def _times(value: Any, multiplier: float) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_times(item, multiplier) for item in value)
    if isinstance(value, Tensor):
        return value.mul_(multiplier)  # a compiled step reads this one
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value * multiplier if is_number else value


def _ahead(
    trainer: pl.Trainer, optimizer: Optimizer, configs: list[LRSchedulerConfig], multiplier: float
) -> list[float]:
    """The rates of the next steps of the schedules, multiplied, as far as they go."""
    twin = SGD([{"params": [torch.zeros(1)]} for _ in optimizer.param_groups], lr=1.0)
    twin.defaults = dict(optimizer.defaults)
    for mine, theirs in zip(twin.param_groups, optimizer.param_groups, strict=True):
        mine |= {k: copy.deepcopy(value) for k, value in theirs.items() if k != "params"}
    memo: dict[int, Any] = {id(optimizer): twin}
    schedules = [copy.deepcopy(config.scheduler, memo) for config in configs]
    _scale(twin, schedules, multiplier)
    rates: list[float] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the twin makes no steps
        for _ in range(NUM_STEPS):
            rates += [float(group["lr"]) for group in twin.param_groups]
            try:
                for config, schedule in zip(configs, schedules, strict=True):
                    monitors = config.reduce_on_plateau or isinstance(schedule, ReduceLROnPlateau)
                    metric = torch.tensor(0.0) if monitors else None
                    trainer.lightning_module.lr_scheduler_step(schedule, metric)
            except ValueError:  # the end of a schedule of given length
                break
    return rates


def _name(configs: list[LRSchedulerConfig]) -> str:
    return " and ".join(type(config.scheduler).__name__ for config in configs)

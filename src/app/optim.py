"""Optimizer and schedule of a run, in place of the model's own `configure_optimizers`."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import LRSchedulerConfigType
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from app.errors import Refused

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
MakeSchedule = Callable[[Optimizer, int], LRSchedulerConfigType]


def configure_optimizers(
    model: pl.LightningModule, make_optimizer: MakeOptimizer, make_schedule: MakeSchedule | None
) -> dict[str, Any]:
    """What `configure_optimizers` returns: an optimizer over all parameters and its schedule.

    Frozen parameters are in it: without a gradient they do not move, and unfreezing them works.
    """
    optimizer = make_optimizer(model.parameters())
    if make_schedule is None:
        return {"optimizer": optimizer}
    steps = model.trainer.estimated_stepping_batches
    if steps == math.inf:
        raise Refused(
            "scheduler needs the number of optimizer steps, and neither the data nor the limits "
            "tell it; type trainer.max_steps=1000, or use scheduler=none"
        )
    return {"optimizer": optimizer, "lr_scheduler": make_schedule(optimizer, int(steps))}


class AdamW8bit:
    """AdamW of bitsandbytes, whose moments are of 8 bits (arXiv 2110.02861).

    Args:
        min_8bit_size: smaller tensors keep moments of 32 bits.
        The others are AdamW's.
    """

    def __init__(
        self,
        *,
        lr: float,
        betas: Sequence[float],
        eps: float,
        weight_decay: float,
        min_8bit_size: int,
    ) -> None:
        self.lr = lr
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.min_8bit_size = min_8bit_size

    def __call__(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        from bitsandbytes.optim import AdamW8bit as Theirs  # optional, and slow to import

        optimizer: Optimizer = Theirs(
            parameters,
            lr=self.lr,
            betas=(self.betas[0], self.betas[1]),
            eps=self.eps,
            weight_decay=self.weight_decay,
            min_8bit_size=self.min_8bit_size,
        )
        return optimizer


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
    """Multiply by `factor` after `patience` epochs in which `monitor` did not improve."""

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

"""Optimizer and schedule of a run, in place of the model's own, and when schedules step."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import LRSchedulerConfig, LRSchedulerConfigType
from torch import Tensor, nn
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


class Watched:
    """Tells of a metric whether a validation measures it.

    Args:
        name: of the metric.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._before: Tensor | None = None

    def begin(self, trainer: pl.Trainer) -> None:
        """Note what is known before a validation."""
        self._before = trainer.callback_metrics.get(self.name)

    def is_measured(self, trainer: pl.Trainer) -> bool:
        """Whether the validation has measured it."""
        value, before = trainer.callback_metrics.get(self.name), self._before
        if value is None or before is None:
            return value is not None
        return value.data_ptr() != before.data_ptr()  # Lightning gives a new view each time


def epochs_done(trainer: pl.Trainer) -> int:
    """The epochs of a fit that are done, also while their last hooks are called."""
    return int(trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]


class Due(int):
    """The frequency of a schedule, which says itself whether the schedule is due.

    Lightning asks `index % frequency == 0`, with the index of a batch in its epoch or of an epoch,
    at the moments at which a schedule may step. The answer here counts optimizer steps over epochs;
    waits for the validation, where that measures what is monitored; and is given once a moment, of
    which a continued fit comes to some twice.

    Attributes:
        answered: the optimizer step or the epoch, from 1, of which it has been asked last.
    """

    answered = 0
    _of_validation = False
    _is_measured = False
    _has_validated = False
    _config: LRSchedulerConfig
    _trainer: pl.Trainer
    _watched: Watched

    @classmethod
    def of(cls, config: LRSchedulerConfig, trainer: pl.Trainer) -> "Due":
        """The frequency of a schedule of a trainer."""
        due = cls(config.frequency)
        due._config, due._trainer = config, trainer
        due._watched, due.answered = Watched(str(config.monitor)), due.now
        return due

    @property
    def now(self) -> int:
        """The optimizer steps or the epochs that are done."""
        if self._config.interval == "step":
            return self._trainer.global_step
        return epochs_done(self._trainer)

    def __rmod__(self, index: int) -> int:
        now = self.now
        if now == self.answered:
            return 1
        self.answered = now
        return 0 if now % int(self) == 0 and self._has_news() else 1

    def _has_news(self) -> bool:
        """Whether what is monitored was measured since; not known is for Lightning to say."""
        if not self._config.reduce_on_plateau:
            return True
        if self._of_validation:
            is_measured, self._is_measured = self._is_measured, False
            return is_measured
        is_awaited = self._trainer.enable_validation and not self._has_validated
        return self._config.monitor in self._trainer.callback_metrics or not is_awaited

    def validates(self) -> None:
        """Note that a validation begins."""
        self._watched.begin(self._trainer)

    def has_validated(self) -> None:
        """Note whether the validation has measured what is monitored."""
        self._has_validated = True
        if self._watched.is_measured(self._trainer):
            self._of_validation = self._is_measured = True

    def missed(self) -> None:
        """Step as Lightning would have after the checkpoint that the fit continues from."""
        value = self._trainer.callback_metrics.get(str(self._config.monitor))
        if 0 % self == 0 and value is not None:
            progress = self._trainer.fit_loop.epoch_loop.scheduler_progress
            progress.increment_ready()
            self._trainer.lightning_module.lr_scheduler_step(self._config.scheduler, value)
            progress.increment_completed()

    def state_dict(self) -> dict[str, Any]:
        """What a continued fit needs, in plain values."""
        return {
            # in a validation, after which it is asked, it was not yet
            "answered": None if self._trainer.validating else self.answered,
            "of_validation": self._of_validation,
            "is_measured": self._is_measured,
            "has_validated": self._has_validated,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        if state["answered"] is not None:
            self.answered = state["answered"]
        elif self._config.interval == "step":
            self.answered = self.now - 1
        self._of_validation = state["of_validation"]
        self._is_measured = state["is_measured"]
        self._has_validated = state["has_validated"]


class Schedules(pl.Callback):
    """Lets the schedules that Lightning steps wrongly step rightly; the others are left alone.

    Those are: monitored ones, of which a continued fit loses updates, and which fail after an epoch
    without a validation; and those of every n-th step, which count the micro-batches of an epoch.
    """

    def __init__(self) -> None:
        self._due: list[Due] = []
        self._restored: list[dict[str, Any]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not pl_module.automatic_optimization:
            return
        for config in trainer.lr_scheduler_configs:
            if config.reduce_on_plateau or (config.interval == "step" and config.frequency > 1):
                config.frequency = Due.of(config, trainer)
                self._due.append(config.frequency)
        restored, self._restored = self._restored, []
        for due, state in zip(self._due, restored, strict=bool(restored)):
            due.load_state_dict(state)
            if state["answered"] is not None and due.answered < due.now:
                due.missed()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for due in self._due:
            due.validates()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for due in self._due:
            due.has_validated()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._due:  # Lightning passes over them at the end of the epoch in which a fit continues
            trainer.fit_loop.restarting = False

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._due = []

    def state_dict(self) -> dict[str, Any]:
        return {"due": [due.state_dict() for due in self._due]} if self._due else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict["due"]

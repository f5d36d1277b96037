"""When the schedules of a fit step."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor


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

"""What a run measures while it trains, at the cost of one logger call in many steps."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from app.errors import Refused
from app.optim import rate_of
from app.parallel.split import mean_over_ranks
from app.record.loggers import MetricsCsv
from app.record.names import stage_of


@runtime_checkable
class HasStepMetrics(Protocol):
    """A callback that measures optimizer steps."""

    def step_metrics(self) -> Mapping[str, float]:
        """What happened since the last call; forgets it."""


class StepMetrics(pl.Callback):
    """Logs, every `trainer.log_every_n_steps` optimizer steps, their mean loss and the rates.

    `train_loss` is the mean over the micro-batches since the last line; `lr` the first parameter
    group's, but for its `lr_scale`. Every callback with `step_metrics()` adds its own. At the end
    of an epoch its mean loss becomes the metric `train_loss`, unless the model logs one itself.
    Lightning's `self.log` in each training step costs forty times as much.
    """

    def __init__(self) -> None:
        self._sources: list[HasStepMetrics] = []
        self._every_n_steps = 1
        self._reset()

    def _reset(self) -> None:
        self._losses: list[Tensor] = []
        self._epoch_loss = 0.0
        self._num_epoch_losses = 0
        self._num_steps = 0  # as the loggers count: two optimizers that step on a batch are one
        self._logged_step = 0
        self._global_step = 0
        self._model_logs_loss: bool | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._reset()
        for logger in _csv_files(trainer):
            if stage == "fit":
                logger.follow(trainer, partial(next_line, trainer))
            else:  # also after a fit of which nothing was left
                logger.begin(inside_epoch=_is_inside_epoch(trainer))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        self._sources = [c for c in callbacks if isinstance(c, HasStepMetrics)]
        self._every_n_steps = trainer.log_every_n_steps  # type: ignore[attr-defined]
        for logger in _csv_files(trainer):
            logger.begin(inside_epoch=_is_inside_epoch(trainer))

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if isinstance(outputs, dict) and "loss" in outputs:
            self._losses.append(outputs["loss"])
        if trainer.global_step != self._global_step:
            self._global_step = trainer.global_step
            self._num_steps += 1
            if self._num_steps - self._logged_step >= self._every_n_steps:
                self._log(trainer, line=next_line(trainer))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._num_steps > self._logged_step:
            self._log(trainer, line=next_line(trainer) - 1)  # the last batch has had its line
        if self._model_logs_loss is None:
            self._model_logs_loss = "train_loss" in trainer.callback_metrics
        if self._num_epoch_losses and not self._model_logs_loss:
            mean = self._epoch_loss / self._num_epoch_losses
            # not by `log`: a model that logs it too, as its epoch ends, comes after this
            trainer.callback_metrics["train_loss"] = torch.tensor(mean, device=pl_module.device)
        self._epoch_loss, self._num_epoch_losses = 0.0, 0

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # only the first rank writes: each then goes on with the mean
        self._losses = [mean_over_ranks(trainer, loss) for loss in self._losses]
        checkpoint["callbacks"][self.state_key]["losses"] = list(self._losses)

    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": list(self._losses),
            "epoch_loss": self._epoch_loss,
            "num_epoch_losses": self._num_epoch_losses,
            "num_steps": self._num_steps,
            "logged_step": self._logged_step,
            "global_step": self._global_step,
            "model_logs_loss": self._model_logs_loss,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._losses = state_dict["losses"]
        self._epoch_loss = state_dict["epoch_loss"]
        self._num_epoch_losses = state_dict["num_epoch_losses"]
        self._num_steps = state_dict["num_steps"]
        self._logged_step = state_dict["logged_step"]
        self._global_step = state_dict["global_step"]
        self._model_logs_loss = state_dict.get("model_logs_loss")

    def _log(self, trainer: pl.Trainer, *, line: int) -> None:
        self._logged_step = self._num_steps
        metrics = {
            name: value for source in self._sources for name, value in source.step_metrics().items()
        }
        if trainer.optimizers:
            rate = rate_of(trainer.optimizers[0])
            metrics |= {} if rate is None else {"lr": rate}
        if self._losses:
            total = float(mean_over_ranks(trainer, torch.stack(self._losses).sum()))
            metrics["train_loss"] = total / len(self._losses)
            self._epoch_loss += total
            self._num_epoch_losses += len(self._losses)
            self._losses = []
        metrics["epoch"] = trainer.current_epoch
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=line)
            logger.save()


def next_line(trainer: pl.Trainer) -> int:
    """Number of the line that Lightning logs next, from 0: of the batches that may step."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def _is_inside_epoch(trainer: pl.Trainer) -> bool:
    progress: Any = trainer.fit_loop.epoch_progress.current
    return bool(progress.processed < progress.ready)


def _csv_files(trainer: pl.Trainer) -> list[MetricsCsv]:
    return [logger for logger in trainer.loggers if isinstance(logger, MetricsCsv)]


class AwaitedMetrics(pl.Callback):
    """Ends a run whose configuration names a metric that it does not measure: not at its end, but
    after its first validation.

    Args:
        awaited: names of metrics, by the keys that hold them. One of the test is not waited for.
    """

    def __init__(self, awaited: Mapping[str, str]) -> None:
        self._awaited = {key: name for key, name in awaited.items() if stage_of(name) != "test"}
        self._has_validated = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._has_validated = True
        # EarlyStopping asks now, or after the epoch; what is left may be of the training
        asks_later = (trainer.val_check_interval, trainer.check_val_every_n_epoch) == (1.0, 1)
        self._refuse_missing(
            trainer,
            pl_module,
            lambda key, name: (
                stage_of(name) == "val"
                or (key == EARLY and not asks_later and stage_of(name) != "train")
            ),
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._has_validated and not is_overridden("on_train_epoch_end", pl_module):
            self._refuse_missing(trainer, pl_module, lambda key, name: True)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._has_validated:
            self._refuse_missing(trainer, pl_module, lambda key, name: True)

    def _refuse_missing(
        self,
        trainer: pl.Trainer,
        model: pl.LightningModule,
        is_due: Callable[[str, str], bool],
    ) -> None:
        measured = trainer.callback_metrics
        self._awaited = {k: name for k, name in self._awaited.items() if name not in measured}
        for key, name in self._awaited.items():
            if is_due(key, name):
                raise Refused(
                    f"{key} must be one of {', '.join(sorted(measured)) or 'no metric at all'}, "
                    f"which {type(model).__name__} logs, got {name}; type {key}=METRIC"
                )


EARLY = "callbacks.early_stopping.monitor"


def awaited_metrics(config: Mapping[str, Any]) -> dict[str, str]:
    """The metrics that a configuration names, and without which it fails, by their keys."""
    found = {
        "objective": config["objective"],
        EARLY: ((config["callbacks"] or {}).get("early_stopping") or {}).get("monitor"),
        "scheduler.monitor": (config["scheduler"] or {}).get("monitor"),
    }
    return {key: name for key, name in found.items() if name is not None}

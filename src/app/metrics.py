"""What a run measures while it trains, at the cost of one logger call in many steps."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from app.shares import mean_over_ranks


@runtime_checkable
class HasStepMetrics(Protocol):
    """A callback that measures optimizer steps."""

    def step_metrics(self) -> Mapping[str, float]:
        """What happened since the last call; forgets it."""


class StepMetrics(pl.Callback):
    """Logs, every `trainer.log_every_n_steps` optimizer steps, their mean loss and the rates.

    `train_loss` is the mean over the micro-batches since the last line; `lr` the first parameter
    group's. Every callback with `step_metrics()` adds its own. At the end of an epoch its mean
    loss becomes the metric `train_loss`, unless the model logs one itself. Lightning's `self.log`
    in each training step costs forty times as much.
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

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        self._sources = [c for c in callbacks if isinstance(c, HasStepMetrics)]
        self._every_n_steps = trainer.log_every_n_steps  # type: ignore[attr-defined]

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
                self._log(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._num_steps > self._logged_step:
            self._log(trainer)
        if self._model_logs_loss is None:
            self._model_logs_loss = "train_loss" in trainer.callback_metrics
        if self._num_epoch_losses and not self._model_logs_loss:
            mean = self._epoch_loss / self._num_epoch_losses
            # the loggers have every line of it
            pl_module.log("train_loss", mean, logger=False, sync_dist=trainer.world_size > 1)
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
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._losses = state_dict["losses"]
        self._epoch_loss = state_dict["epoch_loss"]
        self._num_epoch_losses = state_dict["num_epoch_losses"]
        self._num_steps = state_dict["num_steps"]
        self._logged_step = state_dict["logged_step"]
        self._global_step = state_dict["global_step"]

    def _log(self, trainer: pl.Trainer) -> None:
        self._logged_step = self._num_steps
        metrics = {
            name: value for source in self._sources for name, value in source.step_metrics().items()
        }
        if trainer.optimizers:
            metrics["lr"] = float(trainer.optimizers[0].param_groups[0]["lr"])
        if self._losses:
            total = float(mean_over_ranks(trainer, torch.stack(self._losses).sum()))
            metrics["train_loss"] = total / len(self._losses)
            self._epoch_loss += total
            self._num_epoch_losses += len(self._losses)
            self._losses = []
        metrics["epoch"] = trainer.current_epoch
        for logger in trainer.loggers:
            # Lightning numbers the line of a step from 0
            logger.log_metrics(metrics, step=self._num_steps - 1)
            logger.save()


class MetricsCsv(Logger):
    """One line per logged optimizer step, a column per metric, in `metrics.csv`.

    Lightning's CSVLogger deletes the file when a run is continued; here the lines before the first
    step that is logged again stay.

    Args:
        save_dir: folder of the file.
    """

    def __init__(self, *, save_dir: str) -> None:
        super().__init__()
        self.path = Path(save_dir) / "metrics.csv"
        self._columns: list[str] = []
        self._line: dict[str, Any] = {}
        self._line_start = 0

    @property
    def name(self) -> str:
        """Of the kind of logger."""
        return "metrics"

    @property
    def version(self) -> str:
        """Empty: a run has one file."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any) -> None:
        """Nothing: the configuration stands beside the file."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add to the line of an optimizer step, counted from 0."""
        assert step is not None
        if self._line.get("step") != step:
            self._line = {"step": step}
            self._line_start = self.path.stat().st_size if self._columns else 0
        self._line.update(metrics)

    @rank_zero_only
    def save(self) -> None:
        """Bring the file up to date."""
        if not self._line:
            return
        if not self._columns or not self._line.keys() <= set(self._columns):
            self._rewrite()
            return
        with self.path.open("r+", newline="") as file:
            file.seek(self._line_start)
            csv.DictWriter(file, self._columns).writerow(self._line)
            file.truncate()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Bring the file up to date."""
        self.save()

    def _rewrite(self) -> None:
        step = self._line["step"]
        lines = [line for line in _read_lines(self.path) if int(line["step"]) < step]
        self._columns = list(dict.fromkeys(name for line in [*lines, self._line] for name in line))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".part")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(lines)
            self._line_start = file.tell()
            writer.writerow(self._line)
        partial.replace(self.path)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a `metrics.csv`, without their empty cells; none where there is no file."""
    return [
        {name: float(cell) for name, cell in line.items() if cell} for line in _read_lines(path)
    ]


def _read_lines(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))

"""Models of others whose metrics have their peak in the second epoch."""

from typing import Any

import torch
from lightning.pytorch.callbacks import EarlyStopping
from scheduled import Scheduled
from torchmetrics import MeanMetric

PEAK = (0.5, 0.75, 0.625, 0.25, 0.5, 0.5, 0.5)


class Peaks(Scheduled):
    """Logs in every hook there is."""

    @property
    def peak(self) -> float:
        return PEAK[self.current_epoch]

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.log("step_score", self.peak, on_step=True, on_epoch=False)
        self.log("mean_acc", self.peak + (batch_idx - 2) / 64, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.log("late_acc", self.peak)
        self.log("train_peak_acc", self.peak)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("val_acc", self.peak)


class Stops(Peaks):
    """Ends its own fit in the second epoch."""

    num_validated = 0

    def on_validation_end(self) -> None:
        self.num_validated += 1

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.current_epoch == 1 and batch_idx == 2:
            self.trainer.should_stop = True
        return super().training_step(batch, batch_idx)


class FailsInTest(Peaks):
    """A test that fails as long as `is_broken`."""

    is_broken = True

    def test_step(self, batch: Any, batch_idx: int) -> None:
        if type(self).is_broken:
            raise OSError("the test set is gone")
        super().test_step(batch, batch_idx)


class StopsAndFails(FailsInTest, Stops):
    """Both."""


class Configured(FailsInTest):
    """Brings its own early stopping."""

    def configure_callbacks(self) -> Any:
        return EarlyStopping("val_acc", mode="max", patience=1)


class Logs(Scheduled):
    """Logs as others do: metrics of torchmetrics, other reductions, and not in every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.mean.update(loss.detach())
        self.log("metric_loss", self.mean, on_step=False, on_epoch=True)
        self.log("worst_loss", loss.detach(), on_step=False, on_epoch=True, reduce_fx="max")
        if batch_idx < 2:
            self.log("first_loss", loss.detach(), on_step=False, on_epoch=True)
        return loss

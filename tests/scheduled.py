"""Schedules as others write them: every class of torch, alone, in a row, chained and monitored."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

Make = Callable[[Optimizer], Any]


def halved(epoch: int) -> float:
    return 0.5**epoch


def shrinking(epoch: int) -> float:
    return 0.9


def in_a_row(optimizer: Optimizer, *, first: Make, second: Make, at: int) -> Any:
    return lr_scheduler.SequentialLR(optimizer, [first(optimizer), second(optimizer)], [at])


TORCH: dict[str, Make] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, halved),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, shrinking),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.25, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.2, 1.0, 4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 40, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5, 0.001),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, mode="triangular2"),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=60),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, "max", 0.7, 0),
    "SequentialLR": lambda o: in_a_row(
        o,
        first=lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 3),
        second=lambda o: lr_scheduler.MultiStepLR(o, [2, 4], 0.5),
        at=2,
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [
            lr_scheduler.ConstantLR(o, 0.5, 2),
            in_a_row(
                o,
                first=lambda o: lr_scheduler.ExponentialLR(o, 0.9),
                second=lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
                at=3,
            ),
        ],
        optimizer=o,
    ),
}  # fmt: skip
"""A way to make each; a class that torch adds fails the test that reads its module."""


class Own:
    """A schedule that is none of torch's: halves the rate at every third worse metric."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.seen: list[float] = []

    def advance(self, metric: Any) -> None:
        self.seen.append(-1.0 if metric is None else float(metric))
        if len(self.seen) % 3 == 0:
            for group in self.optimizer.param_groups:
                group["lr"] *= 0.5

    def state_dict(self) -> dict[str, Any]:
        return {"seen": list(self.seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = list(state["seen"])


class Scheduled(pl.LightningModule):
    """A line through points; keeps the rate of each batch."""

    def __init__(
        self,
        scheduler: str = "StepLR",
        interval: str = "epoch",
        frequency: int = 1,
        monitor: str | None = None,
        strict: bool = True,
        nested: bool = False,
    ) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.1), nn.Linear(4, 1))
        self.chosen = (scheduler, interval, frequency, monitor, strict, nested)
        self.rates: dict[int, float] = {}
        self.register_buffer("worst", torch.tensor(0.0))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        at = self.trainer.fit_loop.total_batch_idx
        self.rates[at] = float(self.trainer.optimizers[0].param_groups[0]["lr"])

    def _loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return (self.net(x) - y).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self._loss(batch)
        self.log("loss_of_step", loss.detach())
        self.log("mean_loss", loss.detach(), on_step=False, on_epoch=True)
        self.worst.copy_(torch.maximum(self.worst, loss.detach()))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self._loss(batch))

    def configure_optimizers(self) -> Any:
        scheduler, interval, frequency, monitor, strict, nested = self.chosen
        optimizer = torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.5)
        made = Own(optimizer) if scheduler == "Own" else TORCH[scheduler](optimizer)
        if nested:
            made = lr_scheduler.SequentialLR(
                optimizer, [lr_scheduler.ConstantLR(optimizer, 0.5, 2), made], [3]
            )
        chosen = {"scheduler": made, "interval": interval, "frequency": frequency}
        if monitor is not None:
            chosen |= {"monitor": monitor, "reduce_on_plateau": True, "strict": strict}
        return {"optimizer": optimizer, "lr_scheduler": chosen}


class Plain(Scheduled):
    """Has an optimizer of the configuration."""

    configure_optimizers = pl.LightningModule.configure_optimizers


class Late(Scheduled):
    """Logs at the end of an epoch."""

    def on_train_epoch_end(self) -> None:
        self.log("late_loss", self.worst.clone())
        self.worst.zero_()


class Adversarial(Scheduled):
    """Two optimizers, each with a schedule, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, schedule in zip(self.optimizers(), self.lr_schedulers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(self._loss(batch))
            optimizer.step()
            if isinstance(schedule, lr_scheduler.StepLR):
                schedule.step()

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.lr_schedulers()[1].step(self.trainer.callback_metrics["val_loss"])

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.SGD(self.net[i].parameters(), lr=0.02) for i in (0, 2)]
        names = "StepLR", "ReduceLROnPlateau"
        made = [TORCH[name](o) for name, o in zip(names, optimizers, strict=True)]
        return optimizers, [
            {"scheduler": made[0], "interval": "step", "frequency": 3},
            {"scheduler": made[1]},
        ]


class Hooked(Late):
    """Steps its schedules as it likes."""

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if isinstance(scheduler, Own):
            scheduler.advance(metric)
        elif metric is None:
            scheduler.step()
        else:
            scheduler.step(metric)


class Points(pl.LightningDataModule):
    def __init__(self, num_train: int = 20, batch_size: int = 4) -> None:
        super().__init__()
        self.num_train = num_train
        self.batch_size = batch_size

    def _loader(self, num: int, seed: int) -> DataLoader:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(num, 3, generator=generator)
        return DataLoader(
            TensorDataset(x, x.sum(1, keepdim=True)),
            batch_size=self.batch_size,
            shuffle=seed == 0,
        )

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.num_train, 0)

    def val_dataloader(self) -> DataLoader:
        return self._loader(8, 1)

    def test_dataloader(self) -> DataLoader:
        return self._loader(8, 2)

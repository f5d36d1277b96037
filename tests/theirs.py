"""A user's own model and data: plain Lightning, written without a thought of this project."""

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset


class Noisy(Dataset):
    """Ten features with an augmentation that draws from all three generators."""

    def __init__(self, num_samples: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(num_samples, 10, generator=generator)
        self.y = (self.x.sum(1) > 0).long()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.randn(10) + np.random.rand() + random.random()
        return self.x[index] + 0.1 * noise, self.y[index]


class Stream(IterableDataset):
    """The same without a length."""

    def __init__(self, num_samples: int) -> None:
        self.samples = Noisy(num_samples)

    def __iter__(self) -> Any:
        return (self.samples[index] for index in range(len(self.samples)))


class LitData(pl.LightningDataModule):
    def __init__(
        self,
        batch_size: int = 4,
        num_samples: int = 40,
        workers: int = 0,
        persistent: bool = False,
        stream: bool = False,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_samples = num_samples
        self.workers = workers
        self.persistent = persistent
        self.stream = stream

    def train_dataloader(self) -> DataLoader:
        dataset = Stream(self.num_samples) if self.stream else Noisy(self.num_samples)
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=not self.stream,
            num_workers=self.workers,
            persistent_workers=self.persistent,
        )

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Noisy(8), batch_size=4)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(Noisy(8), batch_size=4)


class TrainOnly(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(Noisy(40), batch_size=4)


class LitModel(pl.LightningModule):
    """Dropout, a logged loss, an optimizer and a schedule of its own."""

    def __init__(self, lr: float = 0.1, hidden: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(10, hidden), nn.ReLU(), nn.Dropout(0.2), nn.Linear(hidden, 2)
        )

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self.net(x), y))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("test_loss", nn.functional.cross_entropy(self.net(x), y))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.1, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class TwoOptimizers(LitModel):
    """Manual optimization: one optimizer per layer, both stepped on every batch."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr=lr)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first, last = self.net[0], self.net[3]
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (first, last)]

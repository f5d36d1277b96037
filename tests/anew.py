"""Data modules of others that make their loaders anew in each epoch."""

from typing import Any

import torch
from theirs import LitData, LitModel, Noisy
from torch.utils.data import DataLoader, Subset, random_split


class Resampled(LitData):
    """A random half of the samples, drawn anew in each epoch."""

    def train_dataloader(self) -> DataLoader:
        half, _ = random_split(Noisy(self.num_samples), [0.5, 0.5])
        return DataLoader(half, batch_size=self.batch_size, shuffle=True)


class Curriculum(LitData):
    """More samples in each epoch, in larger batches."""

    def train_dataloader(self) -> DataLoader:
        epoch = self.trainer.current_epoch
        seen = Subset(Noisy(self.num_samples), range(16 + 8 * epoch))
        return DataLoader(seen, batch_size=2 + epoch, shuffle=True, num_workers=self.workers)


class Streams(LitData):
    """A stream without a length, from another place in each epoch."""

    def train_dataloader(self) -> DataLoader:
        start = int(torch.randint(10, ()))
        return DataLoader(Subset(Noisy(40), range(start, start + 20)), batch_size=4, shuffle=True)


class Replay(LitData):
    """What the model has put aside, as in reinforcement learning."""

    def setup(self, stage: str) -> None:
        self.kept = torch.arange(self.num_samples)

    def train_dataloader(self) -> list[DataLoader]:
        order = torch.randperm(len(self.kept))[:20]
        return [
            DataLoader(Subset(Noisy(40), order.tolist()), batch_size=4),
            DataLoader(Noisy(12), batch_size=2, shuffle=True),
        ]


class TakesTwo(LitModel):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        first, second = batch
        return super().training_step(first, batch_idx) + super().training_step(second, batch_idx)

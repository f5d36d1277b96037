"""Tests of others that draw random numbers, from every generator there is."""

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from scheduled import Plain
from torch.utils.data import DataLoader, Dataset


class Drawn(Dataset):
    """Points with noise that is drawn anew each time, also from a generator of its own."""

    def __init__(self, num: int) -> None:
        self.num = num
        self.own = np.random.default_rng(num)

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> Any:
        noise = torch.rand(1) + random.random() + np.random.rand() + float(self.own.random())
        return torch.full((3,), float(index)) + noise, torch.ones(1)


class Data(pl.LightningDataModule):
    def __init__(self, workers: int = 0) -> None:
        super().__init__()
        self.workers = workers

    def setup(self, stage: str) -> None:
        self.drawn = {stage: Drawn(8), "validate": Drawn(4)}

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.drawn["fit"], batch_size=4, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.drawn["validate"], batch_size=4)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.drawn["test"], batch_size=2, num_workers=self.workers)


class Model(Plain):
    """Keeps its dropout in the test, as Monte Carlo dropout does; ends where it is told to."""

    ends: str | None = None

    def _end(self, place: str) -> None:
        if type(self).ends == place:
            raise KeyboardInterrupt(place)

    def on_test_start(self) -> None:
        self._end("before")

    def on_test_end(self) -> None:
        self._end("after")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self._end("inside")
        self.net.train()
        super().test_step(batch, batch_idx)

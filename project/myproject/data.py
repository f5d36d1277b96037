"""The data: plain Lightning. The arguments of the class are the keys `data.*`."""

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, random_split


def spirals(num_samples: int, noise: float) -> TensorDataset:
    """Points on three arms of a spiral, each with the number of its arm."""
    generator = torch.Generator().manual_seed(0)
    arm = torch.arange(num_samples) % 3
    radius = torch.rand(num_samples, generator=generator).sqrt()
    angle = 6 * radius + arm * 2 * torch.pi / 3
    x = radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    return TensorDataset(x + noise * torch.randn(x.shape, generator=generator), arm)


class Spirals(pl.LightningDataModule):
    """Train on 80 % of the samples, validate on 10 % and test on 10 %."""

    def __init__(self, batch_size: int, num_samples: int, noise: float, num_workers: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.batch_size = batch_size
        self.num_workers = num_workers
        generator = torch.Generator().manual_seed(0)
        samples = spirals(num_samples, noise)
        self.train, self.val, self.test = random_split(samples, [0.8, 0.1, 0.1], generator)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, self.batch_size, shuffle=True, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.val, self.batch_size, num_workers=self.num_workers)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.test, self.batch_size, num_workers=self.num_workers)

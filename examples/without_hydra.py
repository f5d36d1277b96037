"""The techniques without Hydra: python examples/without_hydra.py

1. in a Trainer of Lightning's own, as callbacks;
2. a whole run with objects: resumable, with exact counts, in a folder of its own.
"""

import sys
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import app


class Net(pl.LightningModule):
    """Any LightningModule."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.mse_loss(self.net(x), y))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def samples(seed: int, number: int) -> TensorDataset:
    """A function of eight numbers, with noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 8, generator=generator)
    noise = torch.randn(number, 1, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True).sin() + 0.1 * noise)


def main(max_epochs: int) -> None:
    """Train the same network twice."""
    techniques = ("averaging=ema", "clip=adaptive", "accumulate=constant", "accumulate.factor=2")
    train, val = samples(0, 512), samples(1, 128)

    # 1. the techniques alone, checked and in their order
    trainer = pl.Trainer(
        max_epochs=max_epochs, accelerator="cpu", logger=False, callbacks=app.callbacks(*techniques)
    )
    trainer.fit(Net(), DataLoader(train, 32, shuffle=True), DataLoader(val, 32))

    # 2. a run: the same name again goes on with it, or says what it came to
    model = Net()
    result = app.run(
        *techniques,
        f"trainer.max_epochs={max_epochs}",
        "trainer.accelerator=cpu",
        model=model,
        data=pl.LightningDataModule.from_datasets(train, val, batch_size=32),
        name="without_hydra",
    )
    assert result is not None
    print(f"val_loss {result['metrics']['val_loss']:.3f}; the weights are in `model`")


if __name__ == "__main__":  # where several processes train, each imports this file
    main(max_epochs=int(sys.argv[1]) if len(sys.argv) > 1 else 10)

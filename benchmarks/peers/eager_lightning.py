"""The default run of `app.train` as the lightning-hydra-template's users write it.

Everything is imported at the top, logged in each training step, and served sample by sample.
"""

import hydra
import lightning.pytorch as pl
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

Batch = tuple[Tensor, Tensor]


class Cnn(pl.LightningModule):
    """Three convolutions and a linear head."""

    def __init__(self, lr: float, momentum: float, channels: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 40)),
            nn.Conv1d(1, channels, 5, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv1d(channels, channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv1d(channels, channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(5 * channels, 10),
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._measure(batch, "train")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._measure(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._measure(batch, "test")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            self.parameters(), lr=self.hparams.lr, momentum=self.hparams.momentum
        )

    def _measure(self, batch: Batch, part: str) -> Tensor:
        x, y = batch
        logits = self.net(x)
        loss = F.cross_entropy(logits, y)
        self.log(f"{part}_loss", loss)
        self.log(f"{part}_acc", (logits.argmax(dim=1) == y).float().mean())
        return loss


class Mnist1d(pl.LightningDataModule):
    """The same arrays, in torch's DataLoader."""

    def __init__(self, path: str, batch_size: int, eval_batch_size: int) -> None:
        super().__init__()
        self.path = path
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size

    def setup(self, stage: str) -> None:
        with np.load(self.path) as file:
            self.parts = {
                part: TensorDataset(
                    torch.from_numpy(file[f"x_{part}"]),
                    torch.from_numpy(file[f"y_{part}"]).long(),
                )
                for part in ("train", "val", "test")
            }

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.parts["train"], batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.parts["val"], batch_size=self.eval_batch_size)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.parts["test"], batch_size=self.eval_batch_size)


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> None:
    """Fit and test, then draw a curve."""
    pl.seed_everything(cfg.seed, workers=True)
    model, data = instantiate(cfg.model), instantiate(cfg.data)
    loggers = [instantiate(logger) for logger in cfg.logger.values()]
    callbacks = [instantiate(callback) for callback in cfg.get("callbacks", {}).values()]
    trainer = instantiate(cfg.trainer, logger=loggers, callbacks=callbacks)
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data, ckpt_path="best")
    figure, axes = plt.subplots()
    axes.bar(list(trainer.callback_metrics), [float(v) for v in trainer.callback_metrics.values()])
    figure.savefig(f"{cfg.run_dir}/metrics.png")


if __name__ == "__main__":
    main()

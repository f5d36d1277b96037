"""A user's model whose ranks note in files which samples every micro-batch was made of."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class LitModel(pl.LightningModule):
    """Dropout draws other numbers on each rank; `step_s` seconds of waiting make a step longer, or
    as many as a file `pace` in the run's folder says.

    With `fails_on`, that rank raises in its third step, once the others are in it; with `killed` it
    is ended there, as the system does for want of memory.
    """

    def __init__(
        self, step_s: float = 0.0, fails_on: int | None = None, killed: bool = False
    ) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.step_s = step_s
        self.fails_on = fails_on
        self.killed = killed

    def wait(self) -> None:
        pace = Path(self.trainer.default_root_dir) / "pace"
        time.sleep(float(pace.read_text()) if pace.exists() else self.step_s)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.wait()
        if self.global_rank == self.fails_on and batch_idx == 3:
            if self.killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise LookupError("the data are gone")
        x, index = batch
        self.note(f"{self.global_step} {self.current_epoch} {' '.join(map(str, index.tolist()))}\n")
        return self.net(x).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.wait()
        self.log("val_loss", self.net(batch[0]).square().mean(), sync_dist=True)

    def note(self, line: str) -> None:
        attempt = os.environ.get("SLURM_RESTART_COUNT", "0")
        folder = Path(self.trainer.default_root_dir) / "seen"
        folder.mkdir(exist_ok=True)
        with (folder / f"{self.global_rank}-{attempt}").open("a") as file:
            file.write(line)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class LitData(pl.LightningDataModule):
    """`num_samples` numbered samples in shuffled batches, from `workers` processes."""

    def __init__(self, num_samples: int = 160, batch_size: int = 4, workers: int = 0) -> None:
        super().__init__()
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.workers = workers

    def loader(self, **options: Any) -> DataLoader:
        x = torch.randn(self.num_samples, 4, generator=torch.Generator().manual_seed(0))
        samples = TensorDataset(x, torch.arange(self.num_samples))
        return DataLoader(samples, self.batch_size, num_workers=self.workers, **options)

    def train_dataloader(self) -> DataLoader:
        return self.loader(shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self.loader()

"""Models and loaders as other people write them, for the finders."""

import random
from collections import deque
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning, EarlyStopping
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
)

from app.accumulate import Accumulation


def points(n: int = 96) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, generator=generator)
    return TensorDataset(x, x @ torch.arange(6.0) / 6 + 0.1 * torch.randn(n, generator=generator))


class Points(pl.LightningDataModule):
    def __init__(self, batch_size: int = 8, n: int = 96, table: str = ""):
        super().__init__()
        self.batch_size, self.n = batch_size, n

    def train_dataloader(self):
        return DataLoader(points(self.n), self.batch_size, shuffle=True)


class Regressor(pl.LightningModule):
    def __init__(self, lr: float = 0.01, width: int = 8):
        super().__init__()
        self.lr = lr
        self.backbone = nn.Linear(6, width)
        self.head = nn.Linear(width, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.backbone(x))).squeeze(-1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.mse_loss(self(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


# ------------------------------------------------------------------------------------------ 1: text


class Text(pl.LightningDataModule):
    """Sentences of different lengths, padded in the batch."""

    def __init__(self, batch_size: int = 4):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage):
        rng = random.Random(0)
        self.lines = [
            {
                "text": "a" * rng.randint(2, 9),
                "ids": [rng.randrange(11) for _ in range(rng.randint(2, 9))],
            }
            for _ in range(60)
        ]

    def train_dataloader(self):
        def collate(items):
            ids = [torch.tensor(item["ids"]) for item in items]
            return {"text": [item["text"] for item in items],
                    "ids": nn.utils.rnn.pad_sequence(ids, batch_first=True)}  # fmt: skip

        return DataLoader(self.lines, self.batch_size, shuffle=True, collate_fn=collate)


class Language(pl.LightningModule):
    def __init__(self, lr: float = 1e-3):
        super().__init__()
        self.save_hyperparameters()
        self.embed, self.out = nn.Embedding(11, 8), nn.Linear(8, 11)

    def training_step(self, batch, batch_idx):
        ids = batch["ids"]
        logits = self.out(self.embed(ids[:, :-1]))
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        self.logger.log_metrics({"lm": loss.item()})
        self.log("lm_loss", loss, on_step=True, logger=True)
        return {"loss": loss, "n": ids.numel()}

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": torch.optim.lr_scheduler.OneCycleLR(
                    optimizer, max_lr=self.hparams.lr, total_steps=24
                ),
                "interval": "step",
            },
        }


# ------------------------------------------------------------------------------------------- 2: GAN


class Gan(pl.LightningModule):
    def __init__(self, lr: float = 1e-2, raw: bool = False, every: int = 1):
        super().__init__()
        self.automatic_optimization = False
        self.lr, self.raw, self.every = lr, raw, every
        self.generator, self.critic = nn.Linear(3, 6), nn.Linear(6, 1)

    def training_step(self, batch, batch_idx):
        real, _ = batch
        g, d = self.optimizers(use_pl_optimizer=not self.raw)
        g_schedule, _ = self.lr_schedulers()
        d.zero_grad()
        fake = self.generator(torch.randn(len(real), 3))
        d_loss = (
            F.softplus(self.critic(fake.detach())).mean() + F.softplus(-self.critic(real)).mean()
        )
        self.manual_backward(d_loss)
        d.step()
        if batch_idx % self.every == 0:
            g.zero_grad()
            self.manual_backward(F.softplus(-self.critic(fake)).mean())
            g.step()
            g_schedule.step()
        self.draw(real)

    def draw(self, real):
        self.logger.experiment.add_histogram("real", real, self.global_step)
        self.logger.experiment.config.update({"a": 1})

    def configure_optimizers(self):
        g = torch.optim.Adam(self.generator.parameters(), lr=self.lr)
        d = torch.optim.Adam(self.critic.parameters(), lr=2 * self.lr)
        return [g, d], [
            torch.optim.lr_scheduler.OneCycleLR(g, max_lr=self.lr, total_steps=20),
            torch.optim.lr_scheduler.StepLR(d, 1),
        ]


class Quiet(Gan):
    """Draws nothing, and has no schedules."""

    def lr_schedulers(self):
        return self, self

    def step(self):
        self.stepped = True

    def configure_optimizers(self):
        return super().configure_optimizers()[0]

    def draw(self, real):
        self.drawn = len(real)


# ------------------------------------------------------------------------------------------- 3: DQN


class Replay(IterableDataset):
    def __init__(self, model: Any, size: int = 50):
        self.model, self.size = model, size

    def __iter__(self):
        for _ in range(self.size):
            state = torch.randn(6)
            self.model.memory.append(state)
            yield state, state.sum()


class Dqn(Regressor):
    """Has a memory that its data fill."""

    def __init__(self, lr: float = 0.01):
        super().__init__(lr)
        self.memory: deque = deque(maxlen=100)


class Replayed(Points):
    def train_dataloader(self):
        return DataLoader(Replay(self.trainer.lightning_module), batch_size=self.batch_size)


# ---------------------------------------------------------------------------------------- 4: graphs


class Graphs(Points):
    """Dictionaries of one large graph a batch, as collated by hand."""

    def train_dataloader(self):
        def collate(items):
            x = torch.stack([x for x, _ in items]).repeat_interleave(3, 0)
            edges = torch.randint(len(x), (2, 2 * len(x)))
            y = torch.stack([y for _, y in items])
            return {
                "x": x,
                "edges": edges,
                "batch": torch.arange(len(items)).repeat_interleave(3),
                "y": y,
            }

        return DataLoader(points(self.n), self.batch_size, shuffle=True, collate_fn=collate)


class GraphNet(Regressor):
    def training_step(self, batch, batch_idx):
        x = batch["x"].index_add(0, batch["edges"][1], batch["x"][batch["edges"][0]])
        found = torch.zeros(len(batch["y"])).index_add(0, batch["batch"], self(x))
        return F.mse_loss(found, batch["y"])


# ------------------------------------------------------------------------- 5 to 9: kinds of loaders


class Combined(Points):
    mode = "min_size"

    def train_dataloader(self):
        return CombinedLoader(
            {
                "few": DataLoader(points(32), self.batch_size),
                "many": DataLoader(points(96), self.batch_size),
            },
            self.mode,
        )


class OfTwo(Regressor):
    def training_step(self, batch, batch_idx):
        return sum(super(OfTwo, self).training_step(part, batch_idx) for part in batch.values())


class Subset(Points):
    def __init__(self, batch_size: int = 8, n: int = 400, drop_last: bool = True):
        super().__init__(batch_size, n)
        self.drop_last = drop_last

    def train_dataloader(self):
        sampler = SubsetRandomSampler(range(20))
        return DataLoader(
            points(self.n), self.batch_size, sampler=sampler, drop_last=self.drop_last
        )


class OwnBatches(BatchSampler):
    pass


class BySampler(Points):
    """Draws batches by a sampler of its own, of a part of the data."""

    def train_dataloader(self):
        batches = OwnBatches(SubsetRandomSampler(range(24)), self.batch_size, drop_last=True)
        return DataLoader(points(self.n), batch_sampler=batches)


class Stream(IterableDataset):
    """Batches made by the data set itself, for ever or so many."""

    def __init__(self, batch_size: int, num: int | None):
        self.batch_size, self.num = batch_size, num

    def __iter__(self):
        count = 0
        while self.num is None or count < self.num:
            count += 1
            x = torch.randn(self.batch_size, 6)
            yield x, x.sum(1)


class Streams(Points):
    def __init__(self, batch_size: int = 8, num: int | None = None):
        super().__init__(batch_size)
        self.num = num

    def train_dataloader(self):
        return DataLoader(Stream(self.batch_size, self.num), batch_size=None)


class Stateful:
    """A loader with a place in the data, of no class of torch's."""

    def __init__(self, batch_size: int):
        self.x, self.y = points(40).tensors
        self.batch_size, self.at = batch_size, 0

    def __iter__(self):
        for at in range(0, len(self.x), self.batch_size):
            self.at = at
            yield (
                self.x[self.at : self.at + self.batch_size],
                self.y[self.at : self.at + self.batch_size],
            )

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class StatefulPoints(Points):
    def train_dataloader(self):
        return Stateful(self.batch_size)


class Deaf(Points):
    """A loader that does not heed the batch size."""

    def train_dataloader(self):
        return DataLoader(points(self.n), batch_size=16)


class SeveralVals(Points):
    def val_dataloader(self):
        return [DataLoader(points(16), 4), DataLoader(points(8), 4)]


class Validated(Regressor):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("v", F.mse_loss(self(batch[0]), batch[1]))


# --------------------------------------------------------------------------- 10 on: kinds of models


class Groups(Regressor):
    """Rates in a list, one for each group; the first does not follow `lr`."""

    def configure_optimizers(self):
        rates = [1e-4, self.lr]
        parts = [self.backbone, self.head]
        return torch.optim.SGD(
            [{"params": p.parameters(), "lr": lr} for p, lr in zip(parts, rates, strict=True)]
        )


class DeafToLr(Regressor):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class SetsItself(Regressor):
    """Warms up in training_step."""

    def training_step(self, batch, batch_idx):
        for group in self.optimizers().param_groups:
            group["lr"] = self.lr * min(1, (self.global_step + 1) / 10)
        return super().training_step(batch, batch_idx)


class WarmsUp(Regressor):
    """Warms up in optimizer_step, as in Lightning's manual."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        for group in optimizer.param_groups:
            group["lr"] = self.lr * min(1, (self.global_step + 1) / 100)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


class Sometimes(Regressor):
    """Passes over every third batch."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)


class Never(Regressor):
    def training_step(self, batch, batch_idx):
        return None


class NanFirst(Regressor):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * float("nan")


class Lbfgs(Regressor):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=self.lr, max_iter=4)


class RawOptimizer(Regressor):
    """Manual optimization with torch's own optimizer, and torch's own backward."""

    def __init__(self, lr: float = 0.01, width: int = 8, closure: bool = False, steps: bool = True):
        super().__init__(lr, width)
        self.automatic_optimization = False
        self.closure, self.steps = closure, steps
        self.norms: list[float] = []

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)

        def closure():
            optimizer.zero_grad()
            loss = super(RawOptimizer, self).training_step(batch, batch_idx)
            (100 * loss).backward()
            return loss

        if self.closure:
            return optimizer.step(closure)
        loss = closure()
        if self.steps:
            optimizer.step()
        self.norms.append(float(nn.utils.get_total_norm([p.grad for p in self.parameters()])))
        return loss


class Schedules(Regressor):
    """Asks its trainer for the limits of the fit."""

    seen: ClassVar[list] = []

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        steps = self.trainer.estimated_stepping_batches
        Schedules.seen.append((self.trainer.max_epochs, self.trainer.max_steps, steps))
        one = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)
        return [optimizer], [one]

    def training_step(self, batch, batch_idx):
        self.lr_schedulers().get_last_lr()
        assert self.current_epoch is not None
        return super().training_step(batch, batch_idx) / self.trainer.max_epochs


class ClassState(Regressor):
    """Keeps a count and a cache in the class, which the loss depends on."""

    count = 0
    cache: ClassVar[dict] = {}

    def training_step(self, batch, batch_idx):
        type(self).count += 1
        self.cache[batch_idx] = True
        return super().training_step(batch, batch_idx) * (1 + 0.001 * self.count)


class Freezes(BaseFinetuning):
    """Trains the head alone, up to an epoch."""

    def __init__(self, until: int = 100):
        super().__init__()
        self.until = until

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == self.until:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)


class Watches(Callback):
    """Notes what it sees, for all objects."""

    moved: ClassVar[list] = []
    stopped: int = 0

    def on_train_start(self, trainer, pl_module):
        self.before = pl_module.backbone.weight.clone()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = True
        Watches.moved.append(not torch.equal(self.before, pl_module.backbone.weight))


class Writes(Regressor):
    """Writes files where its trainer says, and draws into its logger."""

    def on_train_start(self):
        with open(f"{self.trainer.log_dir}/notes.txt", "w") as file:
            file.write("a")
        self.logger.log_hyperparams({"a": 1})

    def training_step(self, batch, batch_idx):
        self.logger.experiment.add_image("x", batch[0])
        for logger in self.loggers:
            logger.log_metrics({"a": 1.0})
        with self.logger.experiment.start_run() as run:
            run["a"] = 1
        self.log("a", 1.0, logger=True)
        return super().training_step(batch, batch_idx)


class OnlyTrainable(Regressor):
    """Gives its optimizer what is trainable when it starts."""

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class Thaws(OnlyTrainable):
    """Brings its own callbacks."""

    def configure_callbacks(self):
        return [Freezes(until=1), EarlyStopping("train_loss", check_on_train_epoch_end=True)]


class AnyBatch(Regressor):
    """Takes the first tensors that a batch holds."""

    def training_step(self, batch, batch_idx):
        batch = batch if isinstance(batch, list) else next(iter(batch.values()))
        return super().training_step(batch, batch_idx)


class Longest(Combined):
    mode = "max_size_cycle"


class Own(Points):
    """Batches of different sizes, in a list."""

    def train_dataloader(self):
        return DataLoader(points(self.n), batch_sampler=[[0, 1, 2], [3, 4, 5, 6, 7], [*range(10)]])


class Drops(Points):
    """Leaves out what does not fill a batch, in an iterable set that does not say so."""

    def train_dataloader(self):
        x, y = points(20).tensors
        return DataLoader(Whole(x[:10], y[:10]), self.batch_size, drop_last=True)


class Whole(IterableDataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __iter__(self):
        return iter(zip(self.x, self.y, strict=True))


class Short(Points):
    """A stream of 30 samples."""

    def train_dataloader(self):
        x, y = points(30).tensors
        return DataLoader(Whole(x, y), self.batch_size)


class NoPoints(Points):
    def train_dataloader(self):
        return DataLoader(points(), self.batch_size, sampler=SubsetRandomSampler([]))


class EveryThree(Accumulation):
    """Three micro-batches; its `batch_size` is of something else."""

    def __init__(self, batch_size: int = 1):
        super().__init__(weight_by=None)

    @property
    def schedules(self):
        return {0: 3}, {0: 1}


class NoAccumulation(Callback):
    def __init__(self, batch_size: int = 1):
        self.batch_size = batch_size

"""Data that fits into memory, served by slicing whole batches: no per-sample collation."""

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import TensorDataset

from app.errors import Refused
from app.parallel.split import (
    WHOLE,
    Share,
    evaluation_part,
    evaluation_repeats,
    num_parts,
    training_part,
    training_weight,
)
from app.process.ranks import ranks


def generator_of(*numbers: int) -> torch.Generator:
    """Return a generator seeded by all of `numbers`, each >= 0."""
    # A generator keeps 32 bits of a seed, and `seed + epoch` would give seed 1 the orders of seed
    # 0, one epoch late: mix first.
    mixed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    return torch.Generator().manual_seed(mixed)


def epoch_order(*, num_samples: int, seed: int, epoch: int) -> Tensor:
    """Return the permutation of epoch `epoch`: int64 (num_samples,), a function of its arguments.

    The global RNG is neither read nor advanced.
    """
    return torch.randperm(num_samples, generator=generator_of(seed, epoch))


class InMemoryLoader:
    """Batches of tensors that share their first dimension, resumable at every batch.

    `iter()` starts a new epoch, also where the last one was abandoned, and nothing happens before
    its first `next()`. After `load_state_dict` the next iteration continues behind the last batch
    that the saved loader served, or with a new epoch where that was the last of its epoch.

    Lightning restores this state only within an epoch, but tells the epoch to any loader's
    `batch_sampler.sampler`: so the loader has one, itself.

    Every process gets every sample, unless it asks for its share by `shard`.
    """

    def __init__(
        self,
        *,
        tensors: tuple[Tensor, ...],
        batch_size: int,
        shuffle: bool,
        drop_last: bool,
        seed: int | None,
    ) -> None:
        """Take CPU tensors (n, ...); `seed=None` means the seed torch was last given."""
        assert batch_size > 0, batch_size
        self.dataset = TensorDataset(*tensors)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self._seed = torch.initial_seed() if seed is None else seed
        self._epoch = 0
        self._batches = 0  # served in this epoch
        self._resuming = False
        self._share = WHOLE
        self._part = training_part

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch, also in a resumed one."""
        return num_parts(
            len(self.dataset),
            batch_size=self.batch_size,
            share=self._share,
            drop_last=self.drop_last,
        )

    def shard(self, share: Share, *, evaluates: bool) -> "InMemoryLoader":
        """Return a loader of the same tensors that serves one rank's share."""
        mine = copy.copy(self)
        mine._seed = ranks().first(lambda: self._seed)  # all go by one order
        mine._share = share
        mine._part = evaluation_part if evaluates else training_part
        return mine

    def weight(self, batch_idx: int) -> float:
        """Return what this rank's loss counts in a step, where the last does not split evenly."""
        return training_weight(
            len(self.dataset), batch_idx, batch_size=self.batch_size, share=self._share
        )

    def repeats(self, batch_idx: int) -> bool:
        """Return whether an evaluation batch only repeats what is in another one."""
        return evaluation_repeats(
            len(self.dataset), batch_idx, batch_size=self.batch_size, share=self._share
        )

    def __iter__(self) -> Iterator[Any]:
        start = self._batches
        if not self._resuming or start == len(self):
            self._epoch += start > 0
            start = 0
        self._resuming = False
        epoch, num_samples = self._epoch, len(self.dataset)
        if self.shuffle:
            order = epoch_order(num_samples=num_samples, seed=self._seed, epoch=epoch)
        else:
            order = torch.arange(num_samples)
        for batch in range(start, len(self)):
            index = self._part(order, batch, batch_size=self.batch_size, share=self._share)
            # Counted before the batch leaves: a reader that knows the length never asks again.
            self._epoch, self._batches = epoch, batch + 1
            yield self.batch(index, epoch=epoch)

    def batch(self, index: Tensor, *, epoch: int) -> Any:
        """Return the batch of the samples at `index`, int64 (batch,), in epoch `epoch`."""
        return tuple(tensor.index_select(0, index) for tensor in self.dataset.tensors)

    @property
    def batch_sampler(self) -> SimpleNamespace:
        """Where Lightning looks for `set_epoch`."""
        return SimpleNamespace(
            sampler=self, batch_size=self.batch_size, drop_last=self.drop_last, share=self._share
        )

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be epoch `epoch`, or what a loaded state has left of it."""
        if not (self._resuming and self._epoch == epoch):
            self._epoch, self._batches, self._resuming = epoch, 0, False

    def state_dict(self) -> dict[str, int]:
        """Return the position: seed, epoch (from 0) and the batches of it that were served."""
        return {"seed": self._seed, "epoch": self._epoch, "batches": self._batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue behind `state`. ValueError where this loader has no such position."""
        if not 0 <= state["batches"] <= len(self):
            raise Refused(
                f"the checkpoint stands {state['batches']} batches into an epoch, but an epoch has "
                f"{len(self)} batches of {self.batch_size}; resume with the data.batch_size it was "
                "written with"
            )
        self._seed, self._epoch = state["seed"], state["epoch"]
        self._batches = state["batches"]
        self._resuming = True


class Splits(NamedTuple):
    """Features (n, num_features) float32 and labels (n,) int64 of each part."""

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


class InMemoryData(LightningDataModule):
    """Serves the `Splits` that a subclass loads; prediction reads the test part."""

    def __init__(
        self,
        *,
        batch_size: int,
        eval_batch_size: int,
        shuffle: bool,
        num_features: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.shuffle = shuffle
        self.num_features = num_features
        self.num_classes = num_classes
        self._splits: Splits | None = None

    def load(self) -> Splits:
        """Return the data; called once."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Load the data. ValueError where it is not what the configuration says."""
        if self._splits is not None:
            return
        splits = self.load()
        features, labels = splits.train
        for key, said, found in (
            ("num_features", self.num_features, features.shape[1]),
            ("num_classes", self.num_classes, int(labels.max()) + 1),
        ):
            if said != found:
                raise Refused(
                    f"data.{key} must be {found}, as in the data of {type(self).__name__}, "
                    f"got {said}; type data.{key}={found}"
                )
        self._splits = splits

    def train_dataloader(self) -> InMemoryLoader:
        assert self._splits is not None
        return InMemoryLoader(
            tensors=self._splits.train,
            batch_size=self.batch_size,
            shuffle=self.shuffle,
            drop_last=False,
            seed=None,
        )

    def val_dataloader(self) -> InMemoryLoader:
        assert self._splits is not None
        return self._in_order(self._splits.val)

    def test_dataloader(self) -> InMemoryLoader:
        assert self._splits is not None
        return self._in_order(self._splits.test)

    def predict_dataloader(self) -> InMemoryLoader:
        return self.test_dataloader()

    def _in_order(self, tensors: tuple[Tensor, Tensor]) -> InMemoryLoader:
        return InMemoryLoader(
            tensors=tensors,
            batch_size=self.eval_batch_size,
            shuffle=False,
            drop_last=False,
            seed=None,
        )

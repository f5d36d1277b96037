"""Data modules and loaders as other people write them. None knows of this project."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    random_split,
)


def points(num_samples: int, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_samples, 10, generator=generator)
    return TensorDataset(x, (x.sum(1) > 0).long())


class Rows(pl.LightningDataModule):
    """The data module of every tutorial."""

    def __init__(self, batch_size: int = 8, num_samples: int = 40, workers: int = 0) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_samples = num_samples
        self.workers = workers

    def train_dataset(self) -> Any:
        return points(self.num_samples)

    def train_dataloader(self) -> Any:
        return DataLoader(
            self.train_dataset(),
            batch_size=self.batch_size,
            shuffle=True,
            num_workers=self.workers,
            collate_fn=self.collate,
        )

    collate: Any = None

    def val_dataloader(self) -> Any:
        return DataLoader(points(16, 1), batch_size=4, collate_fn=self.collate)

    def test_dataloader(self) -> Any:
        return DataLoader(points(16, 2), batch_size=4, collate_fn=self.collate)


class Kept(Rows):
    """Keeps its workers between epochs."""

    def train_dataloader(self) -> Any:
        return DataLoader(
            self.train_dataset(), self.batch_size, shuffle=True, num_workers=1,
            persistent_workers=True, prefetch_factor=4,
        )  # fmt: skip


class Split(Rows):
    """Splits in setup, draws a place in every sample."""

    def setup(self, stage: str) -> None:
        both = points(self.num_samples + 8)
        self.train, self.rest = random_split(both, [self.num_samples, 8])

    def train_dataset(self) -> Any:
        return self.train

    def val_dataloader(self) -> Any:
        return DataLoader(self.rest, batch_size=4)


# samplers


class Subset(Rows):
    def train_dataloader(self) -> Any:
        chosen = SubsetRandomSampler(range(0, self.num_samples, 2))
        return DataLoader(points(self.num_samples), self.batch_size, sampler=chosen)


class Weighted(Rows):
    def train_dataloader(self) -> Any:
        data = points(self.num_samples)
        weights = data.tensors[1].float() + 0.5
        sampler = WeightedRandomSampler(weights.tolist(), num_samples=self.num_samples)
        return DataLoader(data, self.batch_size, sampler=sampler)


class Generated(Rows):
    """A sampler with a generator of its own, that goes on from epoch to epoch."""

    def train_dataloader(self) -> Any:
        data = points(self.num_samples)
        sampler = RandomSampler(data, generator=torch.Generator().manual_seed(3))
        return DataLoader(data, self.batch_size, sampler=sampler, drop_last=True)


class Moved:
    """An augmentation that draws from a generator of its own."""

    def __init__(self) -> None:
        self._drawing = np.random.default_rng(3)

    def __call__(self, x: Tensor) -> Tensor:
        return x + float(self._drawing.normal())


class Transformed(Dataset[Any]):
    def __init__(self, base: Any, transform: Any) -> None:
        self.base, self.transform = base, transform

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> Any:
        x, y = self.base[index]
        return self.transform(x), y


class Masks:
    """A collating that masks, as those of language models."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)

    def __call__(self, samples: list[Any]) -> Any:
        x, y = default_collate(samples)
        return x * (torch.rand(x.shape, generator=self.generator) > 0.1), y


class Counted(Sampler[int]):
    """Keeps its epoch as numpy's whole number."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples, self.epoch = num_samples, np.int64(0)

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        self.epoch += np.int64(1)
        order = np.random.default_rng(int(self.epoch)).permutation(self.num_samples)
        return iter(order.tolist())


class Augmented(Rows):
    """Two sets in one, each with an augmentation of its own."""

    def train_dataloader(self) -> Any:
        half = points(self.num_samples // 2)
        both = ConcatDataset([Transformed(half, Moved()) for _ in range(2)])
        sampler = Counted(self.num_samples)
        return DataLoader(both, self.batch_size, sampler=sampler, collate_fn=Masks())


class Buckets(Sampler[list[int]]):
    """Batches of neighbours, in a random order, told the epoch."""

    def __init__(self, num_samples: int, batch_size: int) -> None:
        self.batches = [
            list(range(start, min(start + batch_size, num_samples)))
            for start in range(0, num_samples, batch_size)
        ]
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(self.epoch))
        return (self.batches[index] for index in order)


class Bucketed(Rows):
    def train_dataloader(self) -> Any:
        buckets = Buckets(self.num_samples, self.batch_size)
        return DataLoader(points(self.num_samples), batch_sampler=buckets)


class Unbatched(Rows):
    """A sampler that draws whole batches, fetched at once."""

    def train_dataloader(self) -> Any:
        data = points(self.num_samples)
        sampler = BatchSampler(RandomSampler(data), self.batch_size, drop_last=False)
        return DataLoader(data, batch_size=None, sampler=sampler)


# without a length, or with a state


class Stream(IterableDataset[Any]):
    """Samples one after another, in a random order, without a length."""

    def __init__(self, num_samples: int) -> None:
        self.samples = points(num_samples)

    def __iter__(self) -> Iterator[Any]:
        return (self.samples[index] for index in torch.randperm(len(self.samples)))


class SizedStream(Stream):
    def __len__(self) -> int:
        return len(self.samples)


class Streamed(Rows):
    def train_dataloader(self) -> Any:
        return DataLoader(Stream(self.num_samples), self.batch_size)


class SizedStreamed(Rows):
    def train_dataloader(self) -> Any:
        return DataLoader(SizedStream(self.num_samples), self.batch_size)


class Stateful:
    """A loader without a length that knows its place, as StatefulDataLoader does."""

    def __init__(self, num_samples: int, batch_size: int) -> None:
        self.samples, self.batch_size = points(num_samples), batch_size
        self.epoch, self.place = 0, 0
        self._goes_on = False

    def __iter__(self) -> Iterator[Any]:
        if not self._goes_on:
            self.place = 0
        self._goes_on = False
        generator = torch.Generator().manual_seed(self.epoch)
        order = torch.randperm(len(self.samples), generator=generator)
        while self.place < len(order):
            chosen = order[self.place : self.place + self.batch_size]
            self.place += self.batch_size
            yield list(self.samples[chosen])
        self.epoch += 1
        self.place = 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.place = state["epoch"], state["place"]
        self._goes_on = True


class WithState(Rows):
    def train_dataloader(self) -> Any:
        return Stateful(self.num_samples, self.batch_size)


class Handmade:
    """A loader that only has what a loop needs."""

    def __init__(self, num_samples: int, batch_size: int) -> None:
        self.samples, self.batch_size = points(num_samples), batch_size

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(len(self.samples))
        return (list(self.samples[part]) for part in order.split(self.batch_size))


class WithHandmade(Rows):
    def train_dataloader(self) -> Any:
        return Handmade(self.num_samples, self.batch_size)


# several


class Several(Rows):
    """Two sets of different lengths, combined in one of Lightning's modes."""

    def __init__(self, batch_size: int = 8, mode: str = "max_size_cycle") -> None:
        super().__init__(batch_size)
        self.mode = mode

    def train_dataloader(self) -> Any:
        one = DataLoader(points(40), self.batch_size, shuffle=True)
        other = DataLoader(points(24, 5), self.batch_size, shuffle=True)
        return CombinedLoader({"one": one, "other": other}, self.mode)


class DictOfLoaders(Several):
    def train_dataloader(self) -> Any:
        return super().train_dataloader().iterables


class SeveralToValidate(Rows):
    def val_dataloader(self) -> Any:
        return [DataLoader(points(8, seed), batch_size=4) for seed in (1, 2)]


class NothingToValidate(pl.LightningDataModule):
    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        return DataLoader(points(40), self.batch_size, shuffle=True)


class OneBatch(Rows):
    def train_dataloader(self) -> Any:
        return DataLoader(points(8), self.batch_size)


class Empty(Rows):
    """Nothing was left by a filter."""

    def train_dataloader(self) -> Any:
        return DataLoader(points(0), self.batch_size)


# batches of other shapes


def to_dict(samples: list[Any]) -> dict[str, Any]:
    x, y = (torch.stack(part) for part in zip(*samples, strict=True))
    return {"x": x, "y": y, "text": [f"sample {int(label)}" for label in y], "more": [None, ("a",)]}


@dataclass
class Batch:
    x: Tensor
    y: Tensor

    def to(self, *args: Any, **kwargs: Any) -> "Batch":
        return Batch(self.x.to(*args, **kwargs), self.y.to(*args, **kwargs))


def to_dataclass(samples: list[Any]) -> list[Any]:
    x, y = (torch.stack(part) for part in zip(*samples, strict=True))
    return [Batch(x, y), "a text"]


def none_at_times(samples: list[Any]) -> Any:
    """None where the first sample stands for a broken file."""
    x, y = (torch.stack(part) for part in zip(*samples, strict=True))
    return None if float(x[0, 0]) > 0.8 else (x, y)


class Dicts(Rows):
    collate = staticmethod(to_dict)


class Dataclasses(Rows):
    collate = staticmethod(to_dataclass)


class Nones(Rows):
    def train_dataloader(self) -> Any:
        data = points(self.num_samples)
        return DataLoader(data, self.batch_size, shuffle=True, collate_fn=none_at_times)


class Tokens(Dataset[Any]):
    """Sequences of 1 to 6 tokens."""

    def __init__(self, num_samples: int) -> None:
        self.samples = [points(1 + index * 5 % 6, index).tensors for index in range(num_samples)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


def pad(samples: list[Any]) -> dict[str, Any]:
    longest = max(len(x) for x, _ in samples)
    x = torch.stack([torch.nn.functional.pad(x, (0, 0, 0, longest - len(x))) for x, _ in samples])
    y = torch.stack([torch.nn.functional.pad(y, (0, longest - len(y))) for _, y in samples])
    mask = torch.stack([torch.arange(longest) < len(y) for _, y in samples])
    return {"x": x, "y": y, "mask": mask, "num_tokens": int(mask.sum())}


class Texts(Rows):
    def train_dataloader(self) -> Any:
        return DataLoader(Tokens(self.num_samples), self.batch_size, shuffle=True, collate_fn=pad)

    def val_dataloader(self) -> Any:
        return DataLoader(Tokens(8), batch_size=4, collate_fn=pad)

    test_dataloader = val_dataloader

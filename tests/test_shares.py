"""Every sample once, in one order for all ranks, and each step the mean over its samples."""

from typing import Any

import pytest
import torch
from theirs import Noisy, Stream
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

from app.data.in_memory import InMemoryLoader
from app.parallel.split import (
    Share,
    SharedSampler,
    evaluation_part,
    micro_batch_size,
    num_parts,
    split,
    training_part,
    training_weight,
)

SPLITS = [(24, 4, 3), (25, 4, 3), (26, 4, 3), (1, 2, 3), (7, 1, 2), (100, 7, 4), (13, 3, 1)]


def shares(size: int) -> list[Share]:
    return [Share(rank, size) for rank in range(size)]


@pytest.mark.parametrize(("num_samples", "batch_size", "size"), SPLITS)
def test_a_step_is_the_mean_over_the_samples_one_process_would_take(
    num_samples: int, batch_size: int, size: int
) -> None:
    losses = torch.rand(num_samples, dtype=torch.float64)
    order = torch.randperm(num_samples)
    steps = num_parts(num_samples, batch_size=batch_size, share=Share(0, size), drop_last=False)
    seen: list[int] = []
    for step in range(steps):
        together = order[step * batch_size * size : (step + 1) * batch_size * size]
        mean = torch.zeros((), dtype=torch.float64)
        for share in shares(size):
            mine = training_part(order, step, batch_size=batch_size, share=share)
            weight = training_weight(num_samples, step, batch_size=batch_size, share=share)
            assert 0 < len(mine) <= batch_size
            mean += weight * losses[mine].mean() / size
            seen += mine.tolist() if weight > 0 else []
        torch.testing.assert_close(mean, losses[together].mean())
    assert sorted(seen) == list(range(num_samples))


@pytest.mark.parametrize(("num_samples", "batch_size", "size"), SPLITS)
def test_an_evaluation_has_every_sample_once_and_as_many_batches_on_every_rank(
    num_samples: int, batch_size: int, size: int
) -> None:
    order = list(range(num_samples))
    parts = num_parts(num_samples, batch_size=batch_size, share=Share(0, size), drop_last=False)
    seen: list[int] = []
    for share in shares(size):
        for index in range(parts):
            part = evaluation_part(order, index, batch_size=batch_size, share=share)
            assert 0 < len(part) <= batch_size
            seen += part
    assert set(seen) == set(order)
    enough = num_samples // size >= parts
    assert not enough or len(seen) == num_samples


LOADERS: dict[str, Any] = {
    "in order": lambda data: DataLoader(data, batch_size=4),
    "shuffled": lambda data: DataLoader(data, batch_size=4, shuffle=True),
    "shuffled by a generator of its own": lambda data: DataLoader(
        data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3)
    ),
    "batches of its own": lambda data: DataLoader(
        data, batch_sampler=list(BatchSampler(SequentialSampler(data), 4, False))
    ),
    "without batches": lambda data: DataLoader(data, batch_size=None, shuffle=True),
    "in memory": lambda data: InMemoryLoader(
        tensors=(data.x, data.y), batch_size=4, shuffle=True, drop_last=False, seed=7
    ),
}


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("evaluates", [False, True])
def test_the_shares_of_a_loader_are_the_loader(make: Any, evaluates: bool) -> None:
    data = Noisy(42)
    data.y = torch.arange(42)
    torch.manual_seed(0)
    whole = sorted(int(y) for _, batch in make(data) for y in batch.reshape(-1))
    found: list[int] = []
    for share in shares(2):
        torch.manual_seed(0)
        mine, is_split = split(make(data), share=share, evaluates=evaluates)
        assert is_split
        batches = list(mine)
        assert len(batches) == len(mine)
        found += [int(y) for _, batch in batches for y in batch.reshape(-1)]
        if "batches" not in str(make):
            assert micro_batch_size(mine) in (4, None)
    repeated = [y for y in found if found.count(y) > 1]
    assert sorted(set(found)) == whole
    assert len(repeated) <= 8


def test_what_splits_itself_is_left_alone_and_what_cannot_be_split_is_told() -> None:
    data = Noisy(8)
    own = DataLoader(data, sampler=DistributedSampler(data, num_replicas=2, rank=1))
    assert split(own, share=Share(1, 2), evaluates=False) == (own, True)
    stream = DataLoader(Stream(8))
    assert split(stream, share=Share(1, 2), evaluates=False) == (stream, False)
    assert split(stream, share=Share(0, 1), evaluates=False) == (stream, True)


def test_dropping_the_last_samples_leaves_steps_of_full_weight() -> None:
    sampler = SharedSampler(
        sampler=range(10), batch_size=2, drop_last=True, share=Share(1, 2), evaluates=False
    )
    assert list(sampler) == [[1, 3], [5, 7]]
    assert [sampler.weight(index) for index in range(len(sampler))] == [1.0, 1.0]

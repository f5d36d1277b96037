"""The state of the random number generators: what it is, and drawing from another."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """The states of the generators of python, numpy, torch and CUDA, in plain values."""
    cuda = torch.cuda.get_rng_state_all() if _uses_cuda() else []
    return {**sampling_state(), "cuda": cuda}


def sampling_state() -> dict[str, Any]:
    """The states of the generators on the CPU: those that samplers draw from."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": [version, torch.tensor(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def draw_apart(rank: int) -> None:
    """Let the generators of a rank other than the first go on from a seed of its own."""
    if rank == 0:
        return
    seed = int(np.random.SeedSequence((torch.initial_seed(), rank)).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def under(state: Mapping[str, Any]) -> Iterator[None]:
    """Draw from `state`, and leave the generators as they were."""
    before = random_state()
    set_random_state(state)
    try:
        yield
    finally:
        set_random_state(before)


def _uses_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]

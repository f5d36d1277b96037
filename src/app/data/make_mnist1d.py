"""Writes mnist1d.npz beside this file: `python -m app.data.make_mnist1d`.

Needs `pip install mnist1d==0.0.2.post1`. Its float32 values do not depend on the versions of numpy
and scipy; its float64 values do.
"""

import random
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from app.data.mnist1d import FILE

NUM_SAMPLES = {"train": 4_000, "val": 1_000, "test": 10_000}
SEED = 42


def make() -> dict[str, npt.NDArray[Any]]:
    """Return x_train, y_train, x_val, ...: float32 (n, 40) and uint8 (n,), of every part.

    The global RNG states of random, numpy and torch are as before.
    """
    from mnist1d.data import get_dataset_args, make_dataset

    args = get_dataset_args()
    args.num_samples = sum(NUM_SAMPLES.values())
    args.seed = SEED
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        made = make_dataset(args)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
    # make_dataset has shuffled the samples and then cut them in two; the cut is undone here.
    x = np.concatenate([made["x"], made["x_test"]]).astype(np.float32)
    y = np.concatenate([made["y"], made["y_test"]]).astype(np.uint8)
    arrays: dict[str, npt.NDArray[Any]] = {}
    start = 0
    for name, num_samples in NUM_SAMPLES.items():
        arrays[f"x_{name}"] = x[start : start + num_samples]
        arrays[f"y_{name}"] = y[start : start + num_samples]
        start += num_samples
    return arrays


def main() -> None:
    """Write the file: same arrays, same bytes (numpy dates every member of the archive 1980)."""
    arrays: dict[str, Any] = make()
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()

"""MNIST-1D: ten classes of noisy, shifted signals; hard for an MLP, easy for a CNN."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from app.data.in_memory import InMemoryData, Splits

FILE = Path(__file__).with_name("mnist1d.npz")


class Mnist1d(InMemoryData):
    """4,000 signals to train, 1,000 to validate and 10,000 to test, shipped with the package.

    Features (n, 40) float32, standardised; labels 0 to 9. Source: arXiv 2011.14439; the file is
    written by `python -m app.data.make_mnist1d`, which decides which sample is in which part.
    """

    def load(self) -> Splits:
        with np.load(FILE) as file:

            def part(name: str) -> tuple[Tensor, Tensor]:
                labels = torch.from_numpy(file[f"y_{name}"]).long()
                return torch.from_numpy(file[f"x_{name}"]), labels

            return Splits(train=part("train"), val=part("val"), test=part("test"))

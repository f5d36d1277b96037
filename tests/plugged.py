"""Plugins of others."""

from typing import Any

import torch
from lightning.pytorch.plugins import HalfPrecision, LayerSync, TorchCheckpointIO
from lightning.pytorch.plugins.environments import LightningEnvironment


class Counts(LayerSync):
    """Notes what it was asked for."""

    num_applied = 0

    def apply(self, model: Any) -> Any:
        type(self).num_applied += 1
        return model

    def revert(self, model: Any) -> Any:
        return model


class Io(TorchCheckpointIO):
    pass


class Cluster(LightningEnvironment):
    pass


class Half(HalfPrecision):
    def __init__(self) -> None:
        super().__init__("bf16-true")


def nothing() -> torch.Tensor:
    return torch.zeros(())

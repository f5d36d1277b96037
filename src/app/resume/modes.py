"""What of a model is trained, and in which mode: no part of its weights, but of where it stands."""

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
from torch import nn

Modes = dict[str, list[str]]
"""Names: of parameters not trained, of modules in evaluation mode, of norms that do not track."""


def modes_of(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Modes:
    """The modes in training; also while a validation has put all modules in evaluation mode."""
    captured: dict[str, bool] = {}
    if trainer.validating or trainer.sanity_checking:
        captured = trainer.fit_loop.epoch_loop.val_loop._module_mode.mode
    return {
        "frozen": [name for name, p in pl_module.named_parameters() if not p.requires_grad],
        "evaluates": [
            name
            for name, module in pl_module.named_modules()
            if not captured.get(name, module.training)
        ],
        "untracked": [
            name for name, norm in _norms_of(pl_module) if not norm.track_running_stats
        ],
    }  # fmt: skip


def set_trained(pl_module: pl.LightningModule, modes: Modes) -> None:
    """Train the parameters, and track with the norms, that were when `modes_of` was asked."""
    frozen, untracked = set(modes["frozen"]), set(modes["untracked"])
    for name, parameter in pl_module.named_parameters():
        parameter.requires_grad_(name not in frozen)
    for name, norm in _norms_of(pl_module):
        norm.track_running_stats = name not in untracked


def set_modes(pl_module: pl.LightningModule, modes: Modes) -> None:
    """The same, and the mode of each module."""
    set_trained(pl_module, modes)
    evaluates = set(modes["evaluates"])
    for name, module in pl_module.named_modules():
        module.training = name not in evaluates


def _norms_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, part in module.named_modules():
        if hasattr(part, "track_running_stats"):
            yield name, part

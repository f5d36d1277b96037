"""What a checkpoint holds of weights that are shown in two ways."""

import copy
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

RAW = "raw"
"""Where a checkpoint of an average keeps the entries that the model writes of its raw weights."""

AVERAGES = "averages"
"""Where it keeps the average itself, in full precision, whatever the model makes of it."""


def written(
    trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Mapping[str, Any]
) -> dict[str, Any]:
    """The entries of a checkpoint that the model writes of the weights it now holds.

    `state_dict`, and what its `on_save_checkpoint` adds or replaces. Every rank calls it.
    """
    given = {key: copy.copy(value) for key, value in checkpoint.items()}
    given["state_dict"] = trainer.strategy.lightning_module_state_dict()
    content = dict(given)
    pl_module.on_save_checkpoint(content)
    return {
        key: value
        for key, value in content.items()
        if key == "state_dict" or key not in given or value is not given[key]
    }


def read(trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Load what `written` gave, as Lightning loads a checkpoint, which then is of the raw weights.

    The model has loaded the average before: its `on_load_checkpoint` runs a second time.
    """
    checkpoint.update(checkpoint.pop(RAW))
    pl_module.on_load_checkpoint(checkpoint)
    trainer.strategy.load_model_state_dict(checkpoint, strict=pl_module.strict_loading)


def keep_once(gathered: dict[str, Any], others: Mapping[str, Any]) -> None:
    """Put those of `others` in place of equal tensors, of which a file then holds one.

    The rest become copies: one that was gathered from a single rank would change with its weights.
    """
    for name, value in gathered.items():
        if isinstance(value, Tensor):
            other = others.get(name)
            gathered[name] = other if _equal(value, other) else value.clone()


def _equal(one: Tensor, other: Any) -> bool:
    return (
        isinstance(other, Tensor)
        and (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
        and one.data_ptr() != other.data_ptr()
        and torch.equal(one, other)
    )

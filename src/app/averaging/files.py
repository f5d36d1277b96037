"""What a checkpoint holds of weights that are shown in two ways."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from app.errors import Refused

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


def around_next_save(pl_module: pl.LightningModule, shown: AbstractContextManager[None]) -> None:
    """Enter a context once, around the model's own hook of a checkpoint: the last that is called.

    For a trainer that does not make its checkpoints while the average is shown.
    """
    name = "on_save_checkpoint"
    own, before = getattr(pl_module, name), vars(pl_module).get(name)

    def save(checkpoint: dict[str, Any]) -> None:
        if before is None:
            delattr(pl_module, name)
        else:
            setattr(pl_module, name, before)
        with shown:
            own(checkpoint)

    setattr(pl_module, name, save)


def refuse_weights_only(trainer: pl.Trainer) -> None:
    """Raise Refused where a callback keeps weights only: of that no other callback is told."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if getattr(callback, "save_weights_only", False):
            raise Refused(
                f"averaging cannot act with {type(callback).__name__}(save_weights_only=True) in a "
                f"{type(trainer).__name__}, which would save the raw weights; leave it out, or "
                "make the trainer an app.averaging.AveragingTrainer"
            )


def read(
    trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any], *, asks: bool
) -> bool:
    """Load what `written` gave, as Lightning loads a checkpoint, which then is of the raw weights.

    The model has loaded the average before: its `on_load_checkpoint` runs a second time.

    Args:
        asks: whether it matters if the model edits what it loads; alike on all ranks.

    Returns:
        Whether it does: what it would now write is not what it was given. False where not asked.
    """
    raw = checkpoint.pop(RAW)
    given = {path: (value, _num_changes(value)) for path, value in _leaves(raw)} if asks else {}
    checkpoint.update(raw)
    pl_module.on_load_checkpoint(checkpoint)
    trainer.strategy.load_model_state_dict(checkpoint, strict=pl_module.strict_loading)
    if not asks:
        return False
    is_edited = any(_num_changes(value) != version for value, version in given.values())
    now = dict(_leaves(written(trainer, pl_module, checkpoint)))
    if trainer.is_global_zero and not is_edited:  # what is sharded is gathered there
        is_edited = given.keys() != now.keys() or not all(
            _alike(value, now[path]) for path, (value, _) in given.items()
        )
    return bool(trainer.strategy.broadcast(is_edited))


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """What a nest of mappings holds, by path."""
    if not isinstance(value, Mapping):
        yield path, value
        return
    for key, item in value.items():
        yield from _leaves(item, f"{path}.{key}")


def _num_changes(value: Any) -> int:
    return value._version if isinstance(value, Tensor) else 0


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other.to(one))
    return type(one) is type(other) and (one is other or not isinstance(one, Tensor))


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

"""Callbacks that users bring, from the configuration or from `configure_callbacks` of a model."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar

from app.accumulate import Accumulation
from app.averaging import Averaging
from app.clip import Clip
from app.config import LIGHTNINGS, OF_LIGHTNING
from app.errors import Refused
from app.resume.hooks import switch_off_inherited
from app.run.progress import EpochLines, draws

TECHNIQUES = {"accumulate": Accumulation, "averaging": Averaging, "clip": Clip}
"""Of ours, by their groups."""


def refuse_beside(callbacks: Mapping[str, pl.Callback], *, dirpath: str | None) -> None:
    """Raise Refused where a callback does what a group of the configuration does, ours or
    Lightning's or derived from it, or writes over the checkpoints.

    Args:
        callbacks: by what to call them.
        dirpath: folder of the checkpoints; None where none are written.
    """
    for key, callback in callbacks.items():
        refuse_lightnings(key, callback)
        for group, kind in TECHNIQUES.items():
            if isinstance(callback, kind):
                target = f"{type(callback).__module__}.{type(callback).__qualname__}"
                raise Refused(
                    f"{key} must be no technique, which acts in its place among them, got "
                    f"{target}; leave it out, and type +{group}._target_={target}"
                )
        own = callback.dirpath if isinstance(callback, ModelCheckpoint) else None
        if own and dirpath and Path(own).resolve() == Path(dirpath).resolve():
            raise Refused(
                f"{key} must write into another folder than callbacks.checkpoint, got "
                f"dirpath={own}; leave dirpath out"
            )


def refuse_lightnings(key: str, callback: pl.Callback) -> None:
    """Raise Refused where a callback is a technique of Lightning, or derived from one."""
    for base in type(callback).__mro__:
        name, own = base.__name__, type(callback).__qualname__
        if name in OF_LIGHTNING and base.__module__.partition(".")[0] in LIGHTNINGS:
            got = own if own == name else f"{own}, a {name}"
            raise Refused(
                f"{key} must be no technique of Lightning, of which ours know nothing, got {got}; "
                f"leave it out, and use {OF_LIGHTNING[name]}"
            )


def checked(
    configure: Callable[[], Any], *, model: pl.LightningModule, dirpath: str | None
) -> Sequence[pl.Callback]:
    """What `configure_callbacks` of a model returns, treated as those of the configuration.

    Raises Refused where one is none that may stand there.
    """
    made = configure() or []
    callbacks: Sequence[pl.Callback] = made if isinstance(made, Sequence) else [made]
    for callback in callbacks:
        key = f"{type(model).__name__}.configure_callbacks: {type(callback).__name__}"
        refuse_beside({key: callback}, dirpath=dirpath)
        switch_off_inherited(callback)
    if any(map(draws, callbacks)):
        for ours in model.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(ours, EpochLines) and isinstance(ours, ProgressBar):
                ours.disable()
    return list(callbacks)

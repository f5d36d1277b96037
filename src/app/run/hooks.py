"""What stands in for the methods of the user's model and data, and which hooks are not called."""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden

Wrap = Callable[[str, Callable[..., Any]], Callable[..., Any] | None]
"""Makes of a hook's name and the method that would be called the one that is called instead; None
where it stays."""

LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader")
HOOKS = ("prepare_data", "setup", *LOADERS, "log", "configure_optimizers", "configure_model")


class DataHooks:
    """The only one that sets methods on what the user has made.

    Layers are laid around a method one after the other: the last one is called first. `release`
    takes all of them away, also those that data sharing has set on the data module itself.

    Args:
        model, data: as they were made.
    """

    def __init__(self, model: pl.LightningModule, data: pl.LightningDataModule) -> None:
        self._model = model
        self._data = data
        self._own = [
            (owner, {name: vars(owner)[name] for name in HOOKS if name in vars(owner)})
            for owner in (model, data)
        ]

    def around_loaders(self, wrap: Wrap) -> None:
        """Lay a layer around the loaders, of the data module or the model, whichever has them."""
        for name in LOADERS:
            in_data = is_overridden(name, self._data, pl.LightningDataModule)
            if in_data or is_overridden(name, self._model):
                self._lay(self._data if in_data else self._model, name, wrap)

    def around_log(self, wrap: Wrap) -> None:
        """Lay a layer around what the model logs with."""
        self._lay(self._model, "log", wrap)

    def in_place_of(self, name: str, method: Callable[..., Any]) -> None:
        """Call `method` where the model's own would be called."""
        setattr(self._model, name, method)

    def release(self) -> None:
        """Leave the user's objects as they were made."""
        for owner, own in self._own:
            for name in HOOKS:
                if name in own:
                    setattr(owner, name, own[name])
                else:
                    vars(owner).pop(name, None)

    @staticmethod
    def _lay(owner: Any, name: str, wrap: Wrap) -> None:
        instead = wrap(name, getattr(owner, name))
        if instead is not None:
            setattr(owner, name, instead)


def around_training(change: Callable[[Any], Any]) -> Wrap:
    """A layer that changes what `train_dataloader` returns, and no other loader."""

    def wrap(name: str, make: Callable[[], Any]) -> Callable[[], Any] | None:
        return partial(_changed, make, change) if name == "train_dataloader" else None

    return wrap


def _changed(make: Callable[[], Any], change: Callable[[Any], Any]) -> Any:
    return change(make())


EVERY_BATCH = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


def switch_off(callback: pl.Callback, *hooks: str) -> None:
    """Let Lightning pass over hooks of a callback, by setting them to None in the instance.

    It calls what is callable, each in a profiler context of its own: 2 % of a small step for a
    callback that does nothing at all (`benchmarks/step.py`).
    """
    vars(callback).update(dict.fromkeys(hooks))


def switch_on(callback: pl.Callback, *hooks: str) -> None:
    """Let Lightning call hooks again that were switched off."""
    for hook in hooks:
        vars(callback).pop(hook, None)


def switch_off_inherited(callback: pl.Callback) -> None:
    """Switch off the hooks of every batch that a callback only inherits, and that do nothing."""
    none = (h for h in EVERY_BATCH if getattr(type(callback), h) is getattr(pl.Callback, h))
    switch_off(callback, *none)

"""What stands in for the methods of the user's model and data, and which hooks are not called."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.model_helpers import is_overridden

from app.resume.position import asked_by

Layer = Callable[[str, Any], Any]
"""Makes of a hook's name and the loaders that it returned what is used instead."""

LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader")
HOOKS = ("prepare_data", "setup", *LOADERS, "log", "configure_callbacks", "configure_optimizers",
         "configure_model", "on_train_epoch_start")  # fmt: skip


class DataHooks:
    """The only one that sets methods on what the user has made.

    What a loader's method returns to Lightning goes through the layers in the order in which they
    were laid. Whoever else calls it, as `return self.train_dataloader()` in another one or a model
    that counts its classes, gets what the user's own returns. `release` takes all of it away, also
    what data sharing has set.

    Args:
        model, data: as they were made; None where the model has its loaders itself.
    """

    def __init__(self, model: pl.LightningModule, data: pl.LightningDataModule | None) -> None:
        self._model = model
        self._own = [
            (owner, {name: vars(owner)[name] for name in HOOKS if name in vars(owner)})
            for owner in (model, data)
            if owner is not None
        ]
        self._layers: list[Layer] = []
        self._making: Callable[[], AbstractContextManager[None]] = nullcontext
        for name in LOADERS:
            in_data = is_overridden(name, data, pl.LightningDataModule)
            if in_data or is_overridden(name, model):
                owner: Any = data if in_data else model
                setattr(owner, name, partial(self._served, name, getattr(owner, name)))

    def around_loaders(self, layer: Layer) -> None:
        """Lay a layer around the loaders, of the data module or the model, whichever has them."""
        self._layers.append(layer)

    def around_training(self, change: Callable[[Any], Any]) -> None:
        """Lay a layer around the training loaders alone."""
        self._layers.append(lambda name, made: change(made) if name == LOADERS[0] else made)

    def while_training_is_made(self, making: Callable[[], AbstractContextManager[None]]) -> None:
        """Call the training loaders' method within this, where it is Lightning that calls it."""
        self._making = making

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

    def _served(self, name: str, make: Callable[[], Any]) -> Any:
        is_lightning = asked_by(call.__name__)
        with self._making() if is_lightning and name == LOADERS[0] else nullcontext():
            made = make()
        for layer in self._layers if is_lightning else ():
            made = layer(name, made)
        return made


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


def after_batch(model: pl.LightningModule, action: Callable[[], None]) -> None:
    """Do something once, when the hooks of this batch are over: the model's own is the last.

    Called in a callback's `on_train_batch_end`. A checkpoint that is written before the model's
    hook has not what that changes, a teacher that follows the weights say.
    """
    name = "on_train_batch_end"
    own, before = getattr(model, name), vars(model).get(name)

    def then(*args: Any) -> None:
        if before is None:
            delattr(model, name)
        else:
            setattr(model, name, before)
        own(*args)
        action()

    setattr(model, name, then)

"""Running the model beside the fit: what runs inside leaves no trace in the model or the trainer.

Nothing is copied but the values that running a model changes: buffers, states of metrics, and what
lies small in attributes. Parameters, where they are asked for.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

SMALL, ROOM = 1 << 20, 16 << 20
"""Bytes up to which an array in an attribute is taken for a state, not for data; of all of them."""

ATOMS = (bool, int, float, complex, str, bytes, type(None))
MEASURED = (*ATOMS, Tensor, np.ndarray, np.generic, dict, list, deque, set, tuple)


@contextmanager
def apart(
    trainer: pl.Trainer, pl_module: pl.LightningModule, *, parameters: bool = False
) -> Iterator[None]:
    """Leave the model, the random state and the trainer's loggers as they were, also on an error.

    Of the model: buffers, metrics, modes, which parameters are trained, and attributes, with the
    lists, dictionaries, small arrays and plain objects in them; with `parameters`, their values.
    """
    loggers, should_stop = trainer.loggers, trainer.should_stop
    noted = Noted(pl_module, parameters=parameters)
    trainer.loggers = [Silent(logger) for logger in loggers]
    try:
        with isolate_rng():
            yield
    finally:
        trainer.loggers, trainer.should_stop = loggers, should_stop
        noted.restore()


class Silent(DummyLogger):
    """A logger that ignores everything, with the name and the folders of another."""

    def __init__(self, of: Logger) -> None:
        super().__init__()
        self._of = of

    @property
    def name(self) -> Any:
        """That of the other."""
        return self._of.name

    @property
    def version(self) -> Any:
        """That of the other."""
        return self._of.version

    @property
    def save_dir(self) -> Any:
        """That of the other."""
        return self._of.save_dir

    @property
    def log_dir(self) -> Any:
        """That of the other; its `save_dir` where it has none."""
        return getattr(self._of, "log_dir", self.save_dir)


class Noted:
    """All that running a module may change, as it is now.

    Args:
        module: with all modules in it.
        parameters: whether the values of parameters are noted too.
    """

    def __init__(self, module: nn.Module, *, parameters: bool) -> None:
        self._undo: list[Callable[[], None]] = []
        self._seen: set[int] = set()
        self._room = ROOM
        for part in module.modules():
            for buffer in part.buffers(recurse=False):
                self._note_tensor(buffer)
            for parameter in part.parameters(recurse=False):
                self._undo.append(partial(_train, parameter, parameter.requires_grad))
                if parameters:
                    self._note_tensor(parameter)
                self._seen.add(id(parameter))
            if isinstance(part, Metric):
                for value in vars(part).values():
                    if isinstance(value, Tensor):
                        self._note_tensor(value)
            self._note(vars(part))

    @torch.no_grad()
    def restore(self) -> None:
        """Set all of it back."""
        for step in self._undo:
            step()

    def _note(self, value: Any) -> None:
        """Note what an attribute or a container holds."""
        if isinstance(value, Tensor | np.ndarray):
            if _has_values(value) and value.nbytes <= min(SMALL, self._room):
                self._room -= value.nbytes
                self._note_tensor(value) if isinstance(value, Tensor) else self._note_array(value)
        elif isinstance(value, dict | list | deque | set | tuple):
            if id(value) in self._seen:
                return
            self._seen.add(id(value))
            if not isinstance(value, tuple):
                self._undo.append(_contents(value))
            for item in value.values() if isinstance(value, dict) else value:
                if not isinstance(item, ATOMS):
                    self._note(item)
        elif _is_meter(value):
            self._note(vars(value))

    def _note_tensor(self, tensor: Tensor) -> None:
        """Note the values, and the memory they lie in."""
        if id(tensor) in self._seen or not _has_values(tensor):
            return
        self._seen.add(id(tensor))
        memory = tensor.data
        self._undo.append(partial(_set_tensor, tensor, memory, memory.clone()))

    def _note_array(self, array: Any) -> None:
        if id(array) not in self._seen and array.flags.writeable:
            self._seen.add(id(array))
            self._undo.append(partial(np.copyto, array, array.copy()))


def _is_meter(value: Any) -> bool:
    """Whether an object holds nothing but numbers, texts, arrays and containers."""
    attributes = getattr(value, "__dict__", None)
    return (
        type(attributes) is dict
        and not isinstance(value, type | nn.Module)
        and not callable(value)
        and all(isinstance(item, MEASURED) for item in attributes.values())
    )


def _has_values(value: Any) -> bool:
    if not isinstance(value, Tensor):
        return True
    is_here = not is_lazy(value) and not value.is_meta and value.layout == torch.strided
    return is_here and not value.is_inference()


def _train(parameter: nn.Parameter, is_trained: bool) -> None:
    if parameter.requires_grad != is_trained:
        parameter.requires_grad_(is_trained)


def _set_tensor(tensor: Tensor, memory: Tensor, values: Tensor) -> None:
    tensor.data = memory
    memory.copy_(values)


def _contents(container: Any) -> Callable[[], None]:
    """What fills a container as it is now, unless nothing in it has changed."""
    kept: Any = dict(container) if isinstance(container, dict) else list(container)

    def restore() -> None:
        now: Any = dict(container) if isinstance(container, dict) else list(container)
        if len(now) == len(kept):
            if isinstance(kept, dict):
                is_same = all(key in now and now[key] is kept[key] for key in kept)
            else:
                is_same = all(one is other for one, other in zip(now, kept, strict=True))
            if is_same:
                return
        container.clear()
        if isinstance(container, dict):
            for key, value in kept.items():  # by `update`, a Counter would add
                container[key] = value
        elif isinstance(container, set):
            container.update(kept)
        else:
            container.extend(kept)

    return restore

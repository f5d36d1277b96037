"""Running the model beside the fit: what runs inside leaves no trace in the model or the trainer.

Nothing is copied but the values that running a model changes: buffers, states of metrics, and what
lies small in attributes. Parameters, where they are asked for.
"""

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

SMALL = 1 << 20
"""Bytes up to which an array in an attribute is taken for a state; above, for data."""

MAPPINGS = (dict, OrderedDict, defaultdict)
SEQUENCES = (list, deque)
PLAIN = (bool, int, float, complex, str, bytes, type(None), Tensor, np.ndarray, np.generic)


@contextmanager
def apart(
    trainer: pl.Trainer, pl_module: pl.LightningModule, *, parameters: bool = False
) -> Iterator[None]:
    """Leave the model, the random state and the trainer's loggers as they were, also on an error.

    Of the model: buffers, metrics, modes, which parameters are trained, and attributes, with the
    lists, dictionaries, small arrays and plain objects in them; with `parameters`, their values.
    """
    loggers, should_stop = trainer.loggers, trainer.should_stop
    undo = noted(pl_module, parameters=parameters)
    trainer.loggers = [Silent(logger) for logger in loggers]
    try:
        with isolate_rng():
            yield
    finally:
        trainer.loggers, trainer.should_stop = loggers, should_stop
        with torch.no_grad():
            for step in undo:
                step()


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


def noted(module: nn.Module, *, parameters: bool) -> list[Callable[[], None]]:
    """What sets back, one after the other, all that running a module may have changed."""
    undo: list[Callable[[], None]] = []
    seen: set[int] = set()
    for part in module.modules():
        seen.add(id(part))
        for buffer in part.buffers(recurse=False):
            _note_tensor(buffer, undo, seen)
        for parameter in part.parameters(recurse=False):
            undo.append(_requires_grad(parameter, parameter.requires_grad))
            if parameters:
                _note_tensor(parameter, undo, seen)
            seen.add(id(parameter))
        for value in vars(part).values():
            if isinstance(part, Metric) and isinstance(value, Tensor):
                _note_tensor(value, undo, seen)
            _note(value, undo, seen)
        undo.append(_contents(vars(part)))
    return undo


def _note(value: Any, undo: list[Callable[[], None]], seen: set[int]) -> None:
    """Note an attribute."""
    kind = type(value)
    if kind in (*MAPPINGS, *SEQUENCES, set):
        _note_container(value, undo, seen)
    elif isinstance(value, Tensor):
        if value.nbytes <= SMALL if _has_values(value) else False:
            _note_tensor(value, undo, seen)
    elif isinstance(value, np.ndarray):
        if value.nbytes <= SMALL and id(value) not in seen:
            seen.add(id(value))
            undo.append(_array(value))
    elif _is_plain_object(value) and id(value) not in seen:
        seen.add(id(value))
        for item in vars(value).values():
            _note(item, undo, seen)
        undo.append(_contents(vars(value)))


def _note_container(value: Any, undo: list[Callable[[], None]], seen: set[int]) -> None:
    if id(value) in seen:
        return
    seen.add(id(value))
    undo.append(_contents(value))
    for item in value.values() if isinstance(value, dict) else value:
        if type(item) in (*MAPPINGS, *SEQUENCES, set):
            _note_container(item, undo, seen)


def _is_plain_object(value: Any) -> bool:
    """Whether it holds numbers, texts, arrays and containers only, as a meter does."""
    attributes = getattr(value, "__dict__", None)
    return (
        type(attributes) is dict
        and not isinstance(value, type | nn.Module)
        and not callable(value)
        and all(isinstance(v, (*PLAIN, *MAPPINGS, *SEQUENCES, set, tuple))
                for v in attributes.values())
    )  # fmt: skip


def _contents(container: Any) -> Callable[[], None]:
    """Fill a container as it is now, unless nothing in it has changed."""
    is_mapping = isinstance(container, dict)
    kept = dict(container) if is_mapping else list(container)

    def restore() -> None:
        if len(container) == len(kept):
            pairs: Any = (
                ((container.get(key, kept), kept[key]) for key in kept)
                if is_mapping
                else zip(container, kept, strict=True)
            )
            if all(now is before for now, before in pairs):
                return
        container.clear()
        container.update(kept) if hasattr(container, "update") else container.extend(kept)

    return restore


def _array(array: Any) -> Callable[[], None]:
    kept = array.copy()

    def restore() -> None:
        if array.flags.writeable:
            array[...] = kept

    return restore


def _requires_grad(parameter: nn.Parameter, is_trained: bool) -> Callable[[], None]:
    def restore() -> None:
        if parameter.requires_grad != is_trained:
            parameter.requires_grad_(is_trained)

    return restore


def _has_values(tensor: Tensor) -> bool:
    return (
        not is_lazy(tensor)
        and not tensor.is_meta
        and tensor.layout == torch.strided
        and not tensor.is_inference()
    )


def _note_tensor(tensor: Tensor, undo: list[Callable[[], None]], seen: set[int]) -> None:
    """Note the values, and the memory they lie in."""
    if id(tensor) in seen or not _has_values(tensor):
        return
    seen.add(id(tensor))
    memory = tensor.data
    kept = memory.clone()

    def restore() -> None:
        tensor.data = memory
        memory.copy_(kept)

    undo.append(restore)

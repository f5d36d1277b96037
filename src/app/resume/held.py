"""What the user's objects keep beside weights and buffers: generators and counters."""

import random
import sys
from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import Metric

SHORT, MANY = 64, 1024
"""Items up to which a container is looked into for what counts or draws; objects looked at."""

SMALL = 1 << 20
"""Bytes up to which a tensor in an attribute is taken for a state, not for data."""

GENERATORS = torch.Generator, random.Random, np.random.Generator, np.random.RandomState
NUMBERS = (bool, int, float, np.integer, np.floating, np.bool_, type(None))
OUTSIDE = (*GENERATORS, *NUMBERS, str, bytes, type, Tensor, np.ndarray, pl.Trainer,
           pl.LightningModule)  # fmt: skip

Holders = Mapping[str, Any]
"""Objects by their paths."""


class Held:
    """Generators and counters in the attributes of objects, for a checkpoint.

    Args:
        holders: gives the objects as they are now.
        collects: whether they are those of a model. Small tensors in their attributes are kept
            too, where they were exchanged or changed. Flags are not, and no lists: they tell of
            what is made anew.
        leaves_out: attributes that are not the user's.
    """

    def __init__(
        self, holders: Callable[[], Holders], *, collects: bool = False, leaves_out: Any = ()
    ) -> None:
        self._holders, self._collects, self._leaves_out = holders, collects, leaves_out
        found = holders()
        self._made_with = self._counters(found)
        collected = self._collected(found)
        self._begun_with = {name: (one, _extent(one)) for name, one in collected.items()}

    def state(self) -> dict[str, Any]:
        """The states of generators, and what was counted since this was made, in plain values."""
        found = self._holders()
        collected = {
            name: {"value": one.detach().clone(), "is_here": one.device.type == "cpu"}
            for name, one in self._collected(found).items()
            if self._is_new(name, one)
        }
        return {
            "counters": {
                name: value.item() if isinstance(value, np.generic) else value
                for name, value in self._counters(found).items()
                if self._made_with.get(name, name) != value
            },
            "generators": {n: _state_of(one) for n, one in self._generators(found).items()},
            **({"collected": collected} if collected else {}),
        }

    def set_state(self, state: Mapping[str, Any], *, device: Any = "cpu") -> None:
        """Go on from what `state` returned.

        Args:
            device: where what was collected is, if not in the memory of the CPU.
        """
        holders = self._holders()
        for name, one in self._generators(holders).items():
            if name in state["generators"]:
                _set_state(one, state["generators"][name])
        collected = {
            name: one["value"].detach().to("cpu" if one["is_here"] else device, copy=True)
            for name, one in state.get("collected", {}).items()
        }
        for name, value in {**state["counters"], **collected}.items():
            path, _, attribute = name.rpartition(".")
            if path not in holders:
                continue
            attributes: Any = vars(holders[path])
            attributes[attribute] = value
            self._made_with.pop(name, None)  # and is kept from now on

    def _of(self, holders: Holders, kinds: Any) -> dict[str, Any]:
        return {
            f"{path}.{name}": value
            for path, one in holders.items()
            for name, value in vars(one).items()
            if isinstance(value, kinds) and name not in self._leaves_out
        }

    def _counters(self, holders: Holders) -> dict[str, Any]:
        """The numbers that are kept, such as an epoch."""
        counting = {p: o for p, o in holders.items() if _counts(o)}
        found = self._of(counting, NUMBERS)
        flags = bool | np.bool_ | None
        if self._collects:
            found = {name: value for name, value in found.items() if not isinstance(value, flags)}
        return found

    def _generators(self, holders: Holders) -> dict[str, Any]:
        return self._of(holders, GENERATORS)

    def _collected(self, holders: Holders) -> dict[str, Any]:
        if not self._collects:
            return {}
        return {n: one for n, one in self._of(holders, Tensor).items() if _is_small(one)}

    def _is_new(self, name: str, one: Any) -> bool:
        before, extent = self._begun_with.get(name, (None, 0))
        return before is not one or extent != _extent(one)


def _counts(one: Any) -> bool:
    """Whether the numbers of an object are kept: not of one that has a state, or is told."""
    has_state = hasattr(one, "load_state_dict") and not isinstance(one, nn.Module)
    return not has_state and not isinstance(one, DataLoader | pl.LightningDataModule)


def holders_of(loader: Any) -> Holders:
    """A loader and all that it draws samples with: samplers, data sets, transforms, its collating.

    Neither a model nor a trainer that one of them knows, nor what a data module has beside it.
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()

    def walk(path: str, one: Any) -> None:
        if isinstance(one, OUTSIDE) or id(one) in seen or len(found) >= MANY:
            return
        seen.add(id(one))
        if isinstance(one, MethodType):
            walk(path, one.__self__)
        elif isinstance(one, partial):
            for part in (one.func, one.args, one.keywords):
                walk(path, part)
        elif isinstance(one, dict | list | tuple):
            items = one.items() if isinstance(one, dict) else enumerate(one)
            for name, item in items if len(one) <= SHORT else ():
                walk(f"{path}/{name}", item)
        elif type(getattr(one, "__dict__", None)) is dict and not _is_of_python(one):
            found[path] = one
            if isinstance(one, pl.LightningDataModule):
                return
            for name, item in list(vars(one).items()):
                if name != "_iterator":
                    walk(f"{path}/{name}", item)

    walk("loader", loader)
    return found


def _is_of_python(one: Any) -> bool:
    """Whether a class is Python's own: of functions, locks, files and processes nothing is kept."""
    return type(one).__module__.partition(".")[0] in sys.stdlib_module_names


def held_by(model: pl.LightningModule) -> Held:
    """What a model and its parts keep; their metrics are kept elsewhere."""

    def holders() -> Holders:
        parts = model.named_modules()
        return {name: part for name, part in parts if not isinstance(part, Metric)}

    known = {*vars(pl.LightningModule()), *vars(nn.Module()), "fabric"}
    return Held(holders, collects=True, leaves_out=known)


def _is_small(tensor: Tensor) -> bool:
    is_here = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_nested
    return is_here and tensor.nbytes <= SMALL


def _extent(one: Tensor) -> int:
    """What tells that a tensor was changed in place."""
    return 0 if one.is_inference() else int(one._version)


def _state_of(generator: Any) -> Any:
    """The state of a generator, in plain values."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return _plain(generator.bit_generator.state)
    return _plain(generator.get_state(legacy=False))


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        version, words, gauss = state
        generator.setstate((version, tuple(words), gauss))
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = _arrays(state)
    else:
        generator.set_state(_arrays(state))


def _plain(state: Any) -> Any:
    """Arrays as tensors of whole numbers."""
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    return torch.from_numpy(state.astype(np.int64)) if isinstance(state, np.ndarray) else state


def _arrays(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _arrays(value) for key, value in state.items()}
    return state.numpy().astype(np.uint64) if isinstance(state, torch.Tensor) else state

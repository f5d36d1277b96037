"""What setting data up depends on: data kept from another process are right only where it is equal.

Known before: the configuration, the source, the versions and the state of the data module, which
make the key. Known once it has run: random numbers, files, the trainer, which are noted meanwhile.
"""

import hashlib
import importlib.util
import inspect
import json
import os
import pickle
import platform
import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import lightning
import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from app.process.random_state import random_state
from app.sharing import packed_list, packing
from app.sharing.packing import UNPICKLABLE, by_value, function_of
from app.sharing.regions import extent, is_plain, place_of, tensor_extent

READS_RANK = re.compile(
    r"\b(get_rank|get_world_size|get_node_local_rank|RANK|LOCAL_RANK|WORLD_SIZE|SLURM_PROCID|"
    r"SLURM_LOCALID)\b"
)
"""Source that asks which process it is in, other than by the trainer."""
INSTALLED = re.compile(r"/(site|dist)-packages/|^" + re.escape(sysconfig.get_path("stdlib")))
OURS = __name__.partition(".")[0]
NO_DATA = ("/proc/", "/sys/", "/dev/")


def key_of(data: pl.LightningDataModule, config: Mapping[str, Any], stage: str) -> str:
    """Of all that is known before `setup(stage)` and decides what it makes."""
    source = sources(type(data))
    decides = {
        "stage": stage,
        "data": config["data"],
        "sharing": {name: config["sharing"][name] for name in ("min_bytes", "min_items")},
        "source": sorted(_hash(content.encode()) for content in source.values()),
        "ranks": None if names_rank(source) is None else ranks_of(data),
        "state": {name: digest(value, data) for name, value in state_of(data).items()},
        "layout": [_hash(inspect.getsource(module).encode()) for module in (packed_list, packing)],
        "python": platform.python_version(),
        "libraries": [library.__version__ for library in (np, torch, lightning)],
    }
    return _hash(json.dumps(decides, sort_keys=True, default=str).encode())[:16]


def state_of(data: pl.LightningDataModule) -> dict[str, Any]:
    """The attributes of a data module that are its own: neither Lightning's nor replaced hooks."""
    return {
        name: value
        for name, value in vars(data).items()
        if name != "trainer"
        and not callable(getattr(pl.LightningDataModule, name, None))
        and not (name == "_hparams" and not value)  # made when somebody asks for it
    }


def ranks_of(data: pl.LightningDataModule) -> list[int]:
    """Number of this process, and of processes; as the trainer, else the launcher says."""
    trainer = vars(data).get("trainer")
    if trainer is not None:
        return [trainer.global_rank, trainer.world_size]
    return [int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))]


def names_rank(source: Mapping[str, str]) -> str | None:
    """How the source may ask for the process that it runs in; None where it does not."""
    found = READS_RANK.search("\n".join(source.values()))
    return None if found is None else found.group()


def sources(kind: type) -> dict[str, str]:
    """Names and sources of the modules of a class and its bases, and of those they import that are
    neither installed nor of this package."""
    found: dict[str, str] = {}
    known = pl.LightningDataModule.__mro__
    waiting = [sys.modules[base.__module__] for base in kind.__mro__ if base not in known]
    while waiting:
        module = waiting.pop()
        if module.__name__ in found:
            continue
        try:
            found[module.__name__] = inspect.getsource(module)
        except (OSError, TypeError):
            found[module.__name__] = ""
        waiting += _imported(module)
    return found


def _imported(module: ModuleType) -> Iterator[ModuleType]:
    for value in list(vars(module).values()):
        name = value.__name__ if isinstance(value, ModuleType) else _module_of(value)
        found = sys.modules.get(name)
        path = getattr(found, "__file__", None)
        if found is None or path is None or found.__name__.partition(".")[0] == OURS:
            continue
        if not INSTALLED.search(path):
            yield found


def _module_of(value: Any) -> str:
    if not isinstance(value, type) and not inspect.isroutine(value):
        return ""
    return str(getattr(value, "__module__", ""))


class NeedsTrainer(Exception):  # noqa: N818  # reads as the sentence it is
    """Data cannot be set up before there is a trainer; holds what was asked of it."""


class Noted:
    """Stands in for the trainer while data are set up, and notes what is asked of it.

    Args:
        trainer: the trainer; None where there is none yet: only what is known may be asked.
        known: attributes and their values that come before the trainer's.
    """

    def __init__(self, trainer: pl.Trainer | None, known: Mapping[str, Any]) -> None:
        vars(self).update(_trainer=trainer, _known=known, _asked={})

    def __getattr__(self, name: str) -> Any:
        if name in self._known:
            value = self._known[name]
        elif self._trainer is None:
            raise NeedsTrainer(name)
        else:
            value = getattr(self._trainer, name)
        self._asked[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if self._trainer is None:
            raise NeedsTrainer(name)
        setattr(self._trainer, name, value)
        self._asked[name] = self  # which no other process can be told

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("it holds the trainer")


class Watch:
    """Notes what the code within reads besides the data module, and what it draws.

    Attributes:
        needs: what has to be equal where the result is to be used, as plain values.
        after: the states, behind it, of the generators that were drawn from.
        private: what of the trainer was asked that no other process can be told; None where
            nothing was.
    """

    def __init__(
        self,
        data: pl.LightningDataModule,
        config: Mapping[str, Any],
        *,
        known: Mapping[str, Any] | None,
    ) -> None:
        self._data = data
        self._files = _Files(read=set(_paths_in(config["data"])), written=set())
        self._known = known
        self.needs: dict[str, Any] = {}
        self.after: dict[str, Any] = {}
        self.private: str | None = None

    def __enter__(self) -> "Watch":
        self._trainer = vars(self._data).get("trainer")
        self._noted = Noted(self._trainer, self._known or {})
        if self._trainer is not None or self._known is not None:
            self._data.trainer = self._noted  # type: ignore[assignment]
        self._before = random_state()
        _watching.append(self._files)
        _watch_files()
        return self

    def __exit__(self, *exception: object) -> None:
        _watching.remove(self._files)
        self._data.trainer = self._trainer
        after = random_state()
        drawn = [name for name in after if digest(after[name]) != digest(self._before[name])]
        self.after = {name: after[name] for name in drawn}
        asked = self._noted._asked
        plain = {name: value for name, value in asked.items() if _is_plain_value(value)}
        self.private = next((name for name in asked if name not in plain), None)
        self.needs = {
            "random": {name: digest(self._before[name]) for name in drawn},
            "files": {path: stamp for path in self._files.only_read() if (stamp := stamp_of(path))},
            "trainer": plain,
        }


def broken(needs: Mapping[str, Any], data: pl.LightningDataModule) -> str | None:
    """What is not as it was where the needs were noted; None where all is."""
    for path, stamp in needs["files"].items():
        if stamp_of(path) != stamp:
            return f"{path} has changed"
    state = random_state() if needs["random"] else {}
    if any(digest(state[name]) != found for name, found in needs["random"].items()):
        return "setup draws random numbers, and they would be others now"
    trainer = vars(data).get("trainer")
    for name, value in needs["trainer"].items():
        if getattr(trainer, name, None) != value:
            return f"trainer.{name} is {getattr(trainer, name, None)}, and was {value}"
    return None


def digest(value: Any, data: pl.LightningDataModule | None = None) -> str:
    """A hash of a value, equal in all processes; of its kind only, where it cannot be pickled."""
    for fast in (True, False):
        hasher = hashlib.sha256()
        pickler = _Hashed(_Sink(hasher), data)
        pickler.fast = fast  # not who is the same object as who, as far as there are no cycles
        with suppress(*UNPICKLABLE):
            pickler.dump(value)
            return hasher.hexdigest()
    return f"unpicklable {type(value).__qualname__}"


class _Sink:
    def __init__(self, hasher: Any) -> None:
        self.write = hasher.update


class _Hashed(pickle.Pickler):
    def __init__(self, sink: _Sink, data: pl.LightningDataModule | None) -> None:
        super().__init__(sink, protocol=5)
        self._outside = {id(data): "data", id(vars(data).get("trainer") if data else data): "none"}
        self._data = data

    def persistent_id(self, value: Any) -> Any:
        if value is not None and id(value) in self._outside:
            return self._outside[id(value)]
        if isinstance(value, set | frozenset):
            return ("set", sorted(digest(item, self._data) for item in value))
        if isinstance(value, np.ndarray) and value.size and not value.dtype.hasobject:
            return ("array", repr(value.dtype), value.shape, _content(value, extent(value)))
        if isinstance(value, Tensor) and not value.is_nested:
            return _about_tensor(value)
        return None

    def reducer_override(self, value: Any) -> Any:
        reduced = by_value(value)
        if reduced is NotImplemented:
            return reduced
        made_by, content = reduced
        if made_by is function_of:
            # not the code itself, whose bytes depend on what else holds its constants
            content = (value.__code__.co_firstlineno, *content[1:])
        return _nothing, content


def _nothing(*_: Any) -> None:
    """Stands for a class or a function in a hash."""


def _about_tensor(tensor: Tensor) -> tuple[Any, ...]:
    """Not as a pickle, which holds addresses."""
    about = (type(tensor).__qualname__, str(tensor.dtype), str(tensor.layout), tuple(tensor.shape))
    with torch.no_grad():
        dense = tensor.detach().cpu().to_dense()
        dense = dense.dequantize() if dense.is_quantized else dense.resolve_conj().resolve_neg()
    if not dense.numel():
        return (*about, tensor.requires_grad)
    content: Any = dense.contiguous().view(-1).view(torch.uint8).numpy()
    bounds = tensor_extent(tensor) if is_plain(tensor) else (0, 0)
    return (*about, tensor.requires_grad, _content(content, bounds))


def _content(array: Any, bounds: tuple[int, int]) -> Any:
    place = place_of(*bounds)
    if place is not None:
        handle, at = place
        return (handle.name, at, array.strides)
    return _hash(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _hash(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()


def stamp_of(path: str) -> list[int] | None:
    """Size and time of the last change; None where there is nothing."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def _paths_in(value: Any) -> Iterator[str]:
    """Texts of a configuration that name something on disk, which may be read unseen."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _paths_in(item)
    elif isinstance(value, str) and value and stamp_of(value):
        yield os.path.abspath(value)


def _is_plain_value(value: Any) -> bool:
    return value is None or type(value) in (bool, int, float, str)


@dataclass(eq=False)
class _Files:
    """Paths of files, and of folders that were listed."""

    read: set[str]
    written: set[str]

    def only_read(self) -> list[str]:
        return sorted(self.read - self.written)


_watching: list[_Files] = []
_hooks: list[Any] = []


def _watch_files() -> None:
    if not _hooks:
        _hooks.append(_note_file)
        sys.addaudithook(_note_file)  # for good: there is no way to take one away


def _note_file(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching or event not in ("open", "os.listdir", "os.scandir"):
        return
    path, flags = arguments[0], arguments[-1]
    if isinstance(path, str | bytes | os.PathLike):
        name = os.path.abspath(os.fsdecode(path))
        writes = isinstance(flags, int) and flags & os.O_ACCMODE != os.O_RDONLY
        if name.endswith(".pyc") and "__pycache__" in name:
            name = importlib.util.source_from_cache(name)
        is_installed = name.endswith(".py") and INSTALLED.search(name)
        if not is_installed and not name.startswith(NO_DATA):
            for files in _watching:
                (files.written if writes else files.read).add(name)

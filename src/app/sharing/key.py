"""The key of data: what is visible of all that decides what setup makes.

Data are taken from another process only where it is equal. What it cannot hold keeps data private,
until the user answers for it by `sharing.key`.
"""

import ast
import ctypes
import hashlib
import inspect
import json
import os
import platform
import re
import sys
import sysconfig
import types
from collections.abc import Collection, Iterator, Mapping
from importlib.util import resolve_name
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch

from app.process.random_state import sampling_state
from app.sharing.packed_list import is_plain
from app.sharing.packing import Pickler

READS_RANK = re.compile(
    r"\b(get_rank|get_world_size|get_node_local_rank|RANK|LOCAL_RANK|WORLD_SIZE|SLURM_PROCID|"
    r"SLURM_LOCALID|barrier)\b"
)
"""Source that asks which process it is in, other than by the trainer, or waits for others."""
READS_SEED = re.compile(r"\b(initial_seed|PL_GLOBAL_SEED)\b")
"""Source that asks for the seed: it draws no number, and depends on it."""
INSTALLED = re.compile(r"/(site|dist)-packages/|^" + re.escape(sysconfig.get_path("stdlib")))
OURS = __name__.partition(".")[0]
MANY_FILES = 100_000
"""Files in a folder that are looked at before data are set up: a second or two."""
WHOLE = f"it holds sharing.cache, or more than {MANY_FILES:,} files"


class Key(NamedTuple):
    """What decides the data.

    Attributes:
        text: a hash of what is seen, the same in all processes.
        unseen: the attributes and paths that are not, with the reasons.
        rank: how the source may ask for the process that it runs in; None where it does not.
    """

    text: str
    unseen: dict[str, str]
    rank: str | None


def key_of(data: pl.LightningDataModule, config: Any, about: Any) -> Key:
    """The key of what setup makes, without files.

    Args:
        config: the configuration of the data.
        about: what else decides it.
    """
    states, unseen, modules = {}, {}, set[str]()
    for name, value in state_of(data).items():
        try:
            states[name] = digest(value, outside={"": data}, modules=modules)
        except Exception as error:  # whatever an object raises that is not to be pickled
            unseen[name] = str(error)
    source, versions = own_sources(data)
    text = "\n".join(source.values())
    rank = READS_RANK.search(text)
    decides = [
        *(about, config, states, source, versions, sources(modules)),
        ranks_of(data) if rank else None,
        torch.initial_seed() if READS_SEED.search(text) else None,
        [path.read_text() for path in sorted(Path(__file__).parent.glob("*.py"))],
        *(platform.python_version(), np.__version__, torch.__version__),
    ]
    return Key(
        digest(json.dumps(decides, sort_keys=True, default=str))[:16], unseen, rank and rank.group()
    )


def with_files(key: Key, data: pl.LightningDataModule, config: Any, cache: Path) -> Key:
    """The key that also holds the files which configuration, attributes and source name: their
    sizes, and the times of their last changes.

    Args:
        cache: what lies there is written meanwhile.
    """
    stamps = {path: _stamp(path, cache) for path in sorted(set(_named(config, data)))}
    unseen = {path: WHOLE for path, stamp in stamps.items() if stamp is None}
    return Key(digest([key.text, stamps])[:16], key.unseen | unseen, key.rank)


def names_of(key: Key) -> list[str]:
    """The names of data whose setup draws no random number, and of those drawn from here on."""
    return [key.text, f"{key.text}-{digest(sampling_state())[:16]}"]


def digest(
    value: Any, outside: Mapping[str, Any] | None = None, modules: set[str] | None = None
) -> str:
    """A hash of a value, equal in all processes. Raises what pickling raises.

    Args:
        modules: takes the names of the modules of its classes and functions.
    """
    hasher = hashlib.sha256()
    pickler = _Hashed(SimpleNamespace(write=hasher.update), None, outside or {})
    pickler.modules = set() if modules is None else modules
    pickler.fast = True  # by value: not who is the same object as who
    pickler.dump(value)
    for memory in pickler.memories:
        for address, size, _ in memory.parts():
            hasher.update((ctypes.c_char * size).from_address(address))
    return hasher.hexdigest()


class _Hashed(Pickler):
    modules: set[str]

    def persistent_id(self, value: Any) -> Any:
        about: tuple[Any, ...] = ()
        if isinstance(value, set | frozenset):
            return ("set", sorted(digest(item, modules=self.modules) for item in value))
        if type(value) is torch.Tensor and is_plain(value):
            about = (str(value.dtype), tuple(value.shape), value.requires_grad)
            value = value.detach().reshape(-1).view(torch.uint8).numpy()
        if type(value) is np.ndarray and not value.dtype.hasobject:
            content = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
            return (
                repr(value.dtype),
                value.shape,
                *about,
                hashlib.sha256(content.data).hexdigest(),
            )
        return super().persistent_id(value)

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, type | types.FunctionType):
            self.modules.add(value.__module__)
        return super().reducer_override(value)


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


def own_sources(data: pl.LightningDataModule) -> tuple[dict[str, str], dict[str, str]]:
    """The sources from which a data module was made; see `sources`."""
    known = pl.LightningDataModule.__mro__
    return sources({base.__module__ for base in type(data).__mro__ if base not in known})


def sources(modules: Collection[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The sources of modules and of those they import; the versions of what else is installed."""
    found: dict[str, str] = {}
    versions: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        module, package = sys.modules.get(name), name.partition(".")[0]
        path = getattr(module, "__file__", None) or ""
        is_asked = name in modules
        if (
            name in found
            or module is None
            or not path.endswith(".py")
            or (package == OURS and not is_asked)
        ):
            continue
        if INSTALLED.search(path) and not is_asked:
            versions[package] = str(getattr(sys.modules[package], "__version__", ""))
            continue
        found[name] = Path(path).read_text(errors="replace")
        for value in [held for name, held in vars(module).items() if name.isidentifier()]:
            if isinstance(value, types.ModuleType):
                waiting.append(value.__name__)
            elif isinstance(value, type) or inspect.isroutine(value):
                waiting.append(str(value.__module__))
        waiting += _imports(found[name], str(module.__package__))
    return found, versions


def _imports(source: str, package: str) -> Iterator[str]:
    """The modules that a source imports while it is imported itself, also for a number in them."""
    nodes: list[ast.AST] = [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            nodes += ast.iter_child_nodes(node)


def _named(config: Any, data: pl.LightningDataModule) -> Iterator[str]:
    """Texts that are there as a file, or but for those in the source, as a folder."""
    waiting: list[Any] = [config, state_of(data)]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
        elif isinstance(value, str | os.PathLike) and os.path.exists(value):
            yield os.path.abspath(value)
    for source in own_sources(data)[0].values():
        for node in ast.walk(ast.parse(source)):
            value = node.value if isinstance(node, ast.Constant) else None
            if isinstance(value, str) and os.path.isfile(value):
                yield os.path.abspath(value)


def _stamp(path: str, cache: Path) -> Any:
    """Size and time of the last change of a file, of all in a folder; None where that is not to be
    told."""
    if not os.path.isdir(path):
        found = os.stat(path)
        return [found.st_size, found.st_mtime_ns]
    if cache.resolve().is_relative_to(Path(path).resolve()):
        return None
    stamps = []
    for folder, _, names in os.walk(path, followlinks=True):
        for name in names:
            file = os.path.join(folder, name)
            stamps.append([file, *_stamp(file, cache)])
        if len(stamps) > MANY_FILES:
            return None
    return sorted(stamps)

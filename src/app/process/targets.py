"""The classes that a configuration names, and what they take."""

import difflib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from importlib import import_module
from inspect import Parameter
from pathlib import Path
from types import ModuleType
from typing import Any

from app.errors import Refused
from app.process.imports import one_lightning

BASES = {
    "model": ("lightning.pytorch", "LightningModule"),
    "data": ("lightning.pytorch", "LightningDataModule"),
    "callbacks": ("lightning.pytorch", "Callback"),
    "logger": ("lightning.pytorch.loggers", "Logger"),
    "accumulate": ("lightning.pytorch", "Callback"),
    "clip": ("lightning.pytorch", "Callback"),
    "averaging": ("lightning.pytorch", "Callback"),
    "trainer": ("app.run.trainer", "Trainer"),
}
"""Of what the class of a group has to be derived, by module and name: they take long to import."""


def named_in(config: Mapping[str, Any]) -> set[str]:
    """The names of all classes in a configuration."""
    return {node["_target_"] for _, node in _targets(config, "")}


def refuse_targets(config: Mapping[str, Any]) -> None:
    """Raise Refused where a class cannot be imported, is of another kind than its place is for, or
    does not take what it would be given. Calls none.

    What is below `_recursive_: false` its class builds itself, with arguments of its own.
    """
    targets = list(_targets(config, ""))
    left = tuple(f"{key}." for key, node in targets if node.get("_recursive_") is False)
    for key, node in targets:
        found = located(key, node["_target_"])
        group, *inside = key.split(".")
        if group in BASES and len(inside) == (group in ("callbacks", "logger")):
            _refuse_other_kind(key, node["_target_"], found, *BASES[group])
        if key != "trainer" and not key.startswith(left):  # which get more than their settings
            _refuse_arguments(key, node, found)


def _refuse_other_kind(
    key: str, target: str, found: Callable[..., Any], module: str, name: str
) -> None:
    """A function may make one, but not one of Python's own or torch's: those make none."""
    if isinstance(found, type):
        is_one = issubclass(found, getattr(import_module(module), name))
    else:
        is_one = target.partition(".")[0] not in (*sys.stdlib_module_names, "torch", "numpy")
    if not is_one:
        above = found.__mro__ if isinstance(found, type) else ()
        other = any(base.__module__.partition(".")[0] == "pytorch_lightning" for base in above)
        instead = "import lightning.pytorch, not pytorch_lightning, whose classes are others"
        instead = instead if other else f"type {key}._target_=package.Class"
        raise Refused(f"{key}._target_ must be a {name}, got {target}; {instead}")


def located(key: str, name: str) -> Callable[..., Any]:
    """The class or function of a name. Raises Refused where it cannot be imported, or called."""
    rule = f"{key}._target_ must be package.module.Class, got {name}"
    try:
        found = _found(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # of a module of the user's: anything, sys.exit too
        raise Refused(f"{rule}: {_origin(error)}{_hidden(name)}") from error
    if not callable(found):
        is_module = isinstance(found, ModuleType)
        what = f"module; type {key}._target_={name}.CLASS" if is_module else type(found).__name__
        raise Refused(f"{rule}, which is a {what}")
    return found  # type: ignore[no-any-return]


def _hidden(name: str) -> str:
    """What to say where a package `app` of the user's may be meant, which this one hides."""
    theirs, ours = Path("app"), Path(__file__).parents[1]
    if not name.startswith("app.") or not theirs.is_dir() or theirs.samefile(ours):
        return ""
    return f"; {theirs.absolute()} is hidden by this package, app too: rename it"


def _found(name: str) -> Any:
    """What a dotted name stands for; imports the longest part of it that is a module."""
    one_lightning()
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        try:
            found: Any = import_module(module)
        except ModuleNotFoundError as error:
            if length > 1 and error.name is not None and f"{module}.".startswith(f"{error.name}."):
                continue
            raise
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise AssertionError("a name has parts")


def _targets(node: Any, key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping that names a class, by its key."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield key, node
        for name, item in node.items():
            yield from _targets(item, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for index, item in enumerate(node):
            yield from _targets(item, f"{key}[{index}]")


HYDRAS = {"_args_": list, "_partial_": bool, "_recursive_": bool, "_convert_": str}
"""Keys beside `_target_` that Hydra reads, and what they hold."""


NAMED = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
BESIDE = {
    "optimizer": ("groups", "layer_decay", "adamw_for", "adamw_lr_scale"),
    "scheduler": ("interval", "frequency", "monitor"),
}
"""Groups whose class is given one more argument by the run, and keys of them that are the run's,
where the class does not take them."""


def given_by_run(key: str, found: Callable[..., Any]) -> str | None:
    """The argument that the run gives: `params` or `optimizer`, else the first that has a name."""
    names = [name for name, p in inspect.signature(found).parameters.items() if p.kind in NAMED]
    usual = "optimizer" if key == "scheduler" else "params"
    return usual if usual in names else next(iter(names), None)


def makes_itself(found: Callable[..., Any], node: Mapping[str, Any]) -> bool:
    """Whether the objects of a class are what is called with the first argument, not the class."""
    above = found.__mro__ if isinstance(found, type) else ()
    return not node.get("_partial_") and any("__call__" in vars(kind) for kind in above)


def _refuse_arguments(key: str, node: Mapping[str, Any], found: Callable[..., Any]) -> None:
    for name, kind in HYDRAS.items():
        if name in node and not isinstance(node[name], kind):
            raise Refused(f"{key}.{name} must be a {kind.__name__}, got {node[name]}; leave it out")
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # of a class written in C
        return
    parameters = signature.parameters
    not_given = {*HYDRAS, "_target_", *({*BESIDE.get(key, ())} - {*parameters})}
    if key == "optimizer" and node.get("lr") is None:  # is that of the class
        not_given.add("lr")
    given = {str(name): value for name, value in node.items() if name not in not_given}
    takes_any = any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values())
    known = [name for name, p in parameters.items() if p.kind in NAMED]
    for name in given:
        if name not in known and not takes_any:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {key}.{near[0]}?" if near else f"it takes {_list(known)}"
            raise Refused(f"{key}.{name} is not an argument of {node['_target_']}; {hint}")
    is_given_one = key in BESIDE and not makes_itself(found, node)
    of_the_run = given_by_run(key, found) if is_given_one else None
    if of_the_run in given:
        raise Refused(f"{key}.{of_the_run} is given by the run; leave it out")
    for name in given.keys() & parameters.keys():
        members = _members(parameters[name])
        if members and isinstance(given[name], str) and given[name] not in members:
            raise Refused(f"{key}.{name} must be one of {', '.join(members)}, got {given[name]}")
    known = [name for name in known if name != of_the_run]
    is_partial = node.get("_partial_") or is_given_one
    bind = signature.bind_partial if is_partial else signature.bind
    for name in known:
        if (
            (is_given_one or not is_partial)
            and parameters[name].default is Parameter.empty
            and not (name in given or node.get("_args_"))
        ):
            group, _, inside = key.partition(".")
            is_theirs = group in ("model", "data")
            plus = "" if is_theirs else "+"
            later = f", or {key}._partial_=true where the {group} calls it"
            later = later if is_theirs and inside else ""
            raise Refused(
                f"{key}.{name} is required by {node['_target_']}; type {plus}{key}.{name}=VALUE"
                f"{later}"
            )
    try:
        bind(*node.get("_args_", ()), **given)
    except TypeError as error:
        raise Refused(f"{key}: {error}, of {node['_target_']}; mend {key}._args_") from None


def _members(parameter: Parameter) -> dict[str, Enum]:
    """The members of the Enum that an argument wants one of, by their names and texts."""
    for kind in (type(parameter.default), parameter.annotation):
        if isinstance(kind, type) and issubclass(kind, Enum):
            texts = {one.value: one for one in kind if isinstance(one.value, str)}
            return {**texts, **kind.__members__}
    return {}


def with_members(node: Any) -> Any:
    """What a class is made of, with members of an Enum where it wants such and a text stands."""
    if not (isinstance(node, Mapping) and "_target_" in node):
        return node
    try:
        parameters = inspect.signature(located("", node["_target_"])).parameters
    except (TypeError, ValueError):  # of a class written in C
        return node
    known = {name: _members(p) for name, p in parameters.items() if name in node}
    return {n: known.get(n, {}).get(v, v) if isinstance(v, str) else v for n, v in node.items()}


def taken(key: str, node: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """What is given to the class of a node: not what it does not take of `common`, unless typed."""
    try:
        parameters = inspect.signature(located(key, node["_target_"])).parameters
    except (TypeError, ValueError):  # of a class written in C
        return dict(node)
    if any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values()):
        return dict(node)
    left_out = {
        name for name in common.keys() - parameters.keys() if node.get(name) == common[name]
    }
    return {name: value for name, value in node.items() if name not in left_out}


def _list(names: list[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if names[10:] else "") if names else "no arguments"


def _origin(error: BaseException) -> str:
    """The error that began it, and where in whose file."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg}, {error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if "importlib" not in f.filename and f.filename != __file__]
    place = f", {theirs[-1].filename}:{theirs[-1].lineno}" if theirs else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"

"""What the data know once they are set up, and the model gets: `link`. Needs no torch."""

import difflib
from collections.abc import Mapping, Sequence
from types import BuiltinMethodType, FunctionType, MethodType, MethodWrapperType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from app.errors import Refused

METHODS = (MethodType, FunctionType, BuiltinMethodType, MethodWrapperType)
PLAIN = (bool, int, float, str, type(None))
OTHERS = ("data", "trainer", "strategy", "sharing", "launch", "sweep", "logger")
"""Groups that are needed before the data are set up."""


def links_of(cfg: DictConfig) -> dict[str, str]:
    """The keys that get what the data know, each with where these have it.

    Raises Refused where one cannot.
    """
    link = cfg.get("link") or {}
    if not isinstance(link, DictConfig | dict):
        return {}  # which its schema refuses
    found = {str(key): str(source) for key, source in link.items()}
    for key in found:
        group, _, name = key.partition(".")
        if not name or group in OTHERS or group not in cfg:
            raise Refused(
                f"link must name keys such as model.num_classes, got {key}; type "
                "'link={model.num_classes: num_classes}'"
            )
        if cfg.get("data") is None:
            raise Refused(
                f"link.{key} reads what a LightningDataModule knows, and data=none has none; type "
                f"{key}=VALUE"
            )
    return found


def are_typed(cfg: DictConfig, links: Mapping[str, str]) -> bool:
    """Whether a schema wants the keys, so that nothing can be checked before they are known."""
    groups = {key.partition(".")[0] for key in links}
    return any(OmegaConf.get_type(cfg, group) not in (dict, None) for group in groups)


def known_by(data: object, links: Mapping[str, str]) -> dict[str, Any]:
    """The values of the keys, of data that are set up.

    Raises Refused where these have no such attribute, or it is nothing that a key can hold.
    """
    return {key: _plain(_found(data, source, key), source, key) for key, source in links.items()}


def _found(data: object, source: str, key: str) -> Any:
    """An attribute, an entry, or what a method without arguments returns, by its dotted path."""
    found: Any = data
    for part in source.split("."):
        place = "the data" if found is data else "it"
        name = f"{type(found).__module__}.{type(found).__qualname__}"
        try:
            if hasattr(found, part):
                found = getattr(found, part)
                found = found() if isinstance(found, METHODS) else found
            else:
                is_index = isinstance(found, Sequence) and part.isdigit()
                found = found[int(part) if is_index else part]
        except (KeyError, IndexError, TypeError):
            known = [one for one in _names(found) if one[0] != "_"]
            near = difflib.get_close_matches(part, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known[:10])}"
            raise Refused(
                f"link.{key}={source}: {place}, a {name}, has no {part}; {hint}"
            ) from None
    return found


def _names(found: Any) -> list[str]:
    """What can be asked for: entries, or attributes, its own before those of its classes."""
    if isinstance(found, Mapping):
        return sorted(map(str, found))
    own = sorted(getattr(found, "__dict__", ()))
    classes = [one for one in type(found).__mro__ if not one.__module__.startswith("lightning.")]
    return [*own, *sorted({name for one in classes[:-1] for name in vars(one)} - {*own})]


def _plain(value: Any, source: str, key: str) -> Any:
    """A value as a key holds it: of a tensor or an array its numbers."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if type(value) in PLAIN:
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, source, key) for item in value]
    if isinstance(value, Mapping) and all(type(name) is str for name in value):
        return {name: _plain(item, source, key) for name, item in value.items()}
    raise Refused(
        f"link.{key}={source} must be a number, a text, or a list or mapping of them, got a "
        f"{type(value).__name__}; for how many it holds type '{{{key}: {source}.__len__}}'"
    )


def rows(links: Mapping[str, str], values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is said of them at the start."""
    return [("link", f"{key}={values[key]} (the data's {links[key]})") for key in links]

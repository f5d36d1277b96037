"""What the classes of the user's model and data say of their own arguments. Needs no torch itself:
importing the classes does."""

import inspect
import math
from inspect import Parameter
from typing import Any

from omegaconf import DictConfig, OmegaConf

from app.config import TARGET
from app.process.imports import importing
from app.process.targets import located

GROUPS = ("model", "data")
NAMED = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


def unsaid(cfg: DictConfig) -> dict[str, Any]:
    """Dotted keys that nothing sets, with the defaults that the constructors have for them.

    Numbers, texts, true, false and null, and lists and mappings of them. Raises Refused where a
    class cannot be imported.
    """
    found: dict[str, Any] = {}
    for group in GROUPS:
        if not is_of_user(cfg, group) or "_args_" in cfg[group]:
            continue
        with importing():
            made_by = located(group, cfg[group]._target_)
        try:
            parameters = inspect.signature(made_by).parameters.values()
        except (TypeError, ValueError):  # of a class written in C
            continue
        found |= {
            f"{group}.{one.name}": one.default
            for one in parameters
            if one.kind in NAMED and one.name not in cfg[group] and _is_plain(one.default)
        }
    return found


def is_of_user(cfg: DictConfig, group: str) -> bool:
    """Whether a group names a class of which no schema tells what it takes."""
    if cfg.get(group) is None or OmegaConf.get_type(cfg, group) is not dict:
        return False
    target = None if OmegaConf.is_missing(cfg[group], "_target_") else cfg[group].get("_target_")
    return isinstance(target, str) and TARGET.fullmatch(target) is not None


def rows(cfg: DictConfig) -> list[tuple[str, str]]:
    """What is said at the start of a number that nobody has chosen for a model of the user's."""
    is_untyped = OmegaConf.is_interpolation(cfg.trainer, "max_epochs")
    if not (is_untyped and is_of_user(cfg, "model")):
        return []
    epochs = cfg.trainer.max_epochs
    return [("default", f"trainer.max_epochs={epochs}, as of the demo: type trainer.max_epochs=N")]


def completed(cfg: DictConfig) -> DictConfig:
    """A configuration as it is shown: with what the constructors say."""
    for key, value in unsaid(cfg).items():
        OmegaConf.update(cfg, key, value, force_add=True)
    return cfg


def _is_plain(value: Any) -> bool:
    """Whether a configuration holds it as it is: a tuple would become a list."""
    if type(value) is str:
        return "${" not in value and value != "???"
    if type(value) is list:
        return all(map(_is_plain, value))
    if type(value) is dict:
        names = all(type(name) is str and name.isidentifier() for name in value)
        return names and "_target_" not in value and all(map(_is_plain, value.values()))
    if type(value) is float:
        return not math.isnan(value)
    return value is None or type(value) in (bool, int)

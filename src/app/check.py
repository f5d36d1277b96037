"""Checks a configuration without training: `python -m app.check averaging=ema clip=value`.

`python -m app.check --matrix` prints which presets run with which strategy.
"""

import sys
from typing import Any

from omegaconf import DictConfig, OmegaConf

from app import cli
from app.errors import Refused
from app.imports import importing

BUILT = ("optimizer", "scheduler", "accumulate", "clip", "averaging")
"""Groups that can be off while a file sets keys of them, of which nothing can be built."""


def check(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain containers, every value and combination of it allowed.

    Imports neither torch nor Lightning.

    Raises:
        Refused: with the key as typed, the rule, the value, and what to type instead.
    """
    for group in BUILT:
        chosen = cfg.get(group)
        if chosen and OmegaConf.get_type(chosen) is dict and "_target_" not in chosen:
            raise Refused(cli.no_effect(f"{group}.{next(iter(chosen))}", group))
    try:
        OmegaConf.to_object(cfg)  # runs the rules of every schema
    except ValueError as error:
        if type(error) is not ValueError:  # one of OmegaConf's own, explained by the command line
            raise
        raise Refused(str(error)) from None
    config = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def describe(config: dict[str, Any]) -> list[tuple[str, str]]:
    """A row per group that is on: its name, and its class with its settings."""
    rows = []
    for group, chosen in config.items():
        if not isinstance(chosen, dict) or group in ("logger", "callbacks", "trainer", "tuner"):
            continue
        settings = {
            key: value
            for key, value in chosen.items()
            if not key.startswith("_") and value is not None
        }
        kind = str(chosen.get("_target_", "")).rpartition(".")[2]
        values = " ".join(f"{key}={value}" for key, value in settings.items())
        rows.append((group, f"{kind} {values}".strip()))
    return rows


def main(cfg: DictConfig) -> None:
    """Check, and say what is on.

    Builds a model that is not ours: only it knows whether it steps its own optimizers.
    """
    config = check(cfg)
    if not config["model"]["_target_"].startswith("app."):
        with importing():
            from app.build import build
        try:
            build(config, [])
        except (TypeError, ValueError) as error:
            raise Refused(str(error)) from error
    for name, text in describe(config):
        print(f"{name:<12}{text}")
    print("ok")


if __name__ == "__main__":
    if sys.argv[1:] == ["--matrix"]:
        from app.matrix import matrix

        print(matrix())
    else:
        cli.main(main, "check", __doc__)

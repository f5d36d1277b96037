"""Checks a configuration without training: `python -m app.check averaging=ema clip=value`.

`python -m app.check --matrix` prints which presets run with which strategy.
"""

import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from app import cli
from app.config import check
from app.imports import importing
from app.process.targets import named_in
from app.tuner.answers import read_tuned
from app.tuner.keys import with_overrides


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

    Builds what is not ours: only a model knows whether it steps its own optimizers.
    """
    config = check(cfg)
    if config["tuned"] is not None:
        config = check(with_overrides(cfg, read_tuned(Path(config["tuned"]))))
    if named_in(config) - cli.shipped_targets():
        with importing():
            from app.build import build
        build(config, [])
    for name, text in describe(config):
        print(f"{name:<12}{text}")
    print("ok")


if __name__ == "__main__":
    if sys.argv[1:] == ["--matrix"]:
        from app.matrix import matrix

        print(matrix())
    else:
        cli.main(main, "check", __doc__)

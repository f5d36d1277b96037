"""What presets stand for, composed and built as `app.train` does it."""

from typing import Any

from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import DictConfig

from app.cli import VERSION_BASE
from app.config import Config, check


def composed(*typed: str, run_dir: str = "unused") -> DictConfig:
    """The configuration of a run on the CPU."""
    here = (f"run_dir={run_dir}", "name=unused", "trainer.accelerator=cpu")
    with initialize_config_module("app.conf", version_base=VERSION_BASE):
        return compose("train", [*here, *typed])


def checked(*typed: str, run_dir: str = "unused") -> Config:
    """Likewise, checked."""
    return check(composed(*typed, run_dir=run_dir))


def built(group: str, *typed: str) -> Any:
    """The object of a group."""
    return instantiate(composed(*typed)[group], _convert_="all")

"""Composed, checked configurations, runs of a few steps and waiting, for every test file."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hypothesis import HealthCheck, settings
from omegaconf import DictConfig, OmegaConf

from app import conf
from app.config import Config, check, plain, refuse_values
from app.matrix import NEEDED

for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
    # processes that tests start and signal would ignore them too, as under nohup or behind an &
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler)

COMMON: Any = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
settings.register_profile("short", max_examples=100, derandomize=True, **COMMON)
settings.register_profile("long", max_examples=3000, **COMMON)  # --hypothesis-profile=long
settings.load_profile("short")

SMALL = ("model.channels=4", "trainer.max_epochs=2", "trainer.limit_train_batches=6",
         "trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "callbacks.progress=null",
         "logger=csv", "data.batch_size=16", "trainer.accelerator=cpu")  # fmt: skip
"""A run of the default model that takes a tenth of a second."""


def presets_of(group: str) -> list[str]:
    """The presets of a group that build something, by the files that are there."""
    files = Path(conf.__file__).parent.glob(f"{group}/*.yaml")
    return sorted(path.stem for path in files if path.stem not in ("none", "custom"))


def numbers_of(group: str, preset: str) -> dict[str, Any]:
    """What the file of a preset sets, without what its schema adds."""
    with initialize_config_module("app.conf", version_base="1.3"):
        chosen = [f"{group}={preset}", *NEEDED.get(f"{group}={preset}", [])]
        cfg = compose("train", ["run_dir=.", "name=numbers", *chosen])
    return plain(cfg)[group]


def wait_until(holds: Callable[[], bool], timeout_s: float = 120) -> None:
    """Wait for what takes a moment on an idle machine; the time-out ends a hang."""
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def refuse(group: str, node: Any) -> None:
    """Raise what `check` raises of a group alone: a schema with its values, or a composed one."""
    refuse_values(OmegaConf.create({group: node}))
    OmegaConf.to_object(node if isinstance(node, DictConfig) else OmegaConf.structured(node))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def composed(tmp_path: Path) -> Callable[..., DictConfig]:
    """Compose `overrides` over `config_name` as the command line does."""

    def compose_(*overrides: str, config_name: str = "train") -> DictConfig:
        with initialize_config_module("app.conf", version_base="1.3"):
            return compose(config_name, [f"run_dir={tmp_path}/run", "name=run", *overrides])

    return compose_


@pytest.fixture
def checked(composed: Callable[..., DictConfig]) -> Callable[..., Config]:
    """Compose and check."""
    return lambda *overrides: check(composed(*overrides))

"""Where metrics go: with and without TensorBoard, and to loggers that others have written."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.fabric.loggers.tensorboard as theirs
import lightning.pytorch as pl
import pytest
from conftest import SMALL
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from omegaconf import DictConfig

from app.errors import Refused
from app.fit import run

SAID = (
    "no TensorBoard is installed: metrics are in metrics.csv; to have it pip install -e "
    "'.[tensorboard]'\n"
)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if TensorBoard was not installed."""
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(theirs, name, False)


@pytest.mark.usefixtures("bare")
def test_without_tensorboard_the_default_is_metrics_csv_said_once(
    composed: Callable[..., DictConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = composed(*SMALL, "logger=default", "tuner=lr_find", "tuner.lr.num_steps=10")
    run(cfg, typed=[])
    assert capsys.readouterr().out.count(SAID) == 1
    assert (tmp_path / "run/metrics.csv").exists()
    assert not (tmp_path / "run/tensorboard").exists()


def test_a_run_goes_on_where_tensorboard_is_missing(
    composed: Callable[..., DictConfig], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    cfg = composed(*SMALL, "logger=default", "+callbacks.cut._target_=test_logger.Cut")
    with pytest.raises(RuntimeError, match="cut"):
        run(cfg, typed=[])
    assert (tmp_path / "run/tensorboard").exists()
    request.getfixturevalue("bare")
    result = run(cfg, typed=[])
    assert result is not None
    assert result["epochs"] == 2


@pytest.mark.usefixtures("bare")
def test_tensorboard_alone_is_refused_where_it_is_missing(checked: Callable[..., Any]) -> None:
    with pytest.raises(Refused) as refusal:
        checked("logger=tensorboard")
    assert str(refusal.value) == (
        "logger.tensorboard needs the package tensorboard, which is not installed; type pip "
        "install -e '.[tensorboard]', or use logger=csv"
    )


def test_what_is_said_of_a_missing_tensorboard_does_not_change_what_a_run_is(
    checked: Callable[..., Any], request: pytest.FixtureRequest
) -> None:
    with_it = checked("logger=default").plain
    request.getfixturevalue("bare")
    assert checked("logger=default").plain == with_it


class Cut(pl.Callback):
    """Fails the first time that the second epoch begins."""

    has_cut = False

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.current_epoch == 1 and not Cut.has_cut:
            Cut.has_cut = True
            raise RuntimeError("cut")


class Least(Logger):
    """As in Lightning's documentation: only what is abstract."""

    @property
    def name(self) -> str:
        return "least"

    @property
    def version(self) -> str:
        return "0.1"

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert metrics

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""


class Flushed(TensorBoardLogger):
    """A subclass that adds to what is logged, as many projects have one."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        metrics = {name.replace("_", "/", 1): value for name, value in metrics.items()}
        super().log_metrics(metrics, step)
        self.experiment.flush()


def factory(save_dir: str) -> Logger:
    return CSVLogger(save_dir, name="made", version=0)


THEIRS = {
    "Lightning's csv": ("+logger.mine._target_=lightning.pytorch.loggers.CSVLogger",
                        "+logger.mine.save_dir=${run_dir}", "+logger.mine.name=theirs"),
    "no more than abstract": ("+logger.mine._target_=test_logger.Least",),
    "a subclass": ("+logger.mine._target_=test_logger.Flushed", "+logger.mine.save_dir=${run_dir}"),
    "a function": ("+logger.mine._target_=test_logger.factory",
                   "+logger.mine.save_dir=${run_dir}"),
    "alone": ("logger.csv=null", "+logger.mine._target_=test_logger.Least"),
}  # fmt: skip


@pytest.mark.parametrize("typed", THEIRS.values(), ids=THEIRS)
@pytest.mark.parametrize("preset", ["csv", "default"])
def test_a_logger_of_others_stands_beside_ours(
    preset: str, typed: tuple[str, ...], composed: Callable[..., DictConfig]
) -> None:
    result = run(composed(*SMALL, f"logger={preset}", *typed), typed=[])
    assert result is not None
    assert result["status"] == "finished"

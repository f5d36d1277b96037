"""Schedules of the learning rate step as they say, also in a run that was cut."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from scheduled import TORCH
from torch.optim import lr_scheduler

from app.run.build import Run, build
from app.run.checkpoint import newest_intact

BASE = ("model=custom", "model._target_=scheduled.Hooked", "data=custom",
        "data._target_=scheduled.Points", "optimizer=none", "clip=none", "trainer.max_epochs=4",
        "logger=csv", "callbacks.progress=null", "trainer.accelerator=cpu",
        "trainer.log_every_n_steps=1", "callbacks.checkpoint.every_n_steps=1")  # fmt: skip
"""Four epochs of five batches."""


class Cut(Exception):  # noqa: N818  # the end of the power, not an error of the program
    pass


class CutAt(pl.Callback):
    """Ends the process, as far as the run can tell, in a hook of an epoch or batch."""

    def __init__(self, hook: str, at: int) -> None:
        self.hook = hook
        self.at = at

    def _cut(self, trainer: Any, hook: str) -> None:
        loop = trainer.fit_loop
        now = loop.total_batch_idx if "batch" in hook else loop.epoch_progress.current.ready - 1
        if (hook, now) == (self.hook, self.at) and not trainer.sanity_checking:
            raise Cut

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        self._cut(trainer, "on_train_batch_start")

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self._cut(trainer, "on_train_batch_end")

    def on_train_epoch_start(self, trainer: Any, *args: Any) -> None:
        self._cut(trainer, "on_train_epoch_start")

    def on_train_epoch_end(self, trainer: Any, *args: Any) -> None:
        self._cut(trainer, "on_train_epoch_end")

    def on_validation_start(self, trainer: Any, *args: Any) -> None:
        self._cut(trainer, "on_validation_start")

    def on_validation_end(self, trainer: Any, *args: Any) -> None:
        self._cut(trainer, "on_validation_end")


def fit(config: Any, *callbacks: pl.Callback) -> Run:
    run = build(config, callbacks)
    checkpoint = newest_intact(Path(config.run_dir) / "checkpoints")
    is_cut = False
    try:
        run.trainer.fit(run.model, datamodule=run.data, ckpt_path=checkpoint)
    except Cut:
        is_cut = True
    assert is_cut == bool(callbacks)
    return run


def state(run: Run) -> Any:
    """What a schedule has come to, from the checkpoint that the fit wrote last, and the rate."""
    path = Path(run.trainer.default_root_dir) / "checkpoints/last.ckpt"
    content = torch.load(path, weights_only=True)
    return content["lr_schedulers"], content["optimizer_states"][0]["param_groups"][0]["lr"]


CUTS = (("on_train_batch_start", 3), ("on_validation_start", 0), ("on_train_epoch_end", 0),
        ("on_train_epoch_start", 1), ("on_train_batch_end", 9), ("on_validation_end", 1),
        ("on_train_batch_start", 10), ("on_train_batch_start", 11),
        ("on_train_epoch_start", 3))  # fmt: skip
"""In an epoch, in a validation, and before, at and after an epoch's end."""


def equal_after_cuts(
    checked: Callable[..., Any], tmp_path: Path, *typed: str, cuts: Any = CUTS
) -> None:
    """One run is cut here and there and always goes on; it equals one that was not."""
    whole = fit(checked(*BASE, *typed, f"run_dir={tmp_path}/whole"))
    config = checked(*BASE, *typed, f"run_dir={tmp_path}/cut")
    rates: dict[int, float] = {}
    for cut in cuts:
        rates |= fit(config, CutAt(*cut)).model.rates
    last = fit(config)
    assert {**rates, **last.model.rates} == whole.model.rates
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, last.model.state_dict()[name]), name
    assert state(last) == state(whole)
    lines = [(tmp_path / of / "metrics.csv").read_text() for of in ("whole", "cut")]
    assert lines[0] == lines[1]


def test_every_schedule_of_torch_is_in_the_table() -> None:
    found = {
        name
        for name, kind in inspect.getmembers(lr_scheduler, inspect.isclass)
        if issubclass(kind, lr_scheduler.LRScheduler) and kind.__module__ == lr_scheduler.__name__
    }
    assert found - {"LRScheduler", "_LRScheduler"} == set(TORCH)


def monitored(name: str) -> tuple[str, ...]:
    return ("+model.monitor=val_loss",) if name == "ReduceLROnPlateau" else ()


@pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using")
@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("name", TORCH)
def test_sc_plateau_resume_every_schedule_of_torch(
    checked: Callable[..., Any], tmp_path: Path, name: str, interval: str
) -> None:
    typed = (f"+model.scheduler={name}", f"+model.interval={interval}", *monitored(name))
    equal_after_cuts(checked, tmp_path, *typed)

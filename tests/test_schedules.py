"""Schedules of the learning rate step as they say, also in a run that was cut."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from scheduled import TORCH, Hooked, Points
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


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("name", ["MultiStepLR", "CyclicLR", "OneCycleLR"])
@pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using")
def test_sc_plateau_resume_inside_another_schedule(
    checked: Callable[..., Any], tmp_path: Path, name: str, interval: str
) -> None:
    typed = (f"+model.scheduler={name}", f"+model.interval={interval}", "+model.nested=true")
    equal_after_cuts(checked, tmp_path, *typed)


PLATEAU = "+model.scheduler=ReduceLROnPlateau"
OTHERS = {
    "a training metric of the epoch": (PLATEAU, "+model.monitor=late_loss"),
    "a training metric of the step": (PLATEAU, "+model.monitor=loss_of_step",
                                      "+model.interval=step"),
    "every third step": (PLATEAU, "+model.monitor=loss_of_step", "+model.interval=step",
                         "+model.frequency=3"),
    "every second epoch": (PLATEAU, "+model.monitor=val_loss", "+model.frequency=2"),
    "a schedule of their own, monitored": ("+model.scheduler=Own", "+model.monitor=val_loss"),
    "a schedule of their own, by step": ("+model.scheduler=Own", "+model.interval=step",
                                         "+model.frequency=3"),
    "validation inside": (PLATEAU, "+model.monitor=val_loss", "trainer.val_check_interval=2"),
    "validation over epochs": (PLATEAU, "+model.monitor=val_loss", "trainer.val_check_interval=3",
                               "trainer.check_val_every_n_epoch=null"),
    "accumulation": ("+model.scheduler=StepLR", "+model.interval=step", "+model.frequency=2",
                     "accumulate=constant", "accumulate.factor=2"),
    "averaging": (PLATEAU, "+model.monitor=val_loss", "averaging=ema", "averaging.decay=0.5"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_sc_plateau_resume_others(checked: Callable[..., Any], tmp_path: Path, case: str) -> None:
    cuts = CUTS
    if "validation" in case:  # a hook after which there is another one in the same epoch
        cuts = tuple(cut for cut in CUTS if "validation" not in cut[0])
    if case == "accumulation":
        cuts = (*CUTS[:4], ("on_train_batch_end", 7), *CUTS[5:])
    equal_after_cuts(checked, tmp_path, *OTHERS[case], cuts=cuts)


def test_sc_plateau_resume_of_ours(checked: Callable[..., Any], tmp_path: Path) -> None:
    typed = ("model._target_=scheduled.Plain", "optimizer=sgd", "scheduler=plateau",
             "scheduler.mode=max", "scheduler.patience=0", "optimizer.lr=0.01",
             "optimizer.momentum=0")  # fmt: skip
    equal_after_cuts(checked, tmp_path, *typed)


def per_epoch(run: Run, *, batches: int = 5) -> list[float]:
    """The rate at the first batch of each epoch."""
    return [run.model.rates[at] for at in sorted(run.model.rates) if at % batches == 0]


@pytest.mark.parametrize("target", ["Scheduled", "Late"])
def test_sc_plateau_every_an_update_after_each_validation(
    checked: Callable[..., Any], target: str
) -> None:
    """Also where the model logs metrics at the end of an epoch, that the monitor might be of."""
    config = checked(*BASE, PLATEAU, "+model.monitor=val_loss", "trainer.max_epochs=7",
                     f"model._target_=scheduled.{target}",
                     "trainer.check_val_every_n_epoch=2")  # fmt: skip
    run = fit(config)
    # the first is the best there is: the loss falls, and `max` takes the next for worse
    assert per_epoch(run) == pytest.approx([0.02, 0.02, 0.02, 0.02, 0.014, 0.014, 0.0098])


def test_sc_plateau_every_of_ours(checked: Callable[..., Any]) -> None:
    config = checked(*BASE, "model._target_=scheduled.Plain", "optimizer=sgd", "scheduler=plateau",
                     "scheduler.mode=max", "scheduler.patience=0", "optimizer.lr=0.02",
                     "optimizer.momentum=0", "trainer.max_epochs=7",
                     "trainer.check_val_every_n_epoch=3")  # fmt: skip
    assert per_epoch(fit(config)) == pytest.approx([0.02] * 6 + [0.01])


def test_sc_plateau_every_an_unknown_metric_is_still_said(checked: Callable[..., Any]) -> None:
    config = checked(*BASE, PLATEAU, "+model.monitor=val_los", "trainer.check_val_every_n_epoch=2")
    with pytest.raises(MisconfigurationException, match="val_los which is not available"):
        fit(config)


@pytest.mark.parametrize(
    ("frequency", "factor"), [(2, 2), (15, 1), (3, 1), (4, 2), (7, 3), (1, 2), (1, 1)]
)
def test_sc_frequency_counts_optimizer_steps_over_epochs(
    checked: Callable[..., Any], frequency: int, factor: int
) -> None:
    chosen = ("accumulate=constant", f"accumulate.factor={factor}") if factor > 1 else ()
    run = fit(checked(*BASE, "+model.scheduler=ExponentialLR", "+model.interval=step",
                      f"+model.frequency={frequency}", *chosen,
                      "trainer.max_epochs=6"))  # fmt: skip
    rates, steps_before = run.model.rates, 0
    for at in sorted(rates):
        assert rates[at] == pytest.approx(0.02 * 0.8 ** (steps_before // frequency)), at
        is_last = at % 5 == 4
        steps_before += is_last or (at % 5 + 1) % factor == 0
    config = run.trainer.lr_scheduler_configs
    assert all(isinstance(c.frequency, int) and c.frequency == frequency for c in config)


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("name", TORCH)
@pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using")
def test_without_these_faults_a_fit_is_that_of_lightning(
    checked: Callable[..., Any], tmp_path: Path, name: str, interval: str
) -> None:
    typed = {"scheduler": name, "interval": interval}
    if name == "ReduceLROnPlateau":
        typed["monitor"] = "late_loss" if interval == "epoch" else "loss_of_step"
    ours = fit(checked(*BASE, *(f"+model.{key}={value}" for key, value in typed.items()))).model
    pl.seed_everything(42, workers=True, verbose=False)
    theirs, data = Hooked(**typed), Points()
    trainer = pl.Trainer(max_epochs=4, accelerator="cpu", logger=False, default_root_dir=tmp_path,
                         enable_checkpointing=False, enable_progress_bar=False,
                         enable_model_summary=False, num_sanity_val_steps=0)  # fmt: skip
    trainer.fit(theirs, datamodule=data)
    assert theirs.rates == ours.rates


def test_two_optimizers_step_their_schedules_themselves(
    checked: Callable[..., Any], tmp_path: Path
) -> None:
    equal_after_cuts(checked, tmp_path, "model._target_=scheduled.Adversarial")


def test_the_monitor_of_lightning_sees_what_it_saw(checked: Callable[..., Any]) -> None:
    config = checked(*BASE, PLATEAU, "+model.monitor=val_loss",
                     "+callbacks.lr._target_=lightning.pytorch.callbacks.LearningRateMonitor",
                     "+callbacks.lr.logging_interval=epoch")  # fmt: skip
    run = fit(config)
    monitor = next(c for c in run.trainer.callbacks if hasattr(c, "lrs"))
    assert monitor.lrs["lr-SGD"] == per_epoch(run)

"""What watches a metric: the best checkpoint, early stopping, the end of a fit."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import pytorch as pl
from monitored import FailsInTest
from test_schedules import BASE, CutAt, equal_after_cuts, fit

from app.errors import Refused
from app.fit import train
from app.monitored import mode_of
from app.process.asked import asked
from app.record.folder import RunFolder
from app.resume.hooks import switch_on
from app.run.build import build as built
from app.stop.signals import ASKS, StopsOnSignal

LOWER = ("val_loss", "val/loss", "loss", "val_rmse", "test-WER", "val.ppl", "valid_loss_epoch",
         "val_cer", "FID", "bits/bpc", "val/loss/dataloader_idx_0", "valloss", "error_rate",
         "BinaryHingeLoss", "val_nll2")  # fmt: skip
HIGHER = ("val_acc", "val/acc1", "val_top5_acc", "BinaryAccuracy", "val_auroc", "val_f1", "mAP50",
          "MeanIoU_iou", "dice", "bleu4", "rouge1", "r2", "psnr_db", "val_precision@1",
          "valAccuracy", "F1Score")  # fmt: skip
PEAKS = "model._target_=monitored.Peaks"
UNTOLD = ("val_score", "val_foo", "metric", "neg_loss", "negative_mse", "loss_over_acc", "glossy",
          "accent", "lossy")  # fmt: skip


@pytest.mark.parametrize(
    ("name", "mode"),
    [*((n, "min") for n in LOWER), *((n, "max") for n in HIGHER), *((n, None) for n in UNTOLD)],
)
def test_be_monitor_a_name_tells_which_values_are_better(name: str, mode: str | None) -> None:
    assert mode_of(name) == mode


def test_be_monitor_what_watches_follows_the_checkpoints(checked: Callable[..., Any]) -> None:
    typed = (
        "callbacks=early_stopping",
        "scheduler=plateau",
        "callbacks.checkpoint.monitor=val_acc",
    )
    plain = checked(*typed).plain
    watching = [plain["callbacks"]["checkpoint"], plain["callbacks"]["early_stopping"],
                plain["scheduler"]]  # fmt: skip
    assert [(w["monitor"], w["mode"]) for w in watching] == [("val_acc", "max")] * 3
    plain = checked(*typed, "callbacks.checkpoint.mode=min", "scheduler.monitor=val_loss").plain
    assert plain["callbacks"]["early_stopping"]["mode"] == "min"
    assert plain["scheduler"]["mode"] == "min"
    plain = checked(*typed, "callbacks.early_stopping.mode=min").plain
    assert plain["callbacks"]["early_stopping"]["mode"] == "min"
    assert plain["callbacks"]["checkpoint"]["mode"] == "max"


@pytest.mark.parametrize(
    "typed",
    [("callbacks.checkpoint=null",), ("callbacks.checkpoint.monitor=null",), ()],
)
def test_be_monitor_without_one_val_loss_is_watched(
    checked: Callable[..., Any], typed: tuple[str, ...]
) -> None:
    plain = checked("callbacks=early_stopping", "scheduler=plateau", *typed).plain
    for watching in (plain["callbacks"]["early_stopping"], plain["scheduler"]):
        assert (watching["monitor"], watching["mode"]) == ("val_loss", "min")
    plain = checked("callbacks=none", "scheduler=plateau").plain
    assert plain["scheduler"]["monitor"] == "val_loss"


@pytest.mark.parametrize(
    ("objective", "direction"), [("val_acc", "maximize"), ("val_loss", "minimize"), ("null", None)]
)
def test_be_monitor_a_sweep_too(
    checked: Callable[..., Any], objective: str, direction: str | None
) -> None:
    assert checked(f"objective={objective}").plain["direction"] == direction


@pytest.mark.parametrize(
    ("typed", "key"),
    [
        (("callbacks.checkpoint.monitor=val_foo",), "callbacks.checkpoint.mode=max"),
        (("callbacks=early_stopping", "callbacks.early_stopping.monitor=score"),
         "callbacks.early_stopping.mode=max"),
        (("optimizer=sgd", "scheduler=plateau", "scheduler.monitor=score"), "scheduler.mode=max"),
        (("sweep=optuna", "objective=score"), "direction=maximize"),
    ],
)  # fmt: skip
def test_be_monitor_an_untold_way_is_refused_before_the_fit(
    checked: Callable[..., Any], typed: tuple[str, ...], key: str
) -> None:
    with pytest.raises(Refused, match=f"type {key}$"):
        checked(*BASE, *typed)
    checked(*BASE, *typed, key)


def test_be_monitor_the_best_epoch_is_tested(checked: Callable[..., Any]) -> None:
    run = fit(checked(*BASE, PEAKS, "callbacks.checkpoint.monitor=val_acc"))
    best = torch.load(run.checkpoints()["best"], weights_only=True)
    assert best["epoch"] == 1
    assert best["metrics"]["val_acc"] == 0.75


class Losses(pl.Callback):
    """The training loss of each epoch."""

    def __init__(self) -> None:
        self.of_epochs: list[float] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.of_epochs.append(float(trainer.callback_metrics["train_loss"]))


ODD_VALIDATIONS = [(), ("trainer.limit_val_batches=0",), ("trainer.check_val_every_n_epoch=3",),
                   ("trainer.val_check_interval=0.4",)]  # fmt: skip


@pytest.mark.parametrize(
    ("monitor", "mode"), [("late_acc", None), ("mean_acc", None), ("step_score", "max")]
)
@pytest.mark.parametrize("typed", ODD_VALIDATIONS)
def test_be_train_metric_keeps_the_best_epoch(
    checked: Callable[..., Any], monitor: str, mode: str | None, typed: tuple[str, ...]
) -> None:
    chosen = (f"callbacks.checkpoint.monitor={monitor}",
              f"callbacks.checkpoint.mode={mode or 'null'}")  # fmt: skip
    run = fit(checked(*BASE, PEAKS, *chosen, *typed))
    best = torch.load(run.checkpoints()["best"], weights_only=True)
    assert (best["epoch"], best["global_step"]) == (1, 10)
    assert best["metrics"][monitor] == 0.75


@pytest.mark.parametrize("typed", ODD_VALIDATIONS)
def test_be_train_metric_of_ours(checked: Callable[..., Any], typed: tuple[str, ...]) -> None:
    losses = Losses()
    config = checked(*BASE, PEAKS, "callbacks=early_stopping", *typed,
                     "callbacks.checkpoint.monitor=train_loss",
                     "callbacks.early_stopping.patience=1", "trainer.max_epochs=6")  # fmt: skip
    run = built(config, [losses])
    run.trainer.fit(run.model, datamodule=run.data)
    best = torch.load(run.checkpoints()["best"], weights_only=True)
    assert best["metrics"]["train_loss"] == min(losses.of_epochs)
    worse = [
        i
        for i in range(1, len(losses.of_epochs))
        if losses.of_epochs[i] >= min(losses.of_epochs[:i])
    ]
    assert len(losses.of_epochs) == (worse[0] + 1 if worse else 6)


@pytest.mark.parametrize("monitor", ["late_acc", "train_peak_acc"])
@pytest.mark.parametrize("typed", [(), ("trainer.check_val_every_n_epoch=2",)])
def test_be_train_metric_ends_the_fit(
    checked: Callable[..., Any], monitor: str, typed: tuple[str, ...]
) -> None:
    if monitor == "late_acc":  # a name that does not say that the training measures it
        typed += ("callbacks.early_stopping.check_on_train_epoch_end=true",) if typed else ()
    config = checked(*BASE, PEAKS, "callbacks=early_stopping", "trainer.max_epochs=6",
                     f"callbacks.early_stopping.monitor={monitor}",
                     "callbacks.early_stopping.patience=1", *typed)  # fmt: skip
    assert fit(config).trainer.current_epoch == 3


def test_be_train_metric_cut_equals_uncut(checked: Callable[..., Any], tmp_path: Path) -> None:
    typed = (*BASE, PEAKS, "callbacks.checkpoint.monitor=mean_acc")
    whole = fit(checked(*typed, f"run_dir={tmp_path}/whole"))
    config = checked(*typed, f"run_dir={tmp_path}/cut")
    for cut in (
        ("on_train_batch_start", 8),
        ("on_train_epoch_start", 2),
        ("on_train_batch_end", 12),
    ):
        fit(config, CutAt(*cut))
    cut = fit(config)
    one, other = (torch.load(r.checkpoints()["best"], weights_only=True) for r in (whole, cut))
    assert one["epoch"] == other["epoch"]
    assert one["metrics"] == other["metrics"]
    assert all(torch.equal(one["state_dict"][n], t) for n, t in other["state_dict"].items())


STOPPED = {
    "early stopping": ("FailsInTest", "callbacks=early_stopping",
                       "callbacks.early_stopping.monitor=val_acc",
                       "callbacks.early_stopping.patience=1"),
    "theirs": ("FailsInTest", "+callbacks.mine._target_=lightning.pytorch.callbacks.EarlyStopping",
               "+callbacks.mine.monitor=val_acc", "+callbacks.mine.mode=max",
               "+callbacks.mine.patience=1"),
    "their model's": ("Configured",),
    "the model": ("StopsAndFails",),
    "all epochs": ("FailsInTest",),
    "steps": ("FailsInTest", "trainer.max_steps=8"),
}  # fmt: skip


@pytest.mark.parametrize("case", STOPPED)
def test_be_stop_the_fit_is_over(
    checked: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    target, *typed = STOPPED[case]
    typed = (*BASE, f"model._target_=monitored.{target}", *typed)

    def result(name: str, *, fails: bool) -> dict[str, Any]:
        config = checked(*typed, f"run_dir={tmp_path}/{name}")
        folder = RunFolder(Path(config.run_dir))
        folder.path.mkdir(exist_ok=True)
        monkeypatch.setattr(FailsInTest, "is_broken", fails)
        if fails:
            with pytest.raises(OSError, match="the test set is gone"):
                train(config, folder)
        found = train(config, folder) if not fails else {}
        return {key: found.get(key) for key in ("metrics", "optimizer_steps", "epochs", "batch")}

    whole = result("whole", fails=False)
    result("cut", fails=True)
    assert result("cut", fails=False) == whole
    lines = [(tmp_path / name / "metrics.csv").read_text() for name in ("whole", "cut")]
    assert lines[0] == lines[1]


def test_be_stop_early_stopping_counts_over_cuts(
    checked: Callable[..., Any], tmp_path: Path
) -> None:
    typed = (*BASE, PEAKS, "callbacks=early_stopping",
             "callbacks.early_stopping.monitor=val_acc", "callbacks.early_stopping.patience=2",
             "trainer.max_epochs=6")  # fmt: skip
    config = checked(*typed)
    for cut in (("on_train_batch_start", 12), ("on_validation_start", 2), ("on_train_epoch_end", 2),
                ("on_train_epoch_start", 3), ("on_train_batch_start", 17)):  # fmt: skip
        fit(config, CutAt(*cut))
    assert fit(config).trainer.current_epoch == 4


class Asks(pl.Callback):
    """Asks the run to stop in the validation after which it would stop anyway."""

    def on_validation_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 8:
            asked.note(signal.SIGTERM)
            for callback in trainer.callbacks:
                if isinstance(callback, StopsOnSignal):
                    switch_on(callback, *ASKS)


def test_be_stop_a_signal_in_the_last_validation(checked: Callable[..., Any]) -> None:
    """The validation is finished: Lightning would not come back to it."""
    stops = StopsOnSignal()
    run = built(checked(*BASE, "model._target_=monitored.Stops"), [Asks(), stops])
    try:
        run.trainer.fit(run.model, datamodule=run.data)
    finally:
        asked.first = None
    assert run.trainer.current_epoch == 2
    last = torch.load(run.checkpoints()["last"], weights_only=True)
    assert last["has_ended"]
    assert "val_acc" in last["metrics"]


def test_be_train_metric_what_an_epoch_has_logged_continues(
    checked: Callable[..., Any], tmp_path: Path
) -> None:
    equal_after_cuts(checked, tmp_path, "model._target_=monitored.Logs")

"""What users bring beside ours: models that log as on stock's default logger, names with a slash,
Lightning's own techniques."""

import copy
import csv
import json
import pickle
import sys
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from hydra import compose, initialize_config_module
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from matplotlib.axes import Axes
from omegaconf import DictConfig
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from app.clip import NormClip
from app.config import check
from app.errors import Refused
from app.evaluate import main as evaluate
from app.fit import objective, run
from app.logger import TensorBoard
from app.pictures.curves import draw_curves
from app.process.targets import refuse_targets
from app.record.loggers import MetricsCsv, NoLogger, read_metrics
from app.record.names import counterpart, stage_of, stem
from app.record.trials import may_be_reported
from app.report.__main__ import main as report_command
from app.report.curves import panels
from app.report.reading import read_runs
from app.report.summary import summarize
from app.run.build import build

THEIR = ("model=custom", "data=custom", "data._target_=test_beside.LitToy", "optimizer=none",
         "trainer.max_epochs=3", "trainer.accelerator=cpu", "trainer.log_every_n_steps=2",
         "callbacks.progress=null")  # fmt: skip
ANY_LOGGER = pytest.mark.parametrize("logger", ["default", "csv", "tensorboard", "none"])


class LitToy(pl.LightningDataModule):
    """Twelve batches of four, as in anyone's first script."""

    def loader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(48, 10, generator=generator)
        return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=4)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader


class Plain(pl.LightningModule):
    """The frame of the models below."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(10, 2)

    def loss(self, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])


class Experimenter(Plain):
    """Uses TensorBoard's writer in every step, as the autoencoder of Lightning's documentation."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        writer = self.logger.experiment
        writer.add_scalar("loss_again", loss, self.global_step)
        writer.add_histogram("weights", self.net.weight, self.global_step)
        return loss

    def _draw(self) -> None:
        from matplotlib.figure import Figure

        figure = Figure()
        figure.add_subplot().plot([1, 2])
        writer = self.logger.experiment
        writer.add_figure("a figure", figure, global_step=self.current_epoch)
        writer.add_image("an image", torch.zeros(3, 4, 4), self.current_epoch)
        writer.add_text("a text", "words")
        for logger in self.loggers:
            assert logger.experiment is not None

    def on_validation_epoch_end(self) -> None:
        self._draw()

    def on_test_epoch_end(self) -> None:
        self._draw()


class DictLogger(Plain):
    """Calls the logger itself: with a step, without, with tensors, and its other methods."""

    def on_fit_start(self) -> None:
        self.logger.log_hyperparams({"width": 10})
        self.logger.log_graph(self)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.logger.log_metrics({"mine/loss": loss.detach()})
        self.logger.log_metrics({"mine/stepped": loss.item()}, step=self.global_step)
        return loss

    def on_validation_epoch_end(self) -> None:
        self.logger.log_metrics({"mine/epochs": self.current_epoch}, self.current_epoch)
        self.logger.log_metrics({"mine/nan": float("nan"), "a, b": 1, "c\nd": 2, "e" * 300: 3})

    def test_step(self, batch: Any, batch_idx: int) -> None:
        super().test_step(batch, batch_idx)
        self.logger.log_metrics({"mine/test": 1.0})


class Folders(Plain):
    """Writes files where the logger says, and names them by its version."""

    def on_train_epoch_end(self) -> None:
        self._write("epoch.txt")

    def on_test_end(self) -> None:
        self._write("test.txt")

    def _write(self, name: str) -> None:
        logger = self.logger
        for folder in (self.trainer.log_dir, self.trainer.logger.log_dir, logger.save_dir,
                       logger.root_dir):  # fmt: skip
            Path(folder).mkdir(parents=True, exist_ok=True)
            assert Path(folder).is_dir()
            (Path(folder) / f"{logger.name}{logger.version}-{name}").write_text("mine")


class EpochAxis(Plain):
    """Draws over epochs, as forums advise; templates log the epoch as well."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log_dict({"val_loss": self.loss(batch), "step": float(self.current_epoch)})

    def on_train_epoch_end(self) -> None:
        self.log("epoch", float(self.current_epoch))
        self.log("step", float(self.current_epoch))
        self.log("mine", 1.0)


class Collected(Plain):
    """Metrics as in lightning-hydra-template and torchmetrics' documentation."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__(lr=lr)
        one = torchmetrics.MetricCollection(
            {"acc": torchmetrics.classification.MulticlassAccuracy(2),
             "f1": torchmetrics.classification.MulticlassF1Score(2)}
        )  # fmt: skip
        self.of_train, self.of_val = one.clone(prefix="train/"), one.clone(prefix="val/")
        self.of_test = one.clone(prefix="test/")
        self.best = torchmetrics.MaxMetric()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.of_train(self.net(batch[0]), batch[1])
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log_dict(self.of_train, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.of_val.update(self.net(batch[0]), batch[1])
        self.log("val/loss", self.loss(batch))

    def on_validation_epoch_end(self) -> None:
        values = self.of_val.compute()
        self.log_dict(values)
        self.best(values["val/acc"])
        self.log("val/acc_best", self.best.compute(), sync_dist=True)
        self.of_val.reset()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.of_test.update(self.net(batch[0]), batch[1])
        self.log_dict(self.of_test, on_step=False, on_epoch=True)
        self.log("test/loss", self.loss(batch))


FOREIGN = (Experimenter, DictLogger, Folders, EpochAxis, Collected)


def trained(composed: Callable[..., DictConfig], model: type, *typed: str) -> dict[str, Any]:
    """The result of a run of a model."""
    target = f"model._target_=test_beside.{model.__name__}"
    result = run(composed(*THEIR, target, *typed), typed=[])
    assert result is not None
    return result


def evaluated(folder: Path, *typed: str) -> None:
    """Evaluate a run as the command does."""
    with initialize_config_module("app.conf", version_base="1.3"):
        evaluate(compose("evaluate", [f"run={folder}", *typed]))


def lines_in(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in line.items() if v} for line in csv.DictReader(file)]


@pytest.mark.filterwarnings("ignore:add_scalar. only metrics are kept")
@ANY_LOGGER
@pytest.mark.parametrize("model", FOREIGN)
def test_be_logger_a_model_written_for_stocks_logger_is_trained_and_evaluated(
    model: type, logger: str, composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    result = trained(composed, model, f"logger={logger}", "callbacks.checkpoint.monitor=null")
    assert result["status"] == "finished"
    for stage in ("test", "validate"):
        evaluated(tmp_path / "run", f"stage={stage}", "checkpoint=last")
    found = json.loads((tmp_path / "run/test.json").read_text())["metrics"]
    assert found == {name: result["metrics"][name] for name in found}


def test_be_logger_an_axis_of_the_models_own_deletes_no_line(
    composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    trained(composed, EpochAxis, "logger=csv")
    lines = lines_in(tmp_path / "run")
    assert [int(line["step"]) for line in lines if "train_loss" in line] == list(range(1, 36, 2))
    measured = [(line["step"], line["logged_step"]) for line in lines if "val_loss" in line]
    assert measured == [("11", "0.0"), ("23", "1.0"), ("35", "2.0")]
    assert [line["step"] for line in lines if "mine" in line] == ["11", "23", "35"]


def test_be_logger_what_a_model_logs_itself_is_in_the_file(
    composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    trained(composed, DictLogger, "logger=csv")
    lines = lines_in(tmp_path / "run")
    assert [line["step"] for line in lines if "mine/stepped" in line] == [*map(str, range(36))]
    assert sum("mine/loss" in line for line in lines) == 36
    assert [line["mine/epochs"] for line in lines if "mine/epochs" in line] == ["0", "1", "2"]
    assert [line["e" * 300] for line in lines if "c\nd" in line] == ["3"] * 3
    assert [int(line["step"]) for line in lines if "train_loss" in line] == list(range(1, 36, 2))


class TheirEma(EMAWeightAveraging):
    """Derived, so that no name says what it is."""


class TheirClip(NormClip):
    """One of ours, in another place."""


def ema_of_pytorch_lightning() -> Any:
    return import_module("pytorch_lightning.callbacks").EMAWeightAveraging()


LIGHTNINGS: dict[str, tuple[Callable[[], Any], str]] = {
    "GradientAccumulationScheduler": (lambda: GradientAccumulationScheduler({0: 2}),
                                      "accumulate=schedule"),
    "EMAWeightAveraging": (EMAWeightAveraging, "averaging=ema"),
    "TheirEma, a EMAWeightAveraging": (TheirEma, "averaging=ema"),
    "WeightAveraging": (WeightAveraging, "averaging=uniform"),
    "StochasticWeightAveraging": (lambda: StochasticWeightAveraging(0.1), "averaging=swa"),
    "LearningRateFinder": (LearningRateFinder, "tuner=lr_find"),
    "BatchSizeFinder": (BatchSizeFinder, "tuner=batch_size"),
}  # fmt: skip


class Configures(Plain):
    """Brings its own callbacks."""

    brought: tuple[Callable[[], Any], ...] = ()

    def configure_callbacks(self) -> Any:
        return [make() for make in self.brought]


@pytest.mark.parametrize("name", LIGHTNINGS)
def test_be_lightning_a_second_technique_is_refused_wherever_it_comes_from(
    name: str, composed: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, instead = LIGHTNINGS[name]
    monkeypatch.setattr(Configures, "brought", (make,))
    with pytest.raises(Refused) as refusal:
        trained(composed, Configures)
    said = "must be no technique of Lightning, of which ours know nothing, got"
    assert f"Configures.configure_callbacks: {type(make()).__name__} {said}" in str(refusal.value)
    assert str(refusal.value).endswith(f"got {name}; leave it out, and use {instead}")
    monkeypatch.setattr(sys.modules[__name__], "made", make, raising=False)
    with pytest.raises(Refused) as refusal:
        trained(composed, Plain, "+callbacks.mine._target_=test_beside.made", "resume=never")
    assert str(refusal.value) == f"callbacks.mine {said} {name}; leave it out, and use {instead}"


@pytest.mark.parametrize("module", ["lightning.pytorch.callbacks", "pytorch_lightning.callbacks",
                                    "lightning.pytorch.callbacks.weight_averaging"])  # fmt: skip
def test_be_lightning_what_a_name_says_is_refused_before_anything_is_imported(
    module: str, checked: Callable[..., Any]
) -> None:
    with pytest.raises(Refused) as refusal:
        checked(f"+callbacks.mine._target_={module}.EMAWeightAveraging", "+callbacks.mine.decay=.9")
    assert str(refusal.value) == (
        "callbacks.mine must be no technique of Lightning, of which ours know nothing, got "
        "EMAWeightAveraging; leave it out, and use averaging=ema"
    )


def test_be_lightning_the_other_package_of_lightning_is_seen_too(
    composed: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Configures, "brought", (ema_of_pytorch_lightning,))
    with pytest.raises(Refused, match="use averaging=ema"):
        trained(composed, Configures)


@pytest.mark.parametrize("typed", [("+accumulate._target_=test_beside.made",),
                                   ("+averaging._target_=test_beside.made",)])  # fmt: skip
def test_be_lightning_nor_does_one_stand_in_a_group(
    typed: tuple[str, ...], composed: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "made", TheirEma, raising=False)
    with pytest.raises(Refused, match="no technique of Lightning"):
        trained(composed, Plain, *typed)


def test_be_lightning_a_technique_of_ours_has_its_own_place(
    composed: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = partial(TheirClip, max_norm=1.0, norm_type=2.0, nonfinite="skip")
    monkeypatch.setattr(Configures, "brought", (make,))
    with pytest.raises(Refused) as refusal:
        trained(composed, Configures)
    assert str(refusal.value) == (
        "Configures.configure_callbacks: TheirClip must be no technique, which acts in its place "
        "among them, got test_beside.TheirClip; leave it out, and type "
        "+clip._target_=test_beside.TheirClip"
    )


class Noting(pl.Callback):
    """Has a state, as anyone's callback."""

    def __init__(self) -> None:
        self.epochs = 0

    def on_train_epoch_end(self, *args: Any) -> None:
        self.epochs += 1

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}


def test_be_lightning_what_is_no_technique_acts_from_wherever_it_comes(
    composed: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stop = partial(EarlyStopping, "val_loss", mode="max", patience=1)
    keep = partial(ModelCheckpoint, filename="mine", monitor="val_loss")
    monkeypatch.setattr(Configures, "brought", (Noting, LambdaCallback, LearningRateMonitor, Timer,
                                                stop, keep))  # fmt: skip
    result = trained(composed, Configures, "callbacks=early_stopping", "trainer.max_epochs=9",
                     "averaging=ema", "callbacks.checkpoint.monitor=val_loss")  # fmt: skip
    assert result["epochs"] == 2  # theirs has replaced the one that waits for five
    folder = tmp_path / "run"
    assert result["checkpoints"] == {"best": "checkpoints/best.ckpt",
                                     "last": "checkpoints/last.ckpt"}  # fmt: skip
    last = torch.load(folder / "checkpoints/last.ckpt")
    assert last["callbacks"]["Noting"] == {"epochs": 2}
    (mine,) = folder.rglob("mine.ckpt")
    best = torch.load(folder / "checkpoints/best.ckpt")
    found = torch.load(mine)["state_dict"]
    assert all(torch.equal(tensor, found[name]) for name, tensor in best["state_dict"].items())


def test_be_lightning_a_second_keeper_does_not_write_over_ours(
    composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    typed = ("+callbacks.mine._target_=lightning.pytorch.callbacks.ModelCheckpoint",
             "+callbacks.mine.dirpath=${run_dir}/checkpoints/")  # fmt: skip
    with pytest.raises(Refused) as refusal:
        trained(composed, Plain, *typed)
    assert str(refusal.value) == (
        "callbacks.mine must write into another folder than callbacks.checkpoint, got "
        f"dirpath={tmp_path}/run/checkpoints; leave dirpath out"
    )


@pytest.mark.parametrize(
    ("name", "stage", "what"),
    [("val_loss", "val", "loss"), ("val/loss", "val", "loss"), ("valid.loss", "val", "loss"),
     ("val-loss", "val", "loss"), ("loss/val", "val", "loss"), ("raw_val/loss", "val", "loss"),
     ("validation/acc/cat", "val", "acc/cat"), ("Test/Acc", "test", "Acc"),
     ("val_loss/dataloader_idx_0", "val", "loss/dataloader_idx_0"), ("loss", None, "loss"),
     ("value/x", None, "value/x"), ("restrain_loss", None, "restrain_loss"), ("val", "val", "val"),
     ("training/loss", "train", "loss"), ("grad_norm", None, "grad_norm")],
)  # fmt: skip
def test_be_slash_a_name_is_read_with_any_separator(
    name: str, stage: str | None, what: str
) -> None:
    assert (stage_of(name), stem(name)) == (stage, what)


def test_be_slash_the_counterpart_has_the_same_form_where_there_are_two() -> None:
    known = ["test_acc", "test/acc", "acc/test", "val/acc", "raw_test/acc"]
    assert [counterpart(name, "test", known) for name in ("val_acc", "val/acc", "acc/val")] == [
        "test_acc", "test/acc", "acc/test",
    ]  # fmt: skip
    assert counterpart("val/f1", "test", known) is None


SLASH = ("callbacks.checkpoint.monitor=val/loss", "objective=val/loss")


class Slashes(Collected):
    """Its validation is best after the first epoch."""

    def on_train_epoch_end(self) -> None:
        with torch.no_grad():
            self.net.weight.neg_()


def test_be_slash_curves_report_and_objective_know_the_names_of_templates(
    composed: Callable[..., DictConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = trained(composed, Slashes, *SLASH, "averaging=ema", "averaging.validate=both")
    assert "raw_val/loss" in result["metrics"]
    report = summarize(tmp_path, read_runs(tmp_path), metric=None, mode=None, baseline=[])
    assert report.metric is not None
    assert (report.metric.name, report.metric.tested) == ("val/loss", "test/loss")
    assert [panel.name for panel in panels(report)] == ["train_loss", "val/loss"]
    typed = summarize(tmp_path, read_runs(tmp_path), metric="test/acc", mode=None, baseline=[])
    assert [panel.name for panel in panels(typed)] == ["train_loss", "val/acc"]
    assert typed.metric is not None
    assert not typed.metric.lower_is_better
    assert report_command([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "metric val/loss: callbacks.checkpoint.monitor names it" in printed
    assert "test/loss is shown beside it, and chooses nothing" in printed


def test_be_slash_what_is_measured_of_one_thing_shares_a_panel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.csv").write_text(
        "step,train_loss,train/loss_epoch,val/loss,raw_val/loss,loss/test,lr,epoch\n1,1,1,1,1,1,1,0\n"
    )
    titles: list[str] = []
    monkeypatch.setattr(Axes, "set_title", lambda self, title, **_: titles.append(title))
    draw_curves(tmp_path / "metrics.csv", tmp_path / "curves.png", {})
    assert titles == ["loss", "lr"]


@pytest.mark.parametrize("name", ["test/loss", "loss/test", "test_loss", "test.loss"])
def test_be_slash_a_test_is_awaited_by_no_validation(name: str) -> None:
    assert not may_be_reported(name)
    assert may_be_reported(name.replace("test", "val"))


class Peaks(Plain):
    """Best after the second of three epochs; its test measures something else than its name."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", (0.5, 0.2, 0.8)[self.current_epoch % 3])
        self.log("val_weight", self.net.weight.sum())
        self.log("score", 1.0)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_weight", self.net.weight.sum())
        self.log("score", 7.0)


BEST = ("callbacks.checkpoint.monitor=val_loss", "logger=csv")
AVERAGED = pytest.mark.parametrize(
    ("averaging", "of_validation"),
    [("averaging=none", "raw"), ("averaging=ema", "averaged"), ("averaging=uniform", "averaged")],
)


@AVERAGED
def test_be_report_each_value_says_of_which_weights_it_is(
    averaging: str, of_validation: str, composed: Callable[..., DictConfig],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    result = trained(composed, Peaks, *BEST, averaging)
    best = {"checkpoint": "best", "weights": of_validation, "epoch": 2, "step": 24}
    metrics, of = result["metrics"], result["metrics_of"]
    assert metrics["val_loss"] == pytest.approx(0.2)
    assert of["val_loss"] == of["val_weight"] == {"on": "validation", **best}
    assert of["test_weight"] == {"on": "test", **best}
    assert metrics["val_weight"] == metrics["test_weight"]
    assert (metrics["score"], metrics["test_score"]) == (1.0, 7.0)
    assert of["train_loss"] == {"on": "train", "checkpoint": "last", "weights": "raw", "epoch": 3,
                                "step": 36}  # fmt: skip
    assert of.keys() == metrics.keys()
    assert result["last_metrics"]["val_loss"] == pytest.approx(0.8)
    (line,) = [one for one in capsys.readouterr().out.splitlines() if one.startswith("finished")]
    assert "val_loss 0.2 " in line
    assert line.endswith("(best checkpoint, epoch 2, step 24)")
    assert "train_loss" not in line


@pytest.mark.parametrize(("validate", "weights"), [("raw", "raw"), ("both", "averaged")])
def test_be_report_a_validation_of_raw_weights_says_so(
    validate: str, weights: str, composed: Callable[..., DictConfig]
) -> None:
    of = trained(composed, Peaks, *BEST, "averaging=ema", f"averaging.validate={validate}")[
        "metrics_of"
    ]
    assert of["val_weight"]["weights"] == weights
    assert of["test_weight"]["weights"] == "averaged"
    if validate == "both":
        assert (of["raw_val_weight"]["weights"], of["raw_val_weight"]["step"]) == ("raw", 24)


def test_be_report_the_last_checkpoint_has_the_last_validation(
    composed: Callable[..., DictConfig],
) -> None:
    result = trained(composed, Peaks, *BEST, "test=last", "objective=val_loss")
    assert result["metrics"]["val_loss"] == pytest.approx(0.8)
    assert result["metrics_of"]["val_loss"]["checkpoint"] == "last"
    assert result["metrics_of"]["test_weight"]["step"] == 36
    assert objective("val_loss", result["metrics"]) == pytest.approx(0.8)


def test_be_report_without_checkpoints_nothing_says_that_there_are(
    composed: Callable[..., DictConfig],
) -> None:
    result = trained(composed, Peaks, "callbacks.checkpoint=null", "logger=csv")
    assert result["checkpoints"] == {"best": None, "last": None}
    assert {where["checkpoint"] for where in result["metrics_of"].values()} == {None}


class Cut(pl.Callback):
    """Fails once, when an epoch begins or after the test."""

    at: int | str | None = None

    def _fail(self, at: int | str) -> None:
        if at == Cut.at:
            Cut.at = None
            raise RuntimeError("cut")

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self._fail(trainer.current_epoch)

    def on_test_end(self, *args: Any) -> None:
        self._fail("test")


CUT = "+callbacks.cut._target_=test_beside.Cut"


@pytest.mark.parametrize("at", [2, "test"])
@pytest.mark.parametrize("model", [Peaks, EpochAxis, DictLogger])
def test_be_report_a_run_that_was_cut_and_moved_comes_to_the_same(
    model: type, at: int | str, composed: Callable[..., DictConfig], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    typed = (*BEST, CUT, "averaging=ema", f"model._target_=test_beside.{model.__name__}")
    whole = trained(composed, model, *typed)
    (tmp_path / "run").rename(tmp_path / "whole")
    monkeypatch.setattr(Cut, "at", at)
    with pytest.raises(RuntimeError, match="cut"):
        trained(composed, model, *typed)
    (tmp_path / "run").rename(tmp_path / "moved")
    result = trained(composed, model, *typed, f"run_dir={tmp_path}/moved", "name=moved")
    for key in ("metrics", "metrics_of", "last_metrics", "checkpoints"):
        assert result[key] == whole[key], key
    text = (tmp_path / "whole/metrics.csv").read_text()
    assert (tmp_path / "moved/metrics.csv").read_text() == text


def test_be_report_a_moved_run_is_evaluated_and_reported(
    composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    result = trained(composed, Peaks, *BEST)
    assert result["checkpoints"] == {"best": "checkpoints/best.ckpt",
                                     "last": "checkpoints/last.ckpt"}  # fmt: skip
    moved = tmp_path / "elsewhere/moved"
    moved.parent.mkdir()
    (tmp_path / "run").rename(moved)
    evaluated(moved, "stage=validate")
    found = json.loads((moved / "validate.json").read_text())
    assert found["checkpoint"] == "checkpoints/best.ckpt"
    assert found["metrics"]["val_weight"] == result["metrics"]["val_weight"]
    assert (moved / result["checkpoints"]["best"]).exists()
    (stored,) = read_runs(tmp_path).runs
    assert stored.metrics == result["metrics"]
    again = trained(composed, Peaks, *BEST, f"run_dir={moved}")
    assert again == result


def test_be_report_the_test_chooses_no_row(
    composed: Callable[..., DictConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, lr in ((1, 0.1), (1, 0.2)):
        trained(composed, Peaks, *BEST, f"seed={seed}", f"+model.lr={lr}",
                f"run_dir={tmp_path}/{lr}")  # fmt: skip
    capsys.readouterr()
    assert report_command([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "lowest mean val_loss: " in printed
    assert "mean test" not in printed


def test_be_report_a_result_that_only_a_test_measured_says_so(
    composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    result = trained(composed, Peaks, *BEST)
    of = {"on": "test", "checkpoint": "best", "weights": "raw", "epoch": 1, "step": 1}
    result |= {"metrics": {"score": 1.0}, "metrics_of": {"score": of}}
    (tmp_path / "run/result.json").write_text(json.dumps(result))
    report = summarize(tmp_path, read_runs(tmp_path), metric=None, mode=None, baseline=[])
    assert report.metric is not None
    assert report.metric.why.startswith("nothing but the test is measured")


def test_be_logger_the_first_is_tensorboards_or_the_users_own(
    composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    mine = ("+logger.mine._target_=lightning.pytorch.loggers.CSVLogger",
            "+logger.mine.save_dir=${run_dir}/mine")  # fmt: skip
    for typed, kinds in (
        (("logger=default",), [TensorBoard, MetricsCsv]),
        (("logger=default", *mine), [TensorBoard, CSVLogger, MetricsCsv]),
        (("logger=csv", *mine), [CSVLogger, MetricsCsv]),
        (("logger=csv",), [MetricsCsv]),
        (("logger=none",), [NoLogger]),
    ):
        target = "model._target_=test_beside.Plain"
        trainer = build(check(composed(*THEIR, target, *typed)), []).trainer
        assert [type(logger) for logger in trainer.loggers] == kinds
        assert trainer.log_dir is not None
        assert Path(trainer.log_dir).is_relative_to(tmp_path / "run")


def test_be_logger_what_metrics_csv_cannot_hold_is_said_once(tmp_path: Path) -> None:
    logger = MetricsCsv(save_dir=str(tmp_path))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            logger.experiment.add_figure("a", object())
            logger.log_image(key="a", images=[])
            logger.log_metrics({"table": torch.zeros(3), "name": "words"}, step=1)
    assert [str(one.message) for one in said] == [
        "add_figure: only metrics are kept in metrics.csv, and this is left out; to have it type "
        "logger=tensorboard",
        "metrics.csv holds numbers: table, tensor([0., 0., 0.]), is left out",
        "metrics.csv holds numbers: name, 'words', is left out",
    ]


@pytest.mark.parametrize("step", [-1, 0.5, 10**30, 3.0, torch.tensor(3), np.int64(3), None])
def test_be_logger_any_step_leaves_a_file_that_is_read(step: Any, tmp_path: Path) -> None:
    logger = MetricsCsv(save_dir=str(tmp_path))
    logger.log_metrics({"a": 1.0, "epoch": 0}, step=2)
    logger.log_metrics({"b": torch.tensor(2.0), "of": {"c": True}, "d": np.float32(1)}, step=step)
    logger.log_metrics({"a": 2.0, "epoch": 0}, step=4)
    logger.save()
    lines = read_metrics(logger.path)
    assert [line["a"] for line in lines if "a" in line] == [1, 2]
    assert [(line["b"], line["of/c"], line["d"]) for line in lines if "b" in line] == [(2, 1, 1)]


@pytest.mark.parametrize("logger", [NoLogger, MetricsCsv])
@pytest.mark.filterwarnings("ignore:.*only metrics are kept")
def test_be_logger_takes_whatever_another_one_takes(logger: Any, tmp_path: Path) -> None:
    made = copy.deepcopy(pickle.loads(pickle.dumps(logger(save_dir=str(tmp_path)))))
    made.log_table(key="a", data=[[1]])
    made.watch(nn.Linear(1, 1))
    made.experiment.config.update({"a": 1})
    made.experiment["a"] = made.experiment["b"]
    made.experiment.log({"a": 1}, step=3)
    with made.experiment.context() as context:
        assert list(context) == []
    assert made[0].experiment is not None
    assert made.log_dir == made.save_dir == made.root_dir == str(tmp_path)
    assert not hasattr(made, "_private")


def test_be_lightning_what_imports_its_other_package_gets_the_one_that_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "older.py").write_text(
        "import pytorch_lightning as pl\n"
        "from pytorch_lightning.callbacks import Timer\n"
        "from pytorch_lightning.utilities.rank_zero import rank_zero_only\n\n\n"
        "class Older(pl.LightningModule):\n    pass\n\n\n"
        "class Slow(Timer):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with patch.dict(sys.modules):
        forget_other_lightning()
        refuse_targets({"model": {"_target_": "older.Older"},
                        "callbacks": {"slow": {"_target_": "older.Slow"}}})  # fmt: skip
        assert issubclass(sys.modules["older"].Older, pl.LightningModule)
        assert pl.__spec__.name == "lightning.pytorch"


def test_be_lightning_its_other_package_is_named_where_it_is_there_already() -> None:
    with patch.dict(sys.modules):
        forget_other_lightning()
        import_module("pytorch_lightning")
        timer = {"_target_": "pytorch_lightning.callbacks.Timer"}
        with pytest.raises(Refused) as refusal:
            refuse_targets({"callbacks": {"mine": timer}})
    assert str(refusal.value) == (
        "callbacks.mine._target_ must be a Callback, got pytorch_lightning.callbacks.Timer; import "
        "lightning.pytorch, not pytorch_lightning, whose classes are others"
    )


def forget_other_lightning() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "pytorch_lightning"]:
        del sys.modules[name]


class Asks(Plain):
    """Writes beside the checkpoints, and where the writer says that its files are."""

    def on_validation_epoch_end(self) -> None:
        kept = self.trainer.checkpoint_callback
        for folder in (kept.dirpath, self.logger.experiment.log_dir):
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / "labels.txt").write_text("mine")
        assert (kept.last_model_path == "") == (not kept.last.exists())
        assert kept.best_model_score is None or kept.best_model_score.item() > 0

    training_epoch: list[torch.Tensor]

    def on_train_epoch_start(self) -> None:
        self.training_epoch = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.log("value_loss", loss, on_step=False, on_epoch=True)
        self.training_epoch.append(loss.detach())
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("train_loss", torch.stack(self.training_epoch).mean() * 100)
        assert self.trainer.callback_metrics["val_loss"] > 0


def test_be_logger_a_model_asks_the_keeper_of_checkpoints_and_logs_the_loss_itself(
    composed: Callable[..., DictConfig],
) -> None:
    typed = ("logger=csv", "+model.lr=0.05", "tuner=lr_find", "tuner.cache=null",
             "callbacks.checkpoint.monitor=value_loss", "objective=value_loss")  # fmt: skip
    said = r"Asks.on_train_epoch_end fails in a search: .*'val_loss'"
    with pytest.warns(UserWarning, match=said):
        result = trained(composed, Asks, *typed)
    metrics = result["metrics"]
    assert metrics["train_loss"] == pytest.approx(metrics["value_loss"] * 100)
    assert result["metrics_of"]["value_loss"]["on"] == "train"  # also as the monitored one
    assert result["metrics_of"]["val_loss"]["on"] == "validation"


class NoRate(torch.optim.SGD):
    """As Adafactor of transformers, which finds its rate itself."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.param_groups[0]["lr"] = None

    def step(self, closure: Any = None) -> Any:
        return closure()


class Rateless(Plain):
    def configure_optimizers(self) -> Any:
        return NoRate(self.parameters())


def test_be_logger_an_optimizer_may_have_no_rate(composed: Callable[..., DictConfig]) -> None:
    typed = ("+model.lr=0.05", "tuner=lr_find", "tuner.cache=null")
    assert trained(composed, Rateless, *typed)["optimizer_steps"] == 36


def every_second() -> ModelCheckpoint:
    return ModelCheckpoint(every_n_epochs=2, save_top_k=1)


def test_be_report_a_keeper_without_a_monitor_says_when_it_kept(
    composed: Callable[..., DictConfig],
) -> None:
    target = "test_beside.every_second"
    typed = ("callbacks.checkpoint=null", f"+callbacks.mine._target_={target}")
    result = trained(composed, Plain, *typed)
    assert {(of["checkpoint"], of["step"]) for of in result["metrics_of"].values()} == {
        ("best", 24)
    }


def several() -> list[pl.Callback]:
    return [Timer(), LearningRateMonitor()]


def test_be_lightning_a_function_that_makes_no_callback_is_refused(
    checked: Callable[..., Any],
) -> None:
    config = checked(*THEIR, "model._target_=test_beside.Plain",
                     "+callbacks.mine._target_=test_beside.several")  # fmt: skip
    with pytest.raises(Refused, match=r"callbacks\.mine\._target_ must make a Callback, got"):
        build(config, [])


class OfFirstRank(Plain):
    """Measures what is slow to measure, such as an FID, on one rank."""

    def on_validation_epoch_end(self) -> None:
        if self.global_rank == 0:
            self.log("val_fid", 1 / (1.0 + self.current_epoch), rank_zero_only=True)


def test_be_monitor_what_one_rank_has_measured_decides_for_all(
    composed: Callable[..., DictConfig],
) -> None:
    typed = ("strategy=ddp", "trainer.devices=2", "callbacks.checkpoint.monitor=val_fid")
    assert trained(composed, OfFirstRank, *typed)["metrics"]["val_fid"] == pytest.approx(1 / 3)

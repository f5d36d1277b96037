"""What users bring beside ours: models that log as on stock's default logger, names with a slash,
Lightning's own techniques."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.fabric.loggers.tensorboard as fabric_tensorboard
import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from hydra import compose, initialize_config_module
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from omegaconf import DictConfig
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from app.evaluate import main as evaluate
from app.fit import run
from app.record.loggers import MetricsCsv, NoLogger

THEIR = ("model=custom", "data=custom", "data._target_=test_beside.LitToy", "optimizer=none",
         "trainer.max_epochs=3", "trainer.accelerator=cpu", "trainer.log_every_n_steps=2",
         "callbacks.progress=null", "callbacks.checkpoint.monitor=null")  # fmt: skip
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
    result = trained(composed, model, f"logger={logger}")
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

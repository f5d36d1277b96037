"""W&B, MLflow and TensorBoard, offline: what they are told of a run, and that it is one run."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from conftest import SMALL
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig

from app.config import Config
from app.errors import Refused
from app.fit import run
from app.logger.tracker import JOURNAL, MOST_FAILURES, Tracker
from app.logger.wandb import has_login
from app.sweep.journal import NAME

mlflow = pytest.importorskip("mlflow")
wandb = pytest.importorskip("wandb")

TYPED = tuple(word for word in SMALL if word != "logger=csv")
CUT = "+callbacks.cut._target_=test_trackers.Cut"


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local file of MLflow's without a run: making it takes a second."""
    path: Path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}")
    return path


@pytest.fixture(autouse=True)
def _nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tables: Path) -> Iterator[None]:
    """As on a machine where nobody has logged in, in a folder of its own."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlflow.db").write_bytes(tables.read_bytes())
    yield
    assert wandb.run is None  # or the next run would be written into this one


class Cut(pl.Callback):
    """Ends the process, or the fit, once, in the second epoch.

    Args:
        signal: that the first rank sends itself; None: an exception.
    """

    def __init__(self, signal: int | None = None) -> None:
        self.signal = signal

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        done = Path("cut")
        if trainer.global_step == 8 and trainer.is_global_zero and not done.exists():
            done.touch()
            if self.signal is None:
                raise RuntimeError("cut")
            os.kill(os.getpid(), self.signal)


def in_mlflow() -> list[Any]:
    """All runs."""
    client = mlflow.MlflowClient(f"sqlite:///{Path.cwd() / 'mlflow.db'}")
    experiments = [one.experiment_id for one in client.search_experiments()]
    return list(client.search_runs(experiments))


def in_wandb(folder: Path) -> list[dict[str, Any]]:
    """The parts of a run, in their order, as they would be synced: id, configuration and so on."""
    from wandb.proto.wandb_internal_pb2 import Record
    from wandb.sdk.internal.datastore import DataStore

    parts = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        store = DataStore()
        store.open_for_scan(str(path))
        part: dict[str, Any] = {"config": {}, "summary": {}, "steps": [], "files": set()}
        while (data := store.scan_data()) is not None:
            record = Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                part |= {"id": record.run.run_id, "group": record.run.run_group}
                part |= {"project": record.run.project, "name": record.run.display_name}
            for item in record.config.update:
                part["config"][item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
            for item in record.summary.update:
                name = item.key or ".".join(item.nested_key)
                part["summary"][name] = json.loads(item.value_json)
            for item in record.history.item:
                if (item.key or item.nested_key[0]) == "trainer/global_step":
                    part["steps"].append(json.loads(item.value_json))
            part["files"] |= {Path(file.path).name for file in record.files.files}
            if record.HasField("exit"):
                part["exit"] = record.exit.exit_code
        parts.append(part)
    return parts


def ids(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "trackers.json").read_text())
    return content


FACTS = {"num_parameters": 338, "micro_batch": 16, "accumulation": 2, "world_size": 1,
         "effective_batch": 32, "seed": 42, "model._target_": "app.models.cnn1d.Cnn1d",
         "accumulate.factor": 2}  # fmt: skip
FILES = {"config.yaml", "overrides.yaml", "metrics.csv", "result.json", "curves.png"}


def test_each_tracker_is_told_what_a_run_is_and_what_it_came_to(
    composed: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **_: asked.append(args) or [])
    searched = ("tuner=lr_find", "tuner.lr.num_steps=10", "tuner.cache=null", "optimizer.lr=0.1")
    typed = (*TYPED, "accumulate=constant", "accumulate.factor=2", *searched)
    result = run(composed(*typed, "logger=many", "logger.wandb.tags=[small]"), typed=["a=1"])
    assert asked == []
    assert result is not None
    expected = {**FACTS, "git_commit": result["git_commit"]}
    (of_mlflow,) = in_mlflow()
    assert of_mlflow.data.params.items() >= {k: str(v) for k, v in expected.items()}.items()
    measured = {f"result/{name}": value for name, value in result["metrics"].items()}
    assert of_mlflow.data.metrics.items() >= measured.items()
    assert (of_mlflow.info.status, of_mlflow.info.run_name) == ("FINISHED", "run")
    client = mlflow.MlflowClient()
    kept = {file.path for file in client.list_artifacts(of_mlflow.info.run_id)}
    assert kept >= FILES
    steps = client.get_metric_history(of_mlflow.info.run_id, "train_loss")
    assert [point.step for point in steps] == [2, 5]  # none of the search
    (of_wandb,) = in_wandb(tmp_path / "run")
    assert of_wandb["config"].items() >= expected.items()
    assert of_wandb["summary"].items() >= {**result["metrics"], "status": "finished"}.items()
    assert (of_wandb["project"], of_wandb["name"]) == (tmp_path.name, "run")
    assert of_wandb["exit"] == 0
    assert of_wandb["files"] >= FILES
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert "config/text_summary" in events.Tags()["tensors"]
    assert events.PluginTagToContent("hparams").keys() == {
        "_hparams_/experiment",
        "_hparams_/session_start_info",
        "_hparams_/session_end_info",
    }
    assert {*events.Tags()["scalars"]} >= measured.keys()
    assert "hp_metric" not in events.Tags()["scalars"]

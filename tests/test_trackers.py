"""W&B, MLflow and TensorBoard, offline: what they are told of a run, and that it is one run."""

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
from conftest import SMALL
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue

from app.cli.explained import explain
from app.errors import RankFailed, Refused
from app.fit import run
from app.logger.tracker import MOST_FAILURES, OF_SWEEPS
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

    stop: type[BaseException] = RuntimeError

    def __init__(self, signal: int | None = None) -> None:
        self.signal = signal

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        done = Path("cut")
        if trainer.global_step == 8 and trainer.is_global_zero and not done.exists():
            done.touch()
            if self.signal is None:
                raise self.stop("cut")
            os.kill(os.getpid(), self.signal)


def in_mlflow() -> list[Any]:
    """All runs."""
    client = mlflow.MlflowClient(f"sqlite:///{Path.cwd() / 'mlflow.db'}")
    experiments = [one.experiment_id for one in client.search_experiments()]
    return list(client.search_runs(experiments))


BLOCK, HEADER = 32768, 7


def records(path: Path) -> Iterator[bytes]:
    """The records of a log in LevelDB's format: checksum, length, kind, then data, in blocks."""
    data, at, found = path.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        found += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or its last part
            yield found
            found = b""


def in_wandb(folder: Path) -> list[dict[str, Any]]:
    """The parts of a run, in their order, as they would be synced."""
    from wandb.proto.wandb_internal_pb2 import Record

    parts = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        part: dict[str, Any] = {"config": {}, "summary": {}, "steps": [], "files": set()}
        for data in records(path):
            record = Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                of_run = record.run
                part |= {"id": of_run.run_id, "group": of_run.run_group, "tags": [*of_run.tags]}
                part |= {"project": of_run.project, "name": of_run.display_name}
            for name, items in (
                ("config", [*record.run.config.update, *record.config.update]),
                ("summary", record.summary.update),
            ):
                for item in items:
                    key = item.key or ".".join(item.nested_key)
                    part[name][key] = json.loads(item.value_json)
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
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    kept = {file.path for file in client.list_artifacts(of_mlflow.info.run_id)}
    assert kept >= FILES
    steps = client.get_metric_history(of_mlflow.info.run_id, "train_loss")
    assert [point.step for point in steps] == [2, 5]  # none of the search
    (of_wandb,) = in_wandb(tmp_path / "run")
    assert of_wandb["config"].items() >= expected.items()
    assert of_wandb["summary"].items() >= {**result["metrics"], "status": "finished"}.items()
    assert (of_wandb["project"], of_wandb["name"]) == (tmp_path.name, "run")
    assert of_wandb["tags"] == ["small"]
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


def test_two_ranks_are_one_run_and_go_on_with_it_after_a_kill(
    composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    sweep = tmp_path / "sweeps/lr"
    sweep.mkdir(parents=True)
    (sweep / "multirun.yaml").touch()
    two = ("strategy=ddp", "trainer.devices=2", "logger=many", "logger.tensorboard=null")
    kill = (CUT, f"+callbacks.cut.signal={int(signal.SIGKILL)}")
    typed = (*TYPED, *two, *kill, "trainer.log_every_n_steps=1", f"run_dir={sweep}/0")
    cfg = composed(*typed)
    with pytest.raises(RankFailed):
        run(cfg, typed=[])
    (begun,) = in_mlflow()
    before = ids(sweep / "0")
    assert begun.info.status == "RUNNING"
    assert run(cfg, typed=[]) is not None
    (of_mlflow,) = in_mlflow()
    assert ids(sweep / "0") == before
    assert of_mlflow.info.run_id == begun.info.run_id == before["mlflow"]["run_id"]
    assert of_mlflow.info.status == "FINISHED"
    assert of_mlflow.data.tags["group"] == "sweeps/lr"
    folders = [path.name for path in (sweep / "0/wandb").glob("offline-run-*")]
    assert len(folders) == 2
    assert {name.rpartition("-")[2] for name in folders} == {before["wandb"]["id"]}
    part = in_wandb(sweep / "0")[-1]  # W&B writes every 15 seconds: before the kill it had not
    assert (part["id"], part["group"], part["exit"]) == (before["wandb"]["id"], "sweeps/lr", 0)
    assert part["name"] == of_mlflow.info.run_name == "lr/0"
    assert {*part["steps"]} >= {*range(6, 12)}


def test_the_folder_of_a_sweep_is_known_by_its_journal() -> None:
    assert NAME in OF_SWEEPS


@pytest.mark.parametrize(
    ("stop", "state", "told"),
    [(RuntimeError, "failed", "FAILED"), (KeyboardInterrupt, "interrupted", "KILLED")],
)
def test_a_run_that_fails_is_marked_so(
    stop: type[BaseException],
    state: str,
    told: str,
    composed: Callable[..., DictConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Cut, "stop", stop)
    cfg = composed(*TYPED, "logger=many", "logger.tensorboard=null", CUT)
    with pytest.raises((stop, SystemExit)):
        run(cfg, typed=[])
    (of_mlflow,) = in_mlflow()
    (of_wandb,) = in_wandb(tmp_path / "run")
    assert (of_mlflow.info.status, of_mlflow.data.tags["status"]) == (told, state)
    assert (of_wandb["exit"], of_wandb["summary"]["status"]) == (1, state)


def test_what_cannot_begin_is_refused_in_a_line(
    composed: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(Refused, match=r"^logger.mlflow cannot begin: .*; put MLFLOW_TRACKING_URI="):
        run(composed(*TYPED, "logger=mlflow"), typed=[])


@pytest.mark.parametrize("num_failures", [1, MOST_FAILURES])
def test_a_tracker_that_fails_later_ends_no_run(
    num_failures: int,
    composed: Callable[..., DictConfig],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[str] = []
    log = mlflow.MlflowClient.log_batch

    def log_batch(self: Any, *args: Any, **settings: Any) -> None:
        if "metrics" in settings:
            tried.append("")
            if len(tried) <= num_failures:
                raise ConnectionError("the server\nis down")
        log(self, *args, **settings)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", log_batch)
    cfg = composed(*TYPED, "logger=mlflow", "trainer.log_every_n_steps=1", "test=none")
    assert run(cfg, typed=[]) is not None
    said = "logger.mlflow has failed: the server is down; the run goes on, and metrics.csv has all"
    assert capsys.readouterr().out.count(said) == 1
    (found,) = in_mlflow()
    assert found.info.status == "FINISHED"
    assert "result/val_loss" in found.data.metrics  # it is there again at the end
    client = mlflow.MlflowClient(f"sqlite:///{Path.cwd() / 'mlflow.db'}")
    steps = client.get_metric_history(found.info.run_id, "train_loss")
    assert len(steps) == (11 if num_failures == 1 else 0)


LOGIN = [
    ({}, "", False),
    ({"WANDB_API_KEY": "x" * 40}, "", True),
    ({}, "machine api.wandb.ai login user password x", True),
    ({"WANDB_BASE_URL": "https://wandb.mine"}, "machine api.wandb.ai login user password x", False),
]


@pytest.mark.parametrize(("variables", "netrc", "expected"), LOGIN)
def test_a_login_is_found(
    variables: dict[str, str],
    netrc: str,
    expected: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text(netrc)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert has_login() == expected


class Theirs(CSVLogger):
    """As many projects have one: it is told more than Lightning tells."""

    told: ClassVar[dict[str, Any]] = {}

    def __init__(self, save_dir: str, team: str = "") -> None:
        super().__init__(save_dir, name=team, version="")

    def log_hyperparams(self, params: Any = None) -> None:
        Theirs.told |= {"params": dict(params), "name": self.name}


THEIRS = ("logger=custom", "logger._target_=test_trackers.Theirs", "+logger.team=vision")


@pytest.mark.parametrize("more", ["+logger.save_dir=${run_dir}", "+logger._partial_=true"])
def test_a_class_of_others_stands_beside_metrics_csv_and_is_told_the_same(
    more: str, composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    Theirs.told.clear()
    result = run(composed(*TYPED, *THEIRS, more), typed=[])
    assert result is not None
    facts = {"effective_batch": 16, "git_commit": result["git_commit"], "num_parameters": 338}
    assert Theirs.told["params"].items() >= facts.items()
    assert Theirs.told["name"] == "vision"
    assert (tmp_path / "run/metrics.csv").exists()
    assert (tmp_path / "run/vision/metrics.csv").exists()
    assert run(composed(*TYPED, *THEIRS, more), typed=[]) == result  # it is the same run


REFUSED = [
    (("logger=custom",), "logger._target_ is required; type logger._target_=VALUE"),
    (("logger=custom", "logger._target_=torch.nn.Linear"),
     "logger.custom._target_ must be a Logger"),
    ((*THEIRS, "+logger.api_key=1234"),
     "logger.api_key must not be in a configuration, which files of the run hold, and was given; "
     "type logger.api_key=null, and put it into the environment variable that its class reads"),
    (("logger=wandb", "logger.wandb.project=''"),
     "logger.wandb.project must not be empty, got ''"),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "said"), REFUSED)
def test_what_is_typed_of_a_logger_is_checked(
    typed: tuple[str, ...], said: str, composed: Callable[..., DictConfig]
) -> None:
    with pytest.raises((Refused, MissingMandatoryValue)) as refusal:
        run(composed(*TYPED, *typed), typed=[])
    found = refusal.value
    text = str(found) if isinstance(found, Refused) else explain(found)
    assert text.startswith(said)

"""What a run leaves in its folder, and what the same command does a second time."""

import json
import multiprocessing
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL
from lightning.pytorch import Callback

from app import conf
from app.config import config_hash
from app.errors import Refused
from app.fit import train
from app.record.folder import RunFolder
from app.run.checkpoint import CheckpointFiles
from app.run.trainer import Trainer

HERE = Path(__file__).parent


@pytest.fixture
def trained(checked: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """Check, keep the configuration and train; returns the content of result.json."""

    def train_(*overrides: str) -> dict[str, Any]:
        config = checked(*SMALL, *overrides)
        folder = RunFolder(Path(config.run_dir))
        folder.path.mkdir(exist_ok=True)
        folder.write_config(config.plain, list(overrides))
        return train(config, folder)

    return train_


def command(*typed: str, cwd: Path, exit_code: int = 0) -> str:
    """What a command prints, both streams."""
    done = subprocess.run(
        [sys.executable, "-m", *typed],
        cwd=cwd,
        env={"PYTHONPATH": str(HERE), "PATH": "/usr/bin:/bin", "HOME": str(cwd)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == exit_code, done.stdout
    return done.stdout


def test_a_run_leaves_what_it_promises(trained: Callable[..., Any], tmp_path: Path) -> None:
    result = trained("logger=default", "accumulate=constant", "accumulate.factor=3")
    run = tmp_path / "run"
    found = {path.name for path in run.iterdir()}
    assert {"config.yaml", "overrides.yaml", "metrics.csv", "tensorboard", "checkpoints",
            "curves.png", "result.json"} <= found  # fmt: skip
    assert json.loads((run / "result.json").read_text()) == result
    assert result["status"] == "finished"
    assert result["optimizer_steps"] == 4
    assert result["batch"] == {
        "micro_batch": 16, "accumulation": 3, "world_size": 1, "effective_batch": 48,
    }  # fmt: skip
    assert set(result["metrics"]) == {"train_loss", "val_loss", "val_acc", "test_loss", "test_acc"}
    assert set(result["seconds"]) == {"build", "fit", "test", "curves"}
    assert all((run / path).exists() for path in result["checkpoints"].values())
    assert result["config_hash"]
    assert result["versions"]["torch"] == torch.__version__


def test_every_file_of_a_run_loads_without_running_code(
    trained: Callable[..., Any], tmp_path: Path
) -> None:
    trained("averaging=ema", "accumulate=constant", "clip=percentile")
    for path in (tmp_path / "run/checkpoints").iterdir():
        assert "state_dict" in torch.load(path, weights_only=True)


class Failing(Callback):
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            raise OSError("the disk is gone")


def test_a_failed_run_says_what_and_where_and_the_next_one_goes_on(
    trained: Callable[..., Any], tmp_path: Path
) -> None:
    failing = "+callbacks.failing._target_=test_train.Failing"
    with pytest.raises(OSError, match="the disk is gone"):
        trained(failing)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["status"] == "failed"
    assert result["error"] == "OSError: the disk is gone"
    assert "test_train.py" in result["where"]
    assert trained()["epochs"] == 2


def test_a_run_that_was_cut_in_its_test_is_tested_and_tells_of_its_fit(
    trained: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_cut(*args: Any, **kwargs: Any) -> None:
        raise SystemExit(143)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "test", is_cut)
        with pytest.raises(SystemExit):
            trained()
    result = trained()
    assert result["status"] == "finished"
    assert result["batch"]["effective_batch"] == 16
    assert "test_loss" in result["metrics"]


def test_the_config_moves_with_its_folder(
    trained: Callable[..., Any], checked: Callable[..., Any], tmp_path: Path
) -> None:
    trained()
    moved = (tmp_path / "run").rename(tmp_path / "elsewhere")
    config = RunFolder(moved).read_config()
    assert config is not None
    assert config["callbacks"]["checkpoint"]["dirpath"] == f"{moved}/checkpoints"
    assert config_hash(config) == config_hash(checked(*SMALL, "name=other").plain)


def test_a_changed_config_is_refused_and_the_keys_are_named(
    trained: Callable[..., Any], checked: Callable[..., Any], tmp_path: Path
) -> None:
    trained()
    folder = RunFolder(tmp_path / "run")
    folder.refuse_changes(checked(*SMALL, "resume=never", "name=other").plain)
    with pytest.raises(Refused) as refusal:
        folder.refuse_changes(checked(*SMALL, "clip.max_norm=2", "averaging=ema").plain)
    text = str(refusal.value)
    assert "holds a run with another configuration:\n  averaging: None -> None\n" not in text
    assert "  clip.max_norm: 1.0 -> 2.0\n" in text
    assert "  averaging.horizon: None -> 0.05\n" in text
    assert text.endswith(
        "give this run another name=, or type resume=never to move the old one aside"
    )


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    with (
        first.locked(),
        pytest.raises(Refused, match="is being trained by process"),
        second.locked(),
    ):
        pass


def _work_long(has_begun: Any) -> None:
    has_begun.set()
    time.sleep(60)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_folder_is_free_when_its_process_is_killed_though_its_workers_live_on(
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        context = multiprocessing.get_context("fork")
        has_begun = context.Event()
        worker = context.Process(target=_work_long, args=(has_begun,))
        worker.start()
        assert folder.is_held()
        assert has_begun.wait(60)
    assert worker.is_alive()
    assert not folder.is_held()
    worker.kill()
    worker.join()


def test_data_without_a_test_part_is_trained_on_all_the_same(
    checked: Callable[..., Any], tmp_path: Path
) -> None:
    config = checked(
        "model=custom", "model._target_=theirs.LitModel", "data=custom", "optimizer=none",
        "data._target_=theirs.LitData", "logger=csv", "trainer.max_epochs=1",
    )  # fmt: skip
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    without = config.but(data={"_target_": "theirs.TrainOnly"})
    assert "test_loss" not in train(without, folder)["metrics"]


@pytest.mark.parametrize("monitor", ["raw_val_loss", "null"])
def test_without_the_monitored_metric_the_last_checkpoint_is_tested(
    trained: Callable[..., Any], monitor: str
) -> None:
    text = "raw_val_loss is not logged by Cnn1d, which logs"
    with nullcontext() if monitor == "null" else pytest.warns(UserWarning, match=text):
        result = trained(f"callbacks.checkpoint.monitor={monitor}")
    assert Path(result["checkpoints"]["best"]).name == "last.ckpt"
    assert "test_acc" in result["metrics"]


def test_a_checkpoint_never_names_code(tmp_path: Path) -> None:
    files, path = CheckpointFiles(), tmp_path / "a.ckpt"
    head: dict[str, Any] = {"state_dict": {}, "pytorch-lightning_version": "2.6"}
    hyper_parameters = {"lr": 0.2, "activation": torch.nn.ReLU, "where": tmp_path}
    with pytest.warns(
        UserWarning, match="hyper_parameters.activation holds a builtins.type; it is"
    ):
        files.save_checkpoint({**head, "hyper_parameters": hyper_parameters}, path)
    kept = {"lr": 0.2, "where": str(tmp_path)}
    assert files.load_checkpoint(path) == {**head, "hyper_parameters": kept}
    with pytest.raises(Refused) as refusal:
        files.save_checkpoint({"callbacks": {"Theirs": {"seen": [1, Failing()]}}}, path)
    assert str(refusal.value) == (
        "checkpoint: callbacks.Theirs.seen[1] holds a test_train.Failing; a checkpoint holds "
        "tensors and plain values only, so that loading it never runs code: return those from "
        "state_dict()"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]  # still the one before
    torch.save({"model": Failing()}, path)
    with pytest.raises(ValueError, match="holds more than tensors and plain values"):
        files.load_checkpoint(path)


@pytest.mark.slow
def test_the_commands_of_the_readme_work_as_processes(tmp_path: Path) -> None:
    train_ = ("app.train", "name=mine", "trainer.max_epochs=2")
    first = command(*train_, cwd=tmp_path)
    assert "micro-batch 128 x accumulation 1 x world size 1 = 128" in first
    assert "64 optimizer steps of 5,210 parameters" in first
    assert "epoch 2/2" in first
    assert "runs/mine is finished" in command(*train_, cwd=tmp_path)
    refused = command(*train_, "clip=value", cwd=tmp_path, exit_code=2)
    assert "clip.max_value: None -> 0.01" in refused
    assert "is now in" in command(*train_, "clip=value", "resume=never", cwd=tmp_path)
    assert (tmp_path / "runs/mine.1/result.json").exists()

    for stage in ("test", "validate"):
        command("app.evaluate", "run=runs/mine", f"stage={stage}", cwd=tmp_path)
        metrics = json.loads((tmp_path / f"runs/mine/{stage}.json").read_text())["metrics"]
        result = json.loads((tmp_path / "runs/mine/result.json").read_text())
        if stage == "test":
            assert metrics["test_acc"] == result["metrics"]["test_acc"]
    command("app.evaluate", "run=runs/mine", "stage=predict", cwd=tmp_path)
    predictions = torch.load(tmp_path / "runs/mine/predictions.pt", weights_only=True)
    assert sum(len(part) for part in predictions) == 10_000
    assert command("app.evaluate", "run=runs/none", cwd=tmp_path, exit_code=2) == (
        "evaluate: run must be the folder of a run, got runs/none: it has no config.yaml\n"
    )

    assert command("app.train", "clip.max_norm=-1", cwd=tmp_path, exit_code=2) == (
        "train: clip.max_norm must be > 0, got -1.0; to switch clipping off use clip=none\n"
    )
    assert {path.name for path in (tmp_path / "runs").glob("[!.]*")} == {"mine", "mine.1"}


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_how_to_go_on_and_exits_as_stopped(tmp_path: Path, sent: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "app.train", "name=mine", "trainer.max_epochs=500"],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch 2/"):
                process.send_signal(sent)
                break
        assert "interrupted; to go on type the same with name=mine\n" in process.stdout.read()
    assert process.returncode == 128 + sent
    result = json.loads((tmp_path / "runs/mine/result.json").read_text())
    assert result["status"] == "interrupted"


@pytest.mark.slow
def test_a_users_own_model_and_presets_need_no_fork(tmp_path: Path) -> None:
    (tmp_path / "presets/clip").mkdir(parents=True)
    (tmp_path / "presets/clip/mine.yaml").write_text(
        "defaults: [/schema/clip/norm@_here_]\nmax_norm: 0.25\nnorm_type: 2.0\nnonfinite: error\n"
    )
    command(
        "app.train", "--config-dir", "presets", "clip=mine", "model=custom",
        "model._target_=theirs.LitModel", "+model.lr=0.01", "data=custom",
        "data._target_=theirs.LitData", "optimizer=none", "trainer.max_epochs=2", "name=theirs",
        cwd=tmp_path,
    )  # fmt: skip
    config = RunFolder(tmp_path / "runs/theirs").read_config()
    assert config is not None
    assert config["clip"]["max_norm"] == 0.25
    assert config["model"] == {"_target_": "theirs.LitModel", "hidden": 8, "lr": 0.01}


def test_help_lists_every_group_with_its_presets(tmp_path: Path) -> None:
    text = command("app.train", "--help", cwd=tmp_path)
    assert "clip=adaptive|custom|none|norm|percentile|value" in text
    presets = (Path(conf.__file__).parent / "averaging").glob("*.yaml")
    assert f"averaging={'|'.join(sorted(path.stem for path in presets))}\n" in text

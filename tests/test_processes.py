"""Whole commands in several processes: sweeps, torchrun, failures, interruptions."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import wait_until
from omegaconf import DictConfig

from app.fit import run

HERE = Path(__file__).parent
SMALL = ("trainer.accelerator=cpu", "trainer.limit_train_batches=4", "trainer.max_epochs=2",
         "trainer.limit_test_batches=1", "logger=csv")  # fmt: skip
DDP = ("strategy=ddp", "trainer.devices=2")
FOR_LONG = ("trainer.accelerator=cpu", "trainer.max_epochs=1000", "name=long", *DDP)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(HERE)}


def command(*typed: str, cwd: Path, exit_code: int = 0, module: str = "app.train") -> str:
    """What a command prints, both streams."""
    done = subprocess.run(
        [sys.executable, "-m", module, *typed],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == exit_code, done.stdout
    return done.stdout


def checkpoint(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)
    return content


@pytest.mark.slow
def test_hydra_ddp_multirun_hydra_spawn_a_job_is_one_configuration_in_all_ranks(
    tmp_path: Path,
) -> None:
    printed = command(
        "-m", "optimizer=none", "model=custom", "model._target_=theirs.LitModel", "data=custom",
        "data._target_=theirs.LitData", "+model.lr=shuffle(0.03,0.01)", *DDP,
        "+logger.mine._target_=lightning.pytorch.loggers.CSVLogger",
        "+logger.mine.save_dir=x-${hydra:job.num}",
        "hydra.sweep.dir=sweep", "trainer.accelerator=cpu", "trainer.max_epochs=1", cwd=tmp_path,
    )  # fmt: skip
    assert printed.count("finished") == 2
    folders = sorted(path for path in (tmp_path / "sweep").iterdir() if path.is_dir())
    assert [folder.name for folder in folders] == ["0", "1"]
    rates = set()
    for folder in folders:
        (typed,) = [
            line for line in (folder / "overrides.yaml").read_text().split() if "model.lr" in line
        ]
        content = checkpoint(folder)
        assert len(content["resume"]) == 2  # ranks
        rate = content["hyper_parameters"]["lr"]
        assert typed == f"+model.lr={rate}"
        rates.add(rate)
    assert rates == {0.03, 0.01}
    assert (tmp_path / "x-0").exists()
    assert (tmp_path / "x-1").exists()


@pytest.mark.slow
def test_the_shares_of_all_ranks_are_the_epoch_and_torchrun_starts_nothing_more(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "app.train",
         "strategy=ddp", "data.batch_size=8", *SMALL],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished") == 1
    (folder,) = [path for path in (tmp_path / "runs").iterdir() if path.is_dir()]
    result = json.loads((folder / "result.json").read_text())
    assert result["batch"]["world_size"] == 2
    command("name=alone", "data.batch_size=16", *SMALL, cwd=tmp_path)
    weights, alone = (checkpoint(path)["state_dict"] for path in (folder, tmp_path / "runs/alone"))
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, alone[name], atol=1e-5, rtol=0)
    printed = command(f"run={folder}", cwd=tmp_path, module="app.evaluate")
    assert printed.count("test_acc") == 1  # by one process, also of a run of two


@pytest.mark.slow
def test_torchrun_with_other_processes_than_devices_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "app.train",
         "strategy=ddp", "trainer.devices=3", *SMALL],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    assert (
        "train: trainer.devices must be 2, the processes that were started on this machine, got 3; "
        "type trainer.devices=2" in done.stderr
    )
    assert not any((tmp_path / "runs").glob("2*/*"))  # an empty one may stay: torchrun kills ranks


def start_for_long(cwd: Path) -> subprocess.Popen[str]:
    """A run of two ranks in a session of its own, when it has trained for an epoch."""
    before = time.time()
    process = subprocess.Popen(
        [sys.executable, "-m", "app.train", *FOR_LONG],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    last = cwd / "runs/long/checkpoints/last.ckpt"
    wait_until(lambda: last.exists() and last.stat().st_mtime > before)
    return process


def processes_of(session: int) -> list[int]:
    """Processes of a session that run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of_session = path.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(of_session) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def ranks_of(session: int) -> list[int]:
    """Processes of a session that have threads of gloo."""
    return [
        pid
        for pid in processes_of(session)
        if any("gloo" in name.read_text() for name in Path(f"/proc/{pid}/task").glob("*/comm"))
    ]


@pytest.mark.slow
def test_a_rank_killed_with_9_is_named_and_the_same_command_goes_on(tmp_path: Path) -> None:
    process = start_for_long(tmp_path)
    os.kill(ranks_of(process.pid)[-1], signal.SIGKILL)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "train: rank " in printed
    assert "was ended by SIGKILL" in printed
    assert "Traceback" not in printed
    wait_until(lambda: not processes_of(process.pid))
    result = json.loads((tmp_path / "runs/long/result.json").read_text())
    assert result["status"] == "failed"
    assert "was ended by SIGKILL" in result["error"]
    again = start_for_long(tmp_path)
    os.killpg(again.pid, signal.SIGINT)
    printed, _ = again.communicate(timeout=120)
    assert "continuing from" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "whole_group"), [(signal.SIGINT, True), (signal.SIGTERM, False)]
)
def test_an_interrupted_run_of_several_ranks_exits_as_interrupted_and_leaves_nothing(
    tmp_path: Path, number: int, whole_group: bool
) -> None:
    process = start_for_long(tmp_path)
    if whole_group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert printed.count("interrupted; to go on type the same with name=long") == 1
    wait_until(lambda: not processes_of(process.pid))
    result = json.loads((tmp_path / "runs/long/result.json").read_text())
    assert result["status"] == "interrupted"


def test_spawn_state_a_script_or_a_notebook_gets_the_result_of_all_ranks(
    composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    cfg = composed(*DDP, *SMALL, "callbacks.progress=null", "data.batch_size=8")
    result = run(cfg, typed=[])
    assert result is not None
    assert result["status"] == "finished"
    assert result["optimizer_steps"] == 8
    assert result["metrics"]["test_acc"] > 0
    assert json.loads((tmp_path / "run/result.json").read_text()) == result
    assert run(cfg, typed=[]) == result  # finished: not trained again

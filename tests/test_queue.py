"""Sweeps over slots, as commands: their results, failures, interruptions, and how they go on."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from conftest import wait_until
from test_processes import checkpoint, command, environment, processes_of

from app.record.folder import RunFolder
from app.sweep.journal import Job, Journal

EXAMPLES = Path(__file__).parents[1] / "multirun_examples"
TINY = ("model.channels=4", "trainer.max_epochs=1", "trainer.limit_train_batches=2",
        "trainer.limit_val_batches=1", "trainer.limit_test_batches=1", "callbacks.progress=null",
        "logger=csv", "data.batch_size=16", "trainer.accelerator=cpu")  # fmt: skip
SEEDS = ("-m", "seed=1,2,3,4", *TINY)
LOCAL = ("launch=local", "launch.slots=2")
FAILING = '''
from pathlib import Path
import theirs
class FailsOnce(theirs.LitModel):
    """Number 1 fails while there is a file of that name."""
    def __init__(self, number):
        super().__init__()
        self.number = number
    def training_step(self, batch, batch_idx):
        if self.number == 1 and Path("failing").exists():
            raise LookupError("the data are gone")
        return super().training_step(batch, batch_idx)
'''
GATHERING = '''
import multiprocessing
import theirs
import torch
class Gathering(theirs.LitModel):
    """Its checkpoints say at which rate each rank trains, and how it would start workers."""
    def on_save_checkpoint(self, checkpoint):
        rate = torch.tensor(self.optimizers().param_groups[0]["lr"], dtype=torch.float64)
        checkpoint["rate_of_each_rank"] = self.all_gather(rate).tolist()
        checkpoint["starts_processes_by"] = multiprocessing.get_start_method()
'''
THEIRS = ("optimizer=none", "model=custom", "model._target_=failing.FailsOnce", "data=custom",
          "data._target_=theirs.LitData", "trainer.accelerator=cpu", "trainer.max_epochs=1",
          "trainer.limit_train_batches=2", "logger=csv")  # fmt: skip


def jobs_in(folder: Path) -> list[Job]:
    sweep = Journal(folder).read()
    return [] if sweep is None else list(sweep.jobs.values())


def states_in(folder: Path) -> list[str]:
    return [job.state for job in jobs_in(folder)]


def attempts_in(folder: Path) -> list[int]:
    return [job.attempt for job in jobs_in(folder)]


def results(folder: Path) -> list[Any]:
    """Metrics and weights of each job."""
    found = []
    for job in range(4):
        path = folder / str(job)
        weights = torch.load(path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        metrics = json.loads((path / "result.json").read_text())["metrics"]
        found.append((metrics, {name: tensor.tolist() for name, tensor in weights.items()}))
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What Hydra's own launcher comes to."""
    cwd = tmp_path_factory.mktemp("basic")
    command(*SEEDS, "hydra.sweep.dir=sweep", cwd=cwd)
    return results(cwd / "sweep")


def start(cwd: Path, *typed: str) -> subprocess.Popen[str]:
    """A command in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "app.train", *typed],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def only_sweep(cwd: Path) -> Path:
    (path,) = cwd.glob("multirun/*/*/journal.jsonl")
    return path.parent


def has_sweep(cwd: Path, holds: Callable[[Path], bool]) -> bool:
    return any(holds(path.parent) for path in cwd.glob("multirun/*/*/journal.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 5])
def test_killed_with_9_at_any_moment_the_same_command_runs_what_is_missing_to_equal_results(
    tmp_path: Path, expected: list[Any], seed: int
) -> None:
    random = Random(seed)
    num_finished, then_s = random.randrange(2), random.uniform(0, 0.15)
    launcher = start(tmp_path, *SEEDS, *LOCAL)
    wait_until(lambda: has_sweep(tmp_path, lambda sweep: (sweep / "0/job.log").exists()))
    sweep = only_sweep(tmp_path)
    wait_until(lambda: states_in(sweep).count("finished") >= num_finished)
    time.sleep(then_s)
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    before = jobs_in(sweep)
    num_missing = sum(job.state != "finished" for job in before)
    assert 0 < num_missing <= 4 - num_finished

    printed = command(*SEEDS, *LOCAL, cwd=tmp_path)  # while the killed one's jobs end
    assert f"continuing {sweep.relative_to(tmp_path)}: " in printed
    assert f"; {num_missing} to run (resume=never starts a sweep anew)" in printed
    launcher.communicate(timeout=120)
    wait_until(lambda: not processes_of(launcher.pid))
    assert only_sweep(tmp_path) == sweep
    assert states_in(sweep) == ["finished"] * 4
    for old, new in zip(before, jobs_in(sweep), strict=True):
        assert new.attempt == old.attempt + (old.state != "finished")
    assert results(sweep) == expected
    log = (sweep / "0/job.log").read_text()
    assert log.count("finished  test_acc") == 1
    assert "test_acc" not in printed


@pytest.mark.slow
def test_a_job_that_fails_is_tried_again_listed_last_and_retried(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    (tmp_path / "failing").touch()
    printed = command(
        "-m", "+model.number=0,1,2", "launch=local", "launch.slots=1", "launch.retries=1",
        "launch.on_fail=stop", "hydra.sweep.dir=sweep", *THEIRS, cwd=tmp_path, exit_code=1,
    )  # fmt: skip
    sweep = tmp_path / "sweep"
    # tried again after the one that waited
    assert states_in(sweep) == ["finished", "failed", "finished"]
    assert attempts_in(sweep) == [1, 2, 1]
    assert jobs_in(sweep)[1].error == "LookupError: the data are gone"
    single = f"python -m app.train +model.number=1 {' '.join(THEIRS)} hydra.run.dir=sweep/1"
    assert printed.endswith(
        "train: sweep: 2 finished, 1 failed\n"
        "#1  +model.number=1\n"
        "    LookupError: the data are gone\n"
        "    sweep/1/job.log\n"
        f"    {single}\n"
        "all of them: python -m app.sweep retry sweep\n"
    )
    assert (sweep / "1/job.log").read_text().count("Traceback") == 2
    assert "Traceback" not in printed
    shown = command("status", "sweep", cwd=tmp_path, module="app.sweep")
    assert "sweep: 2 finished, 1 failed; not running" in shown

    (tmp_path / "failing").unlink()
    command("retry", "sweep", cwd=tmp_path, module="app.sweep")
    assert states_in(sweep) == ["finished"] * 3
    assert attempts_in(sweep) == [1, 3, 1]
    typed = ("-m", "+model.number=0,1,2", "launch=local", "launch.jobs=[7]", *THEIRS)
    refused = command(*typed, "hydra.sweep.dir=sweep", cwd=tmp_path, exit_code=2)
    assert refused.endswith(
        "train: launch.jobs must be numbers of the sweep's jobs, 0 to 2, got [7]; type "
        "launch.jobs=null\n"
    )
    shown = command("retry", "sweep", cwd=tmp_path, module="app.sweep")
    assert shown == "sweep: 3 finished; nothing to retry\n"


@pytest.mark.slow
def test_ctrl_c_ends_the_jobs_as_interrupted_runs_that_resume_and_can_be_cancelled(
    tmp_path: Path,
) -> None:
    typed = ("-m", "seed=1,2,3", *TINY, *LOCAL, "trainer.max_epochs=100000")
    launcher = start(tmp_path, *typed)
    trained = lambda job: (only_sweep(tmp_path) / job / "checkpoints/last.ckpt").exists()  # noqa: E731
    wait_until(lambda: has_sweep(tmp_path, lambda _: trained("0") and trained("1")))
    os.killpg(launcher.pid, signal.SIGINT)
    printed, _ = launcher.communicate(timeout=120)
    sweep = only_sweep(tmp_path)
    assert launcher.returncode == 128 + signal.SIGINT, printed
    assert "interrupted: 2 interrupted, 1 queued; to go on type the same command, or " in printed
    assert states_in(sweep) == ["interrupted", "interrupted", "queued"]
    assert json.loads((sweep / "0/result.json").read_text())["status"] == "interrupted"
    wait_until(lambda: not processes_of(launcher.pid))

    resumed = subprocess.Popen(
        [sys.executable, "-m", "app.sweep", "resume", str(sweep)],
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    logs = [sweep / str(job) / "job.log" for job in range(2)]
    wait_until(lambda: all("continuing from" in log.read_text() for log in logs))
    refused = command("resume", str(sweep), cwd=tmp_path, module="app.sweep", exit_code=2)
    assert f"is being run by process {resumed.pid} on" in refused
    shown = command("cancel", str(sweep), cwd=tmp_path, module="app.sweep")
    assert shown.endswith("3 cancelled\n")
    resumed.communicate(timeout=120)
    assert resumed.returncode == 128 + signal.SIGTERM
    wait_until(lambda: not processes_of(resumed.pid))
    shown = command("resume", str(sweep), cwd=tmp_path, module="app.sweep")
    assert shown.endswith("3 cancelled; nothing to resume\n")


@pytest.mark.slow
def test_ctrl_c_while_the_first_job_waits_for_its_process_leaves_a_sweep_that_goes_on(
    tmp_path: Path,
) -> None:
    launcher = start(tmp_path, *SEEDS, *LOCAL)
    wait_until(lambda: has_sweep(tmp_path, lambda sweep: "running" in states_in(sweep)))
    os.killpg(launcher.pid, signal.SIGINT)
    printed, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 128 + signal.SIGINT
    assert "Traceback" not in printed
    assert "; to go on type the same command, or python -m app.sweep resume multirun/" in printed
    assert set(states_in(only_sweep(tmp_path))) == {"interrupted", "queued"}


@pytest.mark.slow
@pytest.mark.skipif(find_spec("optuna") is None, reason="needs pip install -e '.[optuna]'")
def test_the_commands_of_a_failed_trial_of_an_example_run_it_alone(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    (tmp_path / "failing").touch()
    printed = command(
        "--config-dir", str(EXAMPLES), "--config-name", "optuna_study", "launch=local",
        "sweep.num_trials=1", "model=custom", "model._target_=failing.FailsOnce",
        "+model.number=1", *THEIRS[3:], "optimizer=sgd", cwd=tmp_path, exit_code=1,
    )  # fmt: skip
    of_the_queue = printed.splitlines()[-1]
    refused = command(
        "retry", "multirun/optuna_study", cwd=tmp_path, module="app.sweep", exit_code=2
    )
    assert refused.startswith("sweep: multirun/optuna_study is a study, which has learned that ")
    reported = command("multirun/optuna_study", cwd=tmp_path, module="app.report")
    (of_the_report,) = (line for line in reported.splitlines() if "python -m app.train" in line)
    (tmp_path / "failing").unlink()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for typed, said in ((of_the_queue, "finished  test_loss"), (of_the_report, "is finished; see")):
        done = subprocess.run(
            typed, shell=True, cwd=tmp_path, env={**environment(), "PATH": path},
            capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
        assert said in done.stdout


@pytest.mark.slow
def test_two_launchers_of_one_second_run_two_sweeps(tmp_path: Path) -> None:
    typed = ("-m", "seed=1", *TINY, "launch=local", "launch.slots=1",
             "hydra.sweep.dir='multirun/${now:%Y}/now'")  # fmt: skip
    launchers = [start(tmp_path, *typed) for _ in range(2)]
    for launcher in launchers:
        printed, _ = launcher.communicate(timeout=120)
        assert launcher.returncode == 0, printed
    sweeps = sorted(path.parent for path in tmp_path.glob("multirun/*/*/journal.jsonl"))
    assert [sweep.name for sweep in sweeps] == ["now", "now-1"]
    assert [states_in(sweep) for sweep in sweeps] == [["finished"], ["finished"]]


@pytest.mark.slow
def test_jobs_of_two_ranks_take_two_slots_each_and_train_at_one_rate_in_all_ranks(
    tmp_path: Path,
) -> None:
    (tmp_path / "gathering.py").write_text(GATHERING)
    command(
        "-m", "optimizer=sgd", "optimizer.lr=shuffle(0.03,0.01,0.1)", "model=custom",
        "model._target_=gathering.Gathering", "data=custom", "data._target_=theirs.LitData",
        "launch=local", "launch.slots=4", "launch.devices_per_job=2", "strategy=ddp",
        "trainer.devices=2", "trainer.accelerator=cpu", "trainer.max_epochs=1", "logger=csv",
        "hydra.sweep.dir=sweep", cwd=tmp_path,
    )  # fmt: skip
    rates = set()
    for job in jobs_in(tmp_path / "sweep"):
        assert job.state == "finished"
        assert job.device in ("0,1", "2,3")
        content = checkpoint(tmp_path / f"sweep/{job.job}")
        rate, other = content["rate_of_each_rank"]
        assert rate == other
        assert content["starts_processes_by"] == multiprocessing.get_start_method()
        assert f"optimizer.lr={rate}" in job.overrides
        rates.add(rate)
    assert rates == {0.03, 0.01, 0.1}


@pytest.mark.slow
def test_jobs_that_run_at_the_same_time_search_once_for_what_decides_the_answer(
    tmp_path: Path,
) -> None:
    command(
        "-m", "data.batch_size=16,32", "seed=1,2", *TINY[:-2], "trainer.accelerator=cpu",
        "tuner=lr_find", "tuner.lr.num_steps=40", "tuner.lr.on_doubt=use", *LOCAL,
        "hydra.sweep.dir=sweep", cwd=tmp_path,
    )  # fmt: skip
    events = Journal(tmp_path / "sweep").events()
    begun = [(event["job"], event["state"]) for event in events if event["event"] == "job"][4:6]
    assert begun == [(0, "running"), (1, "running")]  # the same size, at the same time
    answers = []
    for job in range(4):
        run = RunFolder(tmp_path / f"sweep/{job}")
        config, log = run.read_config(), (run.path / "job.log").read_text()
        assert config is not None
        rate = config["optimizer"]["lr"]
        assert f"tuner: optimizer.lr={rate}" in log
        answers.append((rate, "(from runs/.tuned/" in log))
    rates, were_there = zip(*answers, strict=True)
    assert rates[0] == rates[1] != rates[2] == rates[3]
    # one searched, the other waited for it
    assert sorted(were_there[:2]) == sorted(were_there[2:]) == [False, True]


def test_one_run_on_a_queue_is_refused_and_a_queue_without_settings_too(tmp_path: Path) -> None:
    printed = command("launch=local", cwd=tmp_path, exit_code=2)
    assert printed == (
        "train: launch=local runs the jobs of a sweep, and this is one run; type -m as well, or "
        "launch=none\n"
    )
    printed = command("-m", "seed=1,2", "hydra/launcher=queue", cwd=tmp_path, exit_code=2)
    assert printed == (
        "train: hydra/launcher=queue has no settings; type launch=local or launch=slurm instead\n"
    )

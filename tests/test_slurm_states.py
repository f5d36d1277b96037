"""What a run's state is, by its result and by what SLURM says of its job."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from app.process import files
from app.record import folder
from app.record.folder import RunFolder
from app.record.states import SLURM_JOB, State
from app.report.reading import read_runs
from app.slurm import states as slurm_states
from app.slurm.states import GONE, UNKNOWN, Signs, true_state
from app.sweep.folder import SweepFolder
from app.sweep.journal import Job


@pytest.mark.parametrize(
    ("status", "said", "state"),
    [
        ("queued", "PENDING", "queued"),
        ("queued", "RUNNING", "running"),  # it imports torch
        ("running", "RUNNING", "running"),
        ("interrupted", "PENDING", "queued"),  # requeued
        ("interrupted", "COMPLETING", "running"),
        ("interrupted", "CANCELLED", "cancelled"),
        ("running", "TIMEOUT", "failed"),
        ("running", "NODE_FAIL", "failed"),
        ("running", "OUT_OF_MEMORY", "failed"),
        ("running", "COMPLETED", "interrupted"),
        ("failed", "FAILED", "failed"),
        ("failed", "PENDING", "queued"),
        ("finished", "COMPLETED", "finished"),
        ("finished", "CANCELLED", "finished"),
        ("pruned", None, "pruned"),
        ("running", None, "running"),
        ("running", UNKNOWN, "interrupted"),
        ("failed", UNKNOWN, "failed"),
        ("running", GONE, "interrupted"),
        ("failed", GONE, "failed"),
    ],
)
def test_the_state_is_the_runs_word_where_it_is_final_and_slurms_before(
    status: str, said: str | None, state: str
) -> None:
    result: dict[str, Any] = {"status": status, SLURM_JOB: "7_1", "error": "its error"}
    found, error = true_state(Signs(result=result), said)
    assert found == state
    assert (error is None) == (state in ("queued", "running", "finished", "pruned")) or said is None


def test_a_new_job_may_be_unknown_to_accounting_for_a_while() -> None:
    result = {"status": "queued", SLURM_JOB: "7", "submitted_at": time.time()}
    assert true_state(Signs(result=result), UNKNOWN) == ("queued", None)
    result["submitted_at"] = time.time() - 1000
    assert true_state(Signs(result=result), UNKNOWN) == (
        "interrupted", "SLURM knows nothing of job 7 any more"
    )  # fmt: skip


def test_without_accounting_a_new_job_of_an_array_is_gone_where_it_was_cancelled_waiting() -> None:
    result = {"status": "queued", SLURM_JOB: "7_3", "submitted_at": time.time()}
    assert true_state(Signs(result=result), GONE) == ("cancelled", "job 7_3 was cancelled")
    result["submitted_at"] = time.time() - 1000
    assert true_state(Signs(result=result), GONE)[0] == "interrupted"


def test_a_sweep_of_a_thousand_jobs_asks_slurm_once_and_reads_each_result_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []
    read: list[Path] = []
    real = files.read_json

    def read_json(path: Path) -> Any:
        read.append(path)
        return real(path)

    def answer(*command: str) -> str:
        asked.append(command)
        lines = [f"{n // 100}_{n % 100}|RUNNING|node" for n in range(1000) if n % 3]
        return "\n".join(["JobID|State|NodeList", *lines])

    monkeypatch.setattr(slurm_states, "_answer", answer)
    monkeypatch.setattr(folder, "read_json", read_json)
    for number in range(1000):
        result = {"status": "queued", SLURM_JOB: f"{number // 100}_{number % 100}"}
        RunFolder(tmp_path / str(number)).path.mkdir()
        RunFolder(tmp_path / str(number)).write_result(result)
    jobs = [Job(job=number, overrides=[], attempt=1) for number in range(1000)]
    SweepFolder(tmp_path).refresh(jobs)
    states = [job.state for job in jobs]
    assert states == [State.running if n % 3 else State.interrupted for n in range(1000)]
    assert len(asked) == 1
    assert sorted(read) == sorted(tmp_path / f"{n}/result.json" for n in range(1000))


RESULTS = (None, *(state for state in State if not state.has_no_result))
NOTED = (None, "queued", "running", "finished", "failed", "interrupted", "cancelled")


@pytest.mark.parametrize("noted", NOTED)
@pytest.mark.parametrize("status", RESULTS)
@pytest.mark.parametrize("said", [None, "RUNNING", "CANCELLED", UNKNOWN])
def test_the_report_and_the_sweep_say_the_same_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str, noted: str, said: str
) -> None:
    monkeypatch.setattr(
        slurm_states, "states", lambda ids: dict.fromkeys(ids, said) if said else {}
    )
    run = RunFolder(tmp_path / "0")
    run.path.mkdir()
    if status is not None:
        number = {} if said is None else {SLURM_JOB: "7"}
        run.write_result({"status": status, "metrics": {}, **number})
    events: list[dict[str, Any]] = [
        {"event": "sweep", "command": ["python", "-m", "app.train"], "cwd": "/", "hash": "0",
         "definition": {"config": "train", "config_dirs": [], "overrides": []},
         "jobs": [["seed=1"]]},
    ]  # fmt: skip
    if noted is not None:
        events.append({"event": "job", "job": 0, "state": noted, "attempt": 1, "folder": "0"})
    sweep = SweepFolder(tmp_path)
    sweep.journal.write(events)
    jobs = list(sweep.journal.required().jobs.values())
    sweep.refresh(jobs)
    (found,) = read_runs(tmp_path).runs
    assert (found.folder, found.state) == (run.path, jobs[0].state)
    assert str(found.state) == json.loads(json.dumps(found.state)) == found.state.value

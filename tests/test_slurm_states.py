"""What a run's state is, by its result and by what SLURM says of its job."""

import time
from typing import Any

import pytest

from app.run.states import SLURM_JOB
from app.slurm.states import GONE, UNKNOWN, state_of


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
    found, error = state_of(result, said)
    assert found == state
    assert (error is None) == (state in ("queued", "running", "finished", "pruned")) or said is None


def test_a_new_job_may_be_unknown_to_accounting_for_a_while() -> None:
    result = {"status": "queued", SLURM_JOB: "7", "submitted_at": time.time()}
    assert state_of(result, UNKNOWN) == ("queued", None)
    result["submitted_at"] = time.time() - 1000
    assert state_of(result, UNKNOWN) == (
        "interrupted", "SLURM knows nothing of job 7 any more"
    )  # fmt: skip


def test_without_accounting_a_new_job_of_an_array_is_gone_where_it_was_cancelled_waiting() -> None:
    result = {"status": "queued", SLURM_JOB: "7_3", "submitted_at": time.time()}
    assert state_of(result, GONE) == ("cancelled", "job 7_3 was cancelled")
    result["submitted_at"] = time.time() - 1000
    assert state_of(result, GONE)[0] == "interrupted"

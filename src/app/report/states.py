"""The true state of a run, where result, journal and lock may contradict each other."""

from collections.abc import Mapping
from typing import Any

from app.run.states import ENDED as DONE
from app.run.states import UNREADABLE
from app.sweep.journal import Job

KILLED = "ended without a word: killed"
ENDED = ("failed", "interrupted", "cancelled")


def true_state(
    result: Mapping[str, Any], job: Job | None, *, is_held: bool, is_launched: bool
) -> tuple[str, str | None]:
    """The state of a run, and its error in words.

    What a run wrote at its end is true. Before that only the lock of its folder tells whether it
    is alive; the journal knows how a process ended that could write nothing.

    Args:
        result: content of `result.json`; empty where there is none; that it is unreadable, and why.
        job: what the journal of its sweep says last; None where no journal knows the run.
        is_held: whether a process holds the run's folder.
        is_launched: whether a launcher runs the sweep, which may be starting the job.
    """
    said = result.get("status")
    if said == UNREADABLE:
        return UNREADABLE, result["error"]
    if said in DONE:
        return said, None
    if is_held:
        return "running", None
    if said == "queued":
        return "queued", "its job of SLURM waits, as far as is known here"
    queued = f"; attempt {job.attempt + 1} is queued" if job and job.state == "queued" else ""
    if said == "failed":
        return "failed", f"{result.get('error', 'no error was noted')}{queued}"
    if said == "interrupted" and not (job and job.state == "cancelled"):
        return "interrupted", queued.lstrip("; ") or None
    if job is None:
        return "interrupted", KILLED
    if job.state in ENDED:
        return job.state, job.error
    if job.state in DONE:
        return "missing", f"the journal says {job.state}, but there is no result"
    if job.state == "running":
        return ("running", None) if is_launched else ("interrupted", KILLED)
    if said is not None:
        return "interrupted", f"{KILLED}{queued}"
    return "queued", None if is_launched else "no launcher runs the sweep"

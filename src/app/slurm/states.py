"""What SLURM says of jobs, in the words of a run's states. Needs no torch."""

import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

from app.run.states import ENDED, SLURM_JOB, UNREADABLE

WAITS = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "SUSPENDED",
         "CONFIGURING", "PREEMPTED", "RESIZING")  # fmt: skip
UNKNOWN = "UNKNOWN"
"""Of a job that SLURM's accounting does not know: yet, or any more."""

GONE = "GONE"
"""Of a job that a cluster without accounting has forgotten."""

NEW_S = 120.0
"""How long accounting may take to know of a new job. Without it, no job that has begun is forgotten
so soon: `MinJobAge` of slurm.conf is 300 s."""

RUNS = ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "STOPPED")


def state_of(result: Mapping[str, Any], said: str | None) -> tuple[str, str | None]:
    """The state of a run and its error in words.

    Args:
        result: content of result.json.
        said: the state of its job, in SLURM's word; None where SLURM does not answer.
    """
    status = str(result.get("status", "queued"))
    error = result.get("error")
    if status in ENDED:
        return status, None
    if said in WAITS:
        return "queued", None
    if said in RUNS:
        return "running", None
    if status in ("failed", UNREADABLE):
        return status, error
    is_new = time.time() - result.get("submitted_at", 0.0) < NEW_S
    if said == "CANCELLED" or (said == GONE and is_new and status == "queued"):
        return "cancelled", f"job {result.get(SLURM_JOB)} was cancelled"
    if said in (UNKNOWN, GONE):
        if status in ("queued", "running") and not (said == UNKNOWN and is_new):
            return "interrupted", f"SLURM knows nothing of job {result.get(SLURM_JOB)} any more"
        return status, error
    if said == "COMPLETED":
        return "interrupted", f"job {result.get(SLURM_JOB)} ended without a result"
    if said is not None:
        return "failed", f"job {result.get(SLURM_JOB)} ended as {said}"
    return status, error


def states(jobs: Sequence[str]) -> dict[str, str]:
    """What SLURM says of each job, UNKNOWN or GONE of some; empty where it does not answer."""
    if not jobs:
        return {}
    from submitit.slurm.slurm import SlurmInfoWatcher

    arrays = sorted({job.partition("_")[0] for job in jobs})
    asked = [word for array in arrays for word in ("-j", array)]
    missing = UNKNOWN
    text = _answer("sacct", "-o", "JobID,State,NodeList", "--parsable2", *asked)
    if text is None:  # no accounting
        missing = GONE
        lines = _answer("squeue", "--states=all", "-h", "-r", "-o", "%i|%T|%N")
        text = None if lines is None else f"JobID|State|NodeList\n{lines}"
    if text is None:
        return {}
    found = SlurmInfoWatcher().read_info(text)
    said = {job: found[job]["State"].split()[0].rstrip("+") for job in jobs if job in found}
    return {job: said.get(job, missing) for job in jobs}


def _answer(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout

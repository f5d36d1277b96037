"""The one place that knows what has become of a run, also what SLURM says of it. Needs no torch."""

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from app.errors import Unreadable
from app.record.folder import RunFolder, result_in
from app.record.states import SLURM_JOB, State

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


KILLED = "ended without a word: killed"


class Noted(Protocol):
    """What the journal of a sweep says last of a run."""

    state: State
    attempt: int
    error: str | None


@dataclass(frozen=True, kw_only=True)
class Signs:
    """What there is to see of a run.

    Attributes:
        result: content of `result.json`; empty where there is none; that it is unreadable, and why.
        job: what the journal of its sweep says last; None where no journal knows the run.
        is_held: whether a process holds the run's folder.
        is_launched: whether a launcher runs the sweep, which may be starting the job.
        is_search: whether a finder has left its answer, and no fit was wanted.
    """

    result: Mapping[str, Any]
    job: Noted | None = None
    is_held: bool = False
    is_launched: bool = False
    is_search: bool = False


def signs_of(folder: Path, job: Noted | None = None, *, is_launched: bool = False) -> Signs:
    """What there is to see in the folder of a run."""
    result, is_held = result_in(folder), False
    with suppress(Unreadable):  # whoever trains in it says so
        is_held = not is_done(result) and RunFolder(folder).is_held()
    return Signs(
        result=result,
        job=job,
        is_held=is_held,
        is_launched=is_launched,
        is_search=has_searched(folder),
    )


def has_searched(folder: Path) -> bool:
    """Whether a finder has left its answer, and no fit began."""
    return os.path.lexists(folder / "tuned.yaml") and not os.path.lexists(folder / "config.yaml")


def is_done(result: Mapping[str, Any]) -> bool:
    """Whether the run of a `result.json` came to its end."""
    return "status" in result and State(result["status"]).is_done


def true_state(signs: Signs, said: str | None = None) -> tuple[State, str | None]:
    """The state of a run, where what there is to see contradicts itself; its error in words.

    What a run wrote at its end is true. Before that SLURM knows best, and where it does not know
    the run only the lock of its folder tells whether it is alive; the journal knows how a process
    ended that could write nothing.

    Args:
        said: the state of its job in SLURM's word; None where it is none of SLURM's, or SLURM does
            not answer.
    """
    result, job = signs.result, signs.job
    status = State(result["status"]) if "status" in result else None
    if status is not None and status.is_done:
        return status, None
    if said is not None:
        return _by_slurm(result, said)
    if signs.is_held:
        return State.running, None
    if job and job.state == State.cancelled:
        return job.state, job.error or result.get("error")
    if status == State.unreadable:
        return status, result["error"]
    if status == State.queued:
        return status, "its job of SLURM waits, as far as is known here"
    queued = f"; attempt {job.attempt + 1} is queued" if job and job.state == State.queued else ""
    if status == State.failed:
        return status, f"{result.get('error', 'no error was noted')}{queued}"
    if status == State.interrupted:
        return status, queued.lstrip("; ") or None
    if SLURM_JOB in result:
        return State.running, None
    if job is None:
        return State.interrupted, KILLED
    if job.state.is_lost:
        return job.state, job.error
    if job.state.is_done and not signs.is_search:
        return State.missing, f"the journal says {job.state}, but there is no result"
    if job.state.is_done or (job.state == State.running and signs.is_launched):
        return job.state, None
    if status is not None or job.state == State.running:
        return State.interrupted, f"{KILLED}{queued}"
    return State.queued, None if signs.is_launched else "no launcher runs the sweep"


def true_states(found: Sequence[Signs]) -> list[tuple[State, str | None]]:
    """The states of runs and their errors; SLURM is asked once."""
    ids = [None if is_done(signs.result) else signs.result.get(SLURM_JOB) for signs in found]
    said = states([id_ for id_ in ids if id_ is not None])
    return [true_state(signs, said.get(id_ or "")) for signs, id_ in zip(found, ids, strict=True)]


def _by_slurm(result: Mapping[str, Any], said: str) -> tuple[State, str | None]:
    """The state of a run that is not done, and its error in words.

    Args:
        result: content of result.json.
        said: the state of its job, in SLURM's word.
    """
    status, error = State(result.get("status", State.queued)), result.get("error")
    job = f"job {result.get(SLURM_JOB)}"
    if said in WAITS:
        return State.queued, None
    if said in RUNS:
        return State.running, None
    if status in (State.failed, State.unreadable):
        return status, error
    is_new = time.time() - result.get("submitted_at", 0.0) < NEW_S
    if said == "CANCELLED" or (said == GONE and is_new and status == State.queued):
        return State.cancelled, f"{job} was cancelled"
    if said in (UNKNOWN, GONE):
        if status.is_under_way and not (said == UNKNOWN and is_new):
            return State.interrupted, f"SLURM knows nothing of {job} any more"
        return status, error
    if said == "COMPLETED":
        return State.interrupted, f"{job} ended without a result"
    return State.failed, f"{job} ended as {said}"


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

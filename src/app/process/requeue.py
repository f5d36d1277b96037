"""What becomes of a run that was asked to stop: SLURM runs its job again, or the user is told how.

Needs no torch.
"""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from app.errors import Refused, ended_from_outside
from app.process.asked import asked
from app.process.ranks import Ranks, ranks

RESTARTS = "SLURM_RESTART_COUNT"

COME_WITHIN_S = 5.0
"""How much later than the others a rank may leave: less than SLURM's KillWait, 30 s by default."""

ENDED_WITHIN_S = 60.0
"""How soon SLURM ends the processes of a job that it will run again."""


@contextmanager
def heeding(name: str, *, max_requeues: int | None) -> Iterator[None]:
    """Listen to signals that ask to stop; where one ends the block, settle what becomes of the run.

    Args:
        name: of the run, with which a user goes on.
        max_requeues: how often SLURM may run its job again; None: as often as it asks.

    Raises SystemExit then: 128 and the signal.
    """
    with asked.listening():
        try:
            yield
        except (KeyboardInterrupt, SystemExit, RuntimeError) as stop:
            if asked.first is None:
                raise
            requeued_or_told(name, max_requeues=max_requeues)
            raise SystemExit(asked.exit_code) from stop


def requeued_or_told(name: str, *, max_requeues: int | None) -> None:
    """Let SLURM run this process's job again, or tell how to go on: once. All ranks call it.

    Comes back, where the job runs again, when SLURM ends its processes.

    Raises:
        Refused: where the job has run as often as `launch.max_requeues` allows.
        RankFailed: where a rank was ended from outside, because of which the others were asked.
    """
    number = asked.first
    if number is None or asked.is_heeded:
        return
    asked.is_heeded = True
    everyone = ranks()
    job = slurm_job()
    # Ctrl-C is somebody who is there
    if (
        job is not None
        and number != signal.SIGINT
        and _ran_again(job, number, max_requeues, everyone)
    ):
        return
    if everyone.is_first:
        ends = "" if job is None else f"; SLURM ends job {job} ({number.name})"
        print(f"\ninterrupted{ends}; to go on type the same with name={name}", flush=True)


def _ran_again(job: str, number: signal.Signals, limit: int | None, everyone: Ranks) -> bool:
    """Whether SLURM runs the job again; comes back, then, when it ends this process."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    everyone.come()

    def requeued() -> bool:
        # where a rank fails, its launcher asks the others to stop: no reason to run it again
        if number == signal.SIGTERM and asked.is_fitting:  # else one may wait for this one
            absent = everyone.absent(COME_WITHIN_S)
            if absent:
                raise ended_from_outside(absent[0])
        return not everyone.has_failed() and _requeued(job, number, limit)

    is_requeued = everyone.one(requeued, patience_s=COME_WITHIN_S)
    if is_requeued:
        signal.sigtimedwait({signal.SIGTERM}, ENDED_WITHIN_S)  # an earlier end would be the job's
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return is_requeued


def slurm_job() -> str | None:
    """The job of SLURM that this process is part of, as SLURM's commands name it; None where it is
    of none. The number of an array's last job is also that of the whole array."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    if array is not None:
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def _requeued(job: str, number: signal.Signals, limit: int | None) -> bool:
    """Whether SLURM runs the job again because it was asked."""
    if job_state(job) not in ("RUNNING", "SIGNALING"):
        # SLURM ends it: cancelled, out of time, or requeued by somebody
        return False
    restarts = int(os.environ.get(RESTARTS, "0"))
    if limit is not None and restarts >= limit:
        raise Refused(
            f"launch.max_requeues={limit}: the job has been requeued as often, and was asked to "
            f"stop again ({number.name}); to go on from its last checkpoint type the same command "
            f"with launch.max_requeues={2 * max(1, limit)}"
        )
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode != 0:
        print(f"\nSLURM does not run job {job} again: {done.stderr.strip()}", flush=True)
        return False
    print(f"\n{number.name}: saved, and job {job} is requeued", flush=True)
    return True


def job_state(job: str) -> str:
    """What SLURM says of a job, such as RUNNING; UNKNOWN where it does not answer."""
    command = ["scontrol", "show", "job", "-o", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "UNKNOWN"
    fields = dict(word.partition("=")[::2] for word in done.stdout.split())
    return fields.get("JobState", "UNKNOWN")

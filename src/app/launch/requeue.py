"""What becomes of a run that was asked to stop: SLURM runs its job again, or the user is told how.

Needs no torch.
"""

import os
import signal
import subprocess
import time

from omegaconf import DictConfig

from app.cli import Refused
from app.launch import is_slurm
from app.launch.ranks import ranks

JOB = "SLURM_JOB_ID"
RESTARTS = "SLURM_RESTART_COUNT"

ENDED_WITHIN_S = 60.0
"""How soon SLURM ends the processes of a job that it will run again."""


def requeued_or_told(number: signal.Signals, cfg: DictConfig) -> None:
    """Let SLURM run this process's job again, or tell how to go on. All ranks call it.

    Does not come back where the job runs again: SLURM ends its processes.

    Raises Refused where the job has run as often as `launch.max_requeues` allows.
    """
    everyone = ranks()
    is_requeued = False
    if JOB in os.environ and number != signal.SIGINT:
        limit = cfg.launch.max_requeues if is_slurm(cfg.launch) else None
        is_requeued = everyone.first(lambda: _requeued(number, limit))
    if is_requeued:
        time.sleep(ENDED_WITHIN_S)  # an exit code would be that of the job
    elif everyone.is_first:
        print(f"\ninterrupted; to go on type the same with name={cfg.name}", flush=True)


def _requeued(number: signal.Signals, limit: int | None) -> bool:
    """Whether SLURM runs the job again, by itself or because it was asked."""
    job = os.environ[JOB]
    state = job_state(job)
    if state == "PENDING" or state.startswith("REQUEUE"):
        print(f"\n{number.name}: saved; SLURM runs job {job} again", flush=True)
        return True
    if state != "RUNNING":
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

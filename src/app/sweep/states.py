"""What has become of the jobs of a sweep. Needs no torch."""

from collections.abc import Iterable
from pathlib import Path

from app.run.folder import result_in
from app.run.states import ENDED, SLURM_JOB, UNREADABLE
from app.slurm.states import state_of, states
from app.sweep.journal import Job


def refresh(top: Path, jobs: Iterable[Job]) -> None:
    """Let jobs of a sweep that SLURM runs, or whose results are lost, have the state of now."""
    results = [(job, result_in(top / (job.folder or str(job.job)))) for job in jobs]
    alive = [result for _, result in results if result.get("status") not in ENDED]
    said = states([result[SLURM_JOB] for result in alive if SLURM_JOB in result])
    for job, result in results:
        is_lost = result.get("status") == UNREADABLE and job.state != "cancelled"
        if SLURM_JOB in result or is_lost:
            job.state, job.error = state_of(result, said.get(result.get(SLURM_JOB, "")))

"""Looks after a sweep that was started with `launch=local` or `launch=slurm`.

status   what became of each job
resume   runs the jobs that are not finished, each from its last checkpoint
retry    runs those that failed or were cancelled, and no others; not of a study
cancel   ends the launcher, if it runs, and drops the jobs that wait
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from app.cli import Parser
from app.errors import Refused
from app.process.files import why
from app.record.folder import result_in
from app.record.states import SLURM_JOB, State
from app.record.trials import STORAGE
from app.sweep.folder import SweepFolder, job_event, quoted
from app.sweep.journal import NAME, Job, Sweep
from app.sweep.progress import counts, plain, table


def main(arguments: list[str]) -> None:
    """What was typed after `python -m app.sweep`."""
    parser = Parser(
        prog="python -m app.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("folder", type=Path, metavar="DIR", help="of the sweep")
    try:
        typed = parser.parse_args(arguments)
        folder = SweepFolder(typed.folder)
        sweep = _sweep_in(folder)
        ACTIONS[typed.action](folder, sweep)
    except Refused as refusal:
        print(f"sweep: {refusal}", file=sys.stderr)
        sys.exit(2)
    if sweep.note:  # the launcher that an action becomes says it itself
        print(plain(sweep.note), file=sys.stderr)


def _sweep_in(folder: SweepFolder) -> Sweep:
    if not os.path.lexists(folder.journal.path):
        raise Refused(
            f"DIR must be the folder of a sweep, got {folder.path}: it has no {NAME}, which "
            "launch=local and launch=slurm write; type multirun/DATE/TIME"
        )
    sweep = folder.journal.required()
    folder.refresh(sweep.jobs.values(), is_launched=folder.holder() is not None)
    return sweep


def status(folder: SweepFolder, sweep: Sweep) -> None:
    """Print what became of each job."""
    holder = folder.holder()
    by = f"run by process {holder['pid']} on {holder['host']}" if holder else "not running"
    print(plain(shlex.join(sweep.command)))
    print(f"{_summary(folder, sweep)}; {by}\n\n{table(sweep.jobs.values())}")


def resume(folder: SweepFolder, sweep: Sweep) -> None:
    """Run what is not finished, as the command that was typed would.

    Also what has finished according to the journal, but has left no result that can be read, and
    what has finished without the launcher, which has not told its value yet.
    """
    if folder.holder() is not None:
        raise Refused(folder.held_message())
    if not (sweep.unfinished() or folder.journal.required().unfinished()):
        print(f"{_summary(folder, sweep)}; nothing to resume")
        return
    if not _is_study(folder):  # which has been told what the trial came to
        _queue(folder, [job for job in sweep.jobs.values() if job.state == State.unreadable])
    _run_again(folder, sweep)


def retry(folder: SweepFolder, sweep: Sweep) -> None:
    """Run those that failed or were cancelled, or left no result that can be read."""
    if folder.holder() is not None:
        raise Refused(folder.held_message())
    if _is_study(folder):
        raise Refused(
            f"{folder.path} is a study, which has learned that its trials failed; type its command "
            "with a larger sweep.num_trials for others, or that of python -m app.report for one"
        )
    lost = [job for job in sweep.jobs.values() if job.state.is_to_retry]
    if not lost:
        print(f"{_summary(folder, sweep)}; nothing to retry")
        return
    _queue(folder, lost)
    _run_again(folder, sweep, f"launch.jobs=[{','.join(str(job.job) for job in lost)}]")


def cancel(folder: SweepFolder, sweep: Sweep) -> None:
    """End the launcher, and drop the jobs that have not ended."""
    folder.end_launcher()
    if not folder.hold():
        raise Refused(folder.held_message())
    jobs = list(folder.journal.required().jobs.values())
    is_open = {job.job: job.state.is_to_drop for job in jobs}
    waits = {job.job: job.state == State.queued for job in jobs}
    folder.refresh(jobs)
    lost = [job for job in jobs if job.state == State.unreadable and is_open[job.job]]
    for job in lost:
        print(plain(f"{job.error}; if SLURM runs job {job.job} of the sweep, type scancel NUMBER"))
    dropped = [
        job
        for job in jobs
        if job.state.is_to_drop or (job.state == State.failed and waits[job.job])
    ]
    results = [result_in(folder.path / job.place) for job in dropped]
    ids = [result[SLURM_JOB] for result in results if SLURM_JOB in result]
    if ids and shutil.which("scancel") is None:
        raise Refused(
            f"{folder.path} has jobs of SLURM, and there is no scancel here; type the same where "
            "they were submitted"
        )
    if ids:
        subprocess.run(["scancel", *ids], check=False)
    for job in (*dropped, *lost):
        job.state = State.cancelled
    folder.journal.write(job_event(job, "state") for job in (*dropped, *lost))
    print(_summary(folder, _sweep_in(folder)))


ACTIONS = {"status": status, "resume": resume, "retry": retry, "cancel": cancel}


def _summary(folder: SweepFolder, sweep: Sweep) -> str:
    return f"{plain(str(folder.path))}: {counts(list(sweep.jobs.values()))}"


def _is_study(folder: SweepFolder) -> bool:
    return os.path.lexists(folder.path / STORAGE)


def _queue(folder: SweepFolder, jobs: Sequence[Job]) -> None:
    """Let the journal say that jobs are to run, and the user why where it is not plain."""
    for job in jobs:
        if job.state == State.unreadable:
            print(plain(f"{job.error}; job {job.job} is run again"))
        job.state = State.queued
    folder.journal.write(job_event(job, "state") for job in jobs)


def _run_again(folder: SweepFolder, sweep: Sweep, *more: str) -> None:
    """Become the command that was typed, where it was typed."""
    own = ("resume", "hydra.sweep.dir", "launch.jobs")
    words = [word for word in sweep.command[1:] if word.partition("=")[0] not in own]
    inside = folder.path.absolute().is_relative_to(sweep.cwd)
    path = folder.path.absolute().relative_to(sweep.cwd) if inside else folder.path.absolute()
    words += [f"hydra.sweep.dir={quoted(str(path))}", *more]
    try:
        os.chdir(sweep.cwd)
    except OSError as error:
        raise Refused(
            f"the sweep was started in {sweep.cwd}, which cannot be entered: {why(error)}; type "
            "its command in the folder that it is in now"
        ) from None
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *words])


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # where it is not UTF-8
    main(sys.argv[1:])

"""Looks after a sweep that was started with `launch=local` or `launch=slurm`.

status   what became of each job
resume   runs the jobs that are not finished, each from its last checkpoint
retry    runs those that failed or were cancelled, and no others; not of a study
cancel   ends the launcher, if it runs, and drops the jobs that wait
"""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

from app.errors import Refused
from app.folder import RunFolder
from app.launch.slurm_states import SLURM_JOB, refresh
from app.study import STORAGE
from app.sweep.folder import SweepFolder, job_event, quoted
from app.sweep.journal import NAME, Sweep
from app.sweep.progress import counts, table


def main(arguments: list[str]) -> None:
    """What was typed after `python -m app.sweep`."""
    parser = argparse.ArgumentParser(
        prog="python -m app.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("folder", type=Path, metavar="DIR", help="of the sweep")
    typed = parser.parse_args(arguments)
    try:
        folder = SweepFolder(typed.folder)
        ACTIONS[typed.action](folder, _sweep_in(folder))
    except Refused as refusal:
        print(f"sweep: {refusal}", file=sys.stderr)
        sys.exit(2)


def _sweep_in(folder: SweepFolder) -> Sweep:
    sweep = folder.journal.read()
    if sweep is None:
        raise Refused(
            f"DIR must be the folder of a sweep, got {folder.path}: it has no {NAME}, which "
            "launch=local and launch=slurm write; type multirun/DATE/TIME"
        )
    if folder.holder() is None:
        for job in sweep.jobs.values():
            if job.state == "running":  # and was killed with its launcher
                job.state = "interrupted"
    refresh(folder.path, sweep.jobs.values())
    return sweep


def status(folder: SweepFolder, sweep: Sweep) -> None:
    """Print what became of each job."""
    holder = folder.holder()
    by = f"run by process {holder['pid']} on {holder['host']}" if holder else "not running"
    jobs = list(sweep.jobs.values())
    print(f"{shlex.join(sweep.command)}\n{folder.path}: {counts(jobs)}; {by}\n\n{table(jobs)}")


def resume(folder: SweepFolder, sweep: Sweep) -> None:
    """Run what is not finished, as the command that was typed would."""
    if folder.holder() is not None:
        raise Refused(folder.held_message())
    if not sweep.unfinished():
        print(f"{folder.path}: {counts(list(sweep.jobs.values()))}; nothing to resume")
        return
    _run_again(folder, sweep)


def retry(folder: SweepFolder, sweep: Sweep) -> None:
    """Run those that failed or were cancelled."""
    if folder.holder() is not None:
        raise Refused(folder.held_message())
    if (folder.path / STORAGE).exists():
        raise Refused(
            f"{folder.path} is a study, which has learned that its trials failed; type its command "
            "with a larger sweep.num_trials for others, or that of python -m app.report for one"
        )
    lost = [job for job in sweep.jobs.values() if job.state in ("failed", "cancelled")]
    if not lost:
        print(f"{folder.path}: {counts(list(sweep.jobs.values()))}; nothing to retry")
        return
    for job in lost:
        job.state = "queued"
    folder.journal.write(job_event(job, "state") for job in lost)
    _run_again(folder, sweep, f"launch.jobs=[{','.join(str(job.job) for job in lost)}]")


def cancel(folder: SweepFolder, sweep: Sweep) -> None:
    """End the launcher, and drop the jobs that have not ended."""
    folder.end_launcher()
    if not folder.hold():
        raise Refused(folder.held_message())
    dropped = [job for job in _sweep_in(folder).jobs.values() if job.state in DROPPED]
    results = [
        RunFolder(folder.path / (job.folder or str(job.job))).read_result() or {} for job in dropped
    ]
    ids = [result[SLURM_JOB] for result in results if SLURM_JOB in result]
    if ids:
        subprocess.run(["scancel", *ids], check=False)
    for job in dropped:
        job.state = "cancelled"
    folder.journal.write(job_event(job, "state") for job in dropped)
    print(f"{folder.path}: {counts(list(_sweep_in(folder).jobs.values()))}")


DROPPED = ("queued", "running", "interrupted")
ACTIONS = {"status": status, "resume": resume, "retry": retry, "cancel": cancel}


def _run_again(folder: SweepFolder, sweep: Sweep, *more: str) -> None:
    """Become the command that was typed, where it was typed."""
    own = ("resume", "hydra.sweep.dir", "launch.jobs")
    words = [word for word in sweep.command[1:] if word.partition("=")[0] not in own]
    inside = folder.path.absolute().is_relative_to(sweep.cwd)
    path = folder.path.absolute().relative_to(sweep.cwd) if inside else folder.path.absolute()
    words += [f"hydra.sweep.dir={quoted(str(path))}", *more]
    os.chdir(sweep.cwd)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *words])


if __name__ == "__main__":
    main(sys.argv[1:])

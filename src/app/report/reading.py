"""The runs in a folder: a run, a sweep, or a folder of either."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from app.errors import Refused
from app.folder import ENDED, RunFolder
from app.launch.slurm_states import SLURM_JOB, state_of, states
from app.report.states import true_state
from app.sweep.folder import SweepFolder
from app.sweep.journal import NAME as JOURNAL
from app.sweep.journal import Job

NOT_RUNS = ("checkpoints", "tensorboard")
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(kw_only=True)
class Run:
    """One run as it lies in its folder.

    Attributes:
        state: finished, pruned, running, failed, interrupted, cancelled, queued, or missing:
            finished or pruned according to the journal, but not there.
        config: as it was written, `${run_dir}` unresolved; None where the run did not come so far.
        typed: the overrides of its command.
        tuned: what a finder of this run found, by key.
        result: content of `result.json`.
        config_dirs: `--config-dir` of the sweep it is of.
        config_name: `--config-name` of that sweep; None where it is of none.
    """

    folder: Path
    state: str
    error: str | None
    config: dict[str, Any] | None
    typed: list[str]
    tuned: dict[str, Any]
    result: Mapping[str, Any]
    job: Job | None
    config_dirs: list[str]
    config_name: str | None = None

    @property
    def seed(self) -> int | None:
        """The seed; None where it is not known."""
        return None if self.config is None else self.config.get("seed")

    @property
    def seconds(self) -> float | None:
        """Of all phases of the last command; None where none was measured."""
        phases = self.result.get("seconds")
        return sum(phases.values()) if phases else None


@dataclass
class Found:
    """The runs of a folder, and what should be said about how they were read."""

    runs: list[Run] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_runs(top: Path) -> Found:
    """Every run in a folder, in the order of the folders' names, `10` after `9`.

    Raises Refused where there is none.
    """
    if not top.is_dir():
        what = "is a file" if top.exists() else "does not exist"
        raise Refused(
            f"DIR must be the folder of a run, of a sweep or of several, got {top}, which {what}; "
            "type python -m app.report runs/NAME or multirun/DATE/TIME"
        )
    reader = _Reader()
    reader.visit(top, reader.sweep_at(top.parent) if _is_run(top) else None)
    reader.ask_slurm()
    if not reader.runs:
        raise Refused(
            f"DIR must be the folder of a run, of a sweep or of several, got {top}: neither it nor "
            f"a folder in it holds a config.yaml, a result.json or a {JOURNAL}; "
            "type python -m app.report runs/NAME or multirun/DATE/TIME"
        )
    runs = sorted(reader.runs.values(), key=lambda run: natural(run.folder))
    return Found(runs, reader.notes)


@dataclass
class _Sweep:
    """A folder with a journal or with Hydra's `multirun.yaml`.

    Attributes:
        config_dirs, config_name: what it was started with, which its jobs do not note.
        is_launched: whether a launcher runs it now.
    """

    jobs: dict[Path, Job]
    config_dirs: list[str]
    config_name: str | None
    is_launched: bool


class _Reader:
    def __init__(self) -> None:
        self.runs: dict[Path, Run] = {}
        self.notes: list[str] = []

    def visit(self, folder: Path, sweep: _Sweep | None) -> None:
        """Read the run that a folder is, or all that are in it."""
        if _is_run(folder):
            self._read(folder, sweep)
            return
        here = self.sweep_at(folder)
        sweep = here or sweep
        for path in folder.iterdir():
            if path.name[0] == "." or path.name in NOT_RUNS or path.is_symlink():
                continue
            if not path.is_dir():
                continue
            num_before = len(self.runs)
            self.visit(path, sweep)
            was_begun = RunFolder(path).lock_path.exists() and not (path / "tuned.yaml").exists()
            if was_begun and len(self.runs) == num_before:
                self._read(path, sweep)
        for path in here.jobs if here else ():
            if path not in self.runs:
                self._read(path, here)

    def ask_slurm(self) -> None:
        """Let the runs that are in SLURM's hands have the states that they have there."""
        jobs = {
            path: run.result[SLURM_JOB]
            for path, run in self.runs.items()
            if SLURM_JOB in run.result and run.state not in ENDED
        }
        said = states(list(jobs.values()))
        for path, job in jobs.items():
            if job in said:
                run = self.runs[path]
                run.state, run.error = state_of(run.result, said[job])

    def sweep_at(self, folder: Path) -> _Sweep | None:
        """The sweep whose folder this is; None where it is none's."""
        if (folder / JOURNAL).exists():
            sweep = SweepFolder(folder)
            try:
                noted = sweep.journal.read()
            except (KeyError, ValueError) as error:
                self._leave_out(folder / JOURNAL, error)
                noted = None
            if noted is not None:
                jobs = {folder / (job.folder or str(job.job)): job for job in noted.jobs.values()}
                dirs, name = (noted.definition[key] for key in ("config_dirs", "config"))
                return _Sweep(jobs, dirs, name, is_launched=sweep.holder() is not None)
        content = self._yaml(folder / "multirun.yaml")
        if content is None:
            return None
        hydra = content.get("hydra", {})
        sources = hydra.get("runtime", {}).get("config_sources") or ()
        dirs = [str(one["path"]) for one in sources if one["provider"] == "command-line"]
        name = hydra.get("job", {}).get("config_name")
        return _Sweep({}, dirs, name, is_launched=False)

    def _read(self, path: Path, sweep: _Sweep | None) -> None:
        folder = RunFolder(path)
        job = sweep.jobs.get(path) if sweep else None
        result = self._json(folder.result_path) or {}
        is_finished = result.get("status") == "finished"
        state, error = true_state(
            result,
            job,
            is_held=not is_finished and folder.is_held(),
            is_launched=sweep is not None and sweep.is_launched,
        )
        config = self._yaml(folder.config_path)
        typed = self._yaml(path / "overrides.yaml")
        searched = config is not None and config.get("tuner") is not None
        tuned = (self._yaml(path / "tuned.yaml") or {}) if searched else {}
        self.runs[path] = Run(
            folder=path,
            state=state,
            error=error,
            config=config,
            typed=[str(item) for item in typed or (job.overrides if job else ())],
            tuned=dict(tuned.get("overrides") or {}),
            result=result,
            job=job,
            config_dirs=sweep.config_dirs if sweep else [],
            config_name=sweep.config_name if sweep else None,
        )

    def _yaml(self, path: Path) -> Any:
        return self._content(path, lambda content: yaml.load(content, Loader=LOADER))

    def _json(self, path: Path) -> Any:
        return self._content(path, json.loads)

    def _content(self, path: Path, parse: Callable[[bytes], Any]) -> Any:
        """The content of a file; None where there is none, or none that can be read."""
        try:
            return parse(path.read_bytes())
        except FileNotFoundError:
            return None
        except (ValueError, yaml.YAMLError) as error:
            self._leave_out(path, error)
            return None

    def _leave_out(self, path: Path, error: Exception) -> None:
        words = " ".join(str(error).split())
        self.notes.append(f"{path} cannot be read and is left out: {words}")


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").exists() or (folder / "result.json").exists()


def natural(path: Path) -> list[tuple[int, int, str]]:
    """Sorts the numbers in a path as numbers."""
    parts = re.split(r"(\d+)", str(path))
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]

"""The runs in a folder: a run, a sweep, or a folder of either."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from app.errors import Refused, Unreadable
from app.process.files import is_locked, read_yaml, read_yaml_list, why
from app.record.folder import CONFIG, RunFolder, refuse_other_shape
from app.record.names import stage_of
from app.record.states import State
from app.slurm.states import Signs, has_searched, true_states
from app.sweep.folder import SweepFolder, alone
from app.sweep.journal import Job
from app.sweep.progress import plain

NOT_RUNS = ("checkpoints", "tensorboard")
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(kw_only=True)
class StoredRun:
    """One run as it lies in its folder.

    Attributes:
        config: as it was written, `${run_dir}` unresolved; None where the run did not come so far.
        typed: the overrides of its command; None where they cannot be read.
        tuned: what a finder of this run found, by key.
        result: content of `result.json`.
        flags: what its command needs of the sweep that it is of.
    """

    folder: Path
    config: dict[str, Any] | None
    typed: list[str] | None
    tuned: dict[str, Any]
    result: Mapping[str, Any]
    job: Job | None
    flags: list[str]
    state: State = State.queued  # until all are settled
    error: str | None = None

    @property
    def seed(self) -> int | None:
        """The seed; None where it is not known."""
        return (self.config or {}).get("seed")

    @property
    def has_tuner(self) -> bool:
        """Whether finders of its own act before it."""
        return (self.config or {}).get("tuner") is not None

    @property
    def metrics(self) -> Mapping[str, Any]:
        """What was measured, by name: validations at the checkpoint that is delivered."""
        return self.result.get("metrics") or {}

    def is_of_test(self, name: str) -> bool:
        """Whether a metric was measured on test data, as the run says, else as its name does."""
        where = (self.result.get("metrics_of") or {}).get(name)
        said = where.get("on") if isinstance(where, Mapping) else None
        return stage_of(name) == "test" if said is None else said == "test"

    @property
    def seconds(self) -> float | None:
        """Of all phases of the last command; None where none was measured."""
        phases = self.result.get("seconds")
        return sum(phases.values()) if phases else None


@dataclass
class StoredRuns:
    """The runs of a folder, and what should be said about how they were read."""

    runs: list[StoredRun]
    notes: list[str]


def read_runs(top: Path) -> StoredRuns:
    """Every run in a folder, in the order of the folders' names, `10` after `9`.

    Raises Refused where there is none.
    """
    reader = _Reader()
    if not os.path.isdir(top):
        why_not = f", which {'is a file' if os.path.lexists(top) else 'does not exist'}"
    else:
        why_not = (
            ": neither it nor a folder in it holds a config.yaml, a result.json or a journal.jsonl"
        )
        reader.visit(top, reader.sweep_at(top.parent) if _is_run(top) else None)
    if not reader.runs and reader.notes:
        raise Refused(f"no run could be read: {'; '.join(sorted(reader.notes))}")
    if not reader.runs:
        raise Refused(
            f"DIR must be the folder of a run, of a sweep or of several, got {top}{why_not}; "
            "type python -m app.report runs/NAME or multirun/DATE/TIME"
        )
    reader.settle()
    runs = sorted(reader.runs.values(), key=lambda run: natural(run.folder))
    return StoredRuns(runs, sorted(reader.notes))


@dataclass
class _Around:
    """The sweep that runs are of: a folder with a journal or with Hydra's `multirun.yaml`.

    Attributes:
        flags: what it was started with, which its jobs do not note.
        is_launched: whether a launcher runs it now.
    """

    jobs: dict[Path, Job] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    is_launched: bool = False


class _Reader:
    def __init__(self) -> None:
        self.runs: dict[Path, StoredRun] = {}
        self.notes: list[str] = []
        self._signs: dict[Path, Signs] = {}

    def visit(self, top: Path, sweep: _Around | None) -> None:
        """Read the run that a folder is, or all that are in it."""
        left, begun = [(top, sweep or _Around())], dict[Path, _Around]()
        while left:
            folder, sweep = left.pop()
            if _is_run(folder):
                self._read(folder, sweep)
                continue
            here = self.sweep_at(folder)
            sweep = here or sweep
            for path in tried(self.notes, _folders_in, folder) or ():
                left.append((path, sweep))
                lock = RunFolder(path).lock_path
                if os.path.lexists(lock) and not os.path.lexists(path / "tuned.yaml"):
                    begun[path] = sweep
            if here:
                begun |= dict.fromkeys(here.jobs, here)
        above = {path for run in (*self.runs, *begun) for path in run.parents}
        for path in sorted(begun.keys() - self.runs.keys() - above):
            self._read(path, begun[path])

    def settle(self) -> None:
        """Give the runs their states."""
        states = true_states(list(self._signs.values()))
        for path, (state, error) in zip(self._signs, states, strict=True):
            self.runs[path].state, self.runs[path].error = state, error

    def sweep_at(self, folder: Path) -> _Around | None:
        """The sweep whose folder this is; None where it is none's."""
        found = SweepFolder(folder)
        if os.path.lexists(found.journal.path):
            noted = tried(self.notes, found.journal.required)
            if noted is not None:
                self.notes += [noted.note] if noted.note else []
                jobs = {folder / job.place: job for job in noted.jobs.values()}
                flags = alone(noted.definition["config"], noted.definition["config_dirs"])
                is_launched = tried(self.notes, found.holder) is not None
                return _Around(jobs, flags, is_launched=is_launched)
        return tried(self.notes, _hydras_sweep, folder / "multirun.yaml")

    def _read(self, path: Path, sweep: _Around) -> None:
        folder, job = RunFolder(path), sweep.jobs.get(path)
        torn: list[str] = []
        config = tried(torn, _config, folder)
        result = tried(torn, folder.read_result) or {}
        if torn:
            result = {**result, "status": State.unreadable, "error": "; ".join(torn)}
        is_over = result.get("status") in (State.finished, State.unreadable)
        is_held = not is_over and tried(self.notes, is_locked, folder.lock_path)
        self._signs[path] = Signs(
            result=result, job=job, is_held=bool(is_held), is_launched=sweep.is_launched,
            is_search=has_searched(path),
        )  # fmt: skip
        untold: list[str] = []
        typed = tried(untold, read_yaml_list, path / "overrides.yaml")
        if typed is None and (job or not untold):
            typed = job.overrides if job else []
        self.notes += untold
        self.runs[path] = run = StoredRun(
            folder=path, config=config, typed=typed, tuned={}, result=result, job=job,
            flags=sweep.flags,
        )  # fmt: skip
        if run.has_tuner:
            run.tuned = tried(self.notes, _tuned, path / "tuned.yaml") or {}


def tried(told: list[str], read: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """What is read; None where it is unreadable, and then `told` has a line more."""
    try:
        return read(*args, **kwargs)
    except Unreadable as error:
        told.append(plain(str(error)))
        return None


def _config(folder: RunFolder) -> dict[str, Any] | None:
    """The configuration of a run as it was written."""
    config = read_yaml(folder.config_path)
    if config is not None:
        refuse_other_shape(folder.config_path, config, CONFIG)
    return config


def _tuned(path: Path) -> dict[str, Any]:
    """The overrides that a finder found; empty where it has not run."""
    content = read_yaml(path)
    overrides = {} if content is None else content.get("overrides")
    if not isinstance(overrides, dict):
        raise Unreadable(path, f"overrides holds {overrides!r:.60}")
    return {str(key): value for key, value in overrides.items()}


def _hydras_sweep(path: Path) -> _Around | None:
    """The sweep of which Hydra's multirun.yaml is; None where there is no such file."""
    content = read_yaml(path)
    if content is None:
        return None
    try:
        hydra = content["hydra"]
        sources = hydra["runtime"]["config_sources"]
        dirs = [str(one["path"]) for one in sources if one["provider"] == "command-line"]
        name = hydra.get("job", {}).get("config_name")
    except (AttributeError, KeyError, TypeError):
        raise Unreadable(path, "its hydra holds something else than Hydra writes") from None
    return _Around(flags=alone(None if name is None else str(name), dirs))


def _folders_in(folder: Path) -> list[Path]:
    """Those that may be of runs."""
    try:
        with os.scandir(folder) as entries:
            folders = [one.name for one in entries if one.is_dir(follow_symlinks=False)]
    except OSError as error:
        raise Unreadable(folder, why(error)) from None
    return [folder / name for name in folders if name[0] != "." and name not in NOT_RUNS]


def _is_run(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in ("config.yaml", "result.json"))


def natural(path: Path) -> list[tuple[int, int, str]]:
    """Sorts the numbers in a path as numbers."""
    parts = re.split(r"(\d+)", str(path))
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]

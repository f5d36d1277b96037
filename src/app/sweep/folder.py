"""The folder of a sweep: which sweep is in it, and which process runs it. Needs no torch.

journal.jsonl   what became of each job
multirun.yaml   the configuration that all jobs share, by Hydra
0/ 1/ ...       the folders of the jobs
"""

import fcntl
import hashlib
import json
import os
import re
import shlex
import signal
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from glob import glob
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, read_write

from app.errors import Refused, Unreadable
from app.process.files import is_locked, read_json, why
from app.slurm.states import signs_of, true_states
from app.sweep.journal import NAME, Job, Journal, Sweep
from app.sweep.progress import plain

OF_THE_COMMAND = ("launch", "resume", "hydra/launcher", "hydra.launcher", "hydra.sweep.dir",
                  "hydra.mode", "sweep.num_trials", "sweep.num_parallel")  # fmt: skip
"""Keys, and groups of keys, that may differ between two commands of the same sweep."""

TIME_STAMP = re.compile(r"\$\{now:[^}]*\}")

ASKING_S = 0.1
"""For much longer than `holder` takes to see whether a folder is held."""

PATIENCE_S = 60.0
"""For how long a launcher that was asked to stop may take."""

ELSEWHERE = "type another hydra.sweep.dir=, or resume=never to move the old one aside"


class SweepFolder:
    """The folder of one sweep."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal = Journal(path)
        self._lock_path = path / ".launcher.lock"
        self._lock: int | None = None

    def hold(self) -> bool:
        """Hold the folder to the end of this process; False where another one holds it.

        Raises Refused where there can be no such lock.
        """
        is_locked(self._lock_path)  # raises where it is no file
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise Refused(
                f"{self._lock_path} cannot be written: {why(error)}; type another hydra.sweep.dir="
            ) from None
        end = time.monotonic() + ASKING_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    os.close(lock)
                    return False
                time.sleep(ASKING_S / 10)
        os.ftruncate(lock, 0)
        os.write(lock, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        self._lock = lock
        return True

    def release(self) -> None:
        """Let others hold the folder."""
        assert self._lock is not None
        os.close(self._lock)
        self._lock = None

    def holder(self) -> dict[str, Any] | None:
        """`pid` and `host` of the launcher that runs the sweep; None where none does.

        Both are `?` where it does not say so. Raises Unreadable where that cannot be known.
        """
        if not is_locked(self._lock_path):
            return None
        try:
            said = read_json(self._lock_path) or {}
        except Unreadable:  # it was locked a moment ago, or the file is torn
            said = {}
        pid, host = said.get("pid"), said.get("host")
        is_whole = type(pid) is int and 0 < pid < 1 << 31
        is_whole = is_whole and isinstance(host, str) and host.isprintable()
        return {"pid": pid, "host": host} if is_whole else {"pid": "?", "host": "?"}

    def held_message(self) -> str:
        """Who holds the folder, and what to do."""
        holder = self.holder() or {"pid": "?", "host": "?"}
        return (
            f"{self.path} is being run by process {holder['pid']} on {holder['host']}; wait for "
            f"it, or type python -m app.sweep cancel {shlex.quote(str(self.path))}"
        )

    def end_launcher(self) -> None:
        """Ask the launcher that runs the sweep to stop, and wait until it has.

        Raises Refused where it runs on another machine, or does not stop.
        """
        holder = self.holder()
        if holder is None:
            return
        if holder["host"] != socket.gethostname():
            raise Refused(f"{self.held_message()} there")
        try:
            os.kill(holder["pid"], signal.SIGTERM)
        except OSError as error:
            if self.holder() is not None:  # and has not ended in this moment
                raise Refused(
                    f"process {holder['pid']}, which {self._lock_path} names, cannot be ended: "
                    f"{why(error)}; end the launcher yourself"
                ) from None
        end = time.monotonic() + PATIENCE_S
        while self.holder() is not None:
            if time.monotonic() > end:
                raise Refused(
                    f"process {holder['pid']} does not stop; type kill -9 {holder['pid']}"
                )
            time.sleep(0.1)

    def move_aside(self) -> None:
        """Rename a sweep that is in the folder, so that nothing of it is lost."""
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        self.path.rename(aside)
        print(f"the sweep that was in {self.path} is now in {aside}")

    def refuse_changes(self, definition: Mapping[str, Any]) -> None:
        """Raise Refused, naming what changed, where another sweep is in the folder."""
        try:
            sweep = self.journal.read()
        except Unreadable as error:
            raise Refused(f"{error}; {ELSEWHERE}") from None
        if sweep is None or sweep.hash == hash_of(definition):
            return
        lines = "\n".join(f"  {line}" for line in _changes(sweep.definition, definition))
        raise Refused(f"{self.path} holds another sweep:\n{lines}\n{ELSEWHERE}")

    def tell_what_is_torn(self) -> None:
        """Print what of the journal is left out."""
        sweep = self.journal.read()
        if sweep is not None and sweep.note:
            print(plain(sweep.note))
        if sweep is None and self.journal.path.exists():
            print(plain(f"{self.journal.path} holds no whole line; the sweep begins anew"))

    def add(self, definition: Mapping[str, Any], overrides: list[list[str]]) -> list[Job]:
        """The jobs with these overrides: those that are known, the others noted as queued."""
        sweep = self.journal.read()
        known = dict(sweep.jobs) if sweep is not None else {}
        unmatched = list(known.values())
        found, new = [], []
        for typed in overrides:
            same = (job for job in unmatched if of_the_job(job.overrides) == of_the_job(typed))
            job = next(same, None)
            if job is not None:
                unmatched.remove(job)
            else:
                job = Job(job=max(known, default=-1) + 1, overrides=typed)
                known[job.job] = job
                new.append(job)
            found.append(job)
        event = {
            "event": "sweep",
            "command": command(),
            "cwd": os.getcwd(),
            "definition": definition,
            "hash": hash_of(definition),
            "jobs": [job.overrides for job in known.values()],
        }
        self.journal.write([event, *(job_event(job, "overrides", "state") for job in new)])
        return found

    def refresh(self, jobs: Iterable[Job], *, is_launched: bool = False) -> None:
        """Let jobs have the states, and the errors of what they came to, of now.

        Args:
            is_launched: whether a launcher runs the sweep.
        """
        jobs = list(jobs)
        found = [signs_of(self.path / job.place, job, is_launched=is_launched) for job in jobs]
        for job, (state, error) in zip(jobs, true_states(found), strict=True):
            job.state, job.error = state, None if state.is_under_way else error

    def note(self, job: Job, *names: str) -> None:
        """Write the state of a job, and what else is named."""
        self.journal.write([job_event(job, "state", *names)])

    def note_end(self) -> None:
        """Write that the launcher has told what the sweep came to."""
        self.journal.write([{"event": "end"}])


def job_event(job: Job, *names: str) -> dict[str, Any]:
    """The event that says of a job what is named."""
    content = asdict(job)
    return {"event": "job", "job": job.job, **{name: content[name] for name in names}}


def claim(cfg: DictConfig) -> tuple[SweepFolder, dict[str, Any]]:
    """Hold the folder for a sweep that is composed, name it in its configuration; its definition.

    Where the folder's name holds the time, the newest unfinished sweep of the same definition goes
    on, or else a new folder is made.

    Raises Refused where another process holds the folder, or another sweep is in it.
    """
    definition = definition_of(cfg)
    begins_anew = cfg.resume.value == "never"
    pattern = OmegaConf.to_container(cfg.hydra.sweep)["dir"]  # type: ignore[call-overload,index]
    if TIME_STAMP.search(pattern):
        stamped = TIME_STAMP.sub("*", pattern)
        folder = None if begins_anew else _held_unfinished(stamped, definition)
        folder = folder or _new(Path(cfg.hydra.sweep.dir))
    else:
        folder = SweepFolder(Path(cfg.hydra.sweep.dir))
        if not folder.hold():
            raise Refused(folder.held_message())
        if begins_anew and os.path.lexists(folder.journal.path):
            folder.move_aside()
            folder.release()
            folder = _new(folder.path)
        try:
            folder.refuse_changes(definition)
        except Refused:
            folder.release()
            raise
    folder.tell_what_is_torn()
    with read_write(cfg.hydra):
        cfg.hydra.sweep.dir = str(folder.path)
    return folder, definition


def _held_unfinished(pattern: str, definition: Mapping[str, Any]) -> SweepFolder | None:
    """The newest unfinished sweep of this definition that nobody runs, held for this process."""
    found = sorted(map(Path, glob(f"{pattern}/{NAME}")), reverse=True)
    for path in found:
        folder = SweepFolder(path.parent)
        try:
            if _is_unfinished(folder.journal.read(), definition) and folder.hold():
                if _is_unfinished(folder.journal.read(), definition):  # also now that it is ours
                    return folder
                folder.release()
        except Refused as refusal:
            print(plain(f"passed over: {refusal}"))
    return None


def _is_unfinished(sweep: Sweep | None, definition: Mapping[str, Any]) -> bool:
    if sweep is None or sweep.hash != hash_of(definition):
        return False
    return not sweep.has_ended or bool(sweep.unfinished())


def _new(path: Path) -> SweepFolder:
    """A folder that only this process has made, with a number where the name is taken."""
    number, free = 0, path
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            free.mkdir()
        except FileExistsError:
            number += 1
            free = path.with_name(f"{path.name}-{number}")
            continue
        folder = SweepFolder(free)
        if folder.hold():
            return folder


def definition_of(cfg: DictConfig) -> dict[str, Any]:
    """What decides which jobs a sweep has: its configuration's name, and all that was typed."""
    hydra = cfg.hydra
    return {
        "config": hydra.job.config_name,
        "config_dirs": config_dirs(cfg),
        "overrides": of_the_job([*hydra.overrides.hydra, *hydra.overrides.task]),
    }


def config_dirs(cfg: DictConfig) -> list[str]:
    """What was typed as --config-dir."""
    sources = cfg.hydra.runtime.config_sources
    return [source.path for source in sources if source.provider == "command-line"]


def hash_of(definition: Mapping[str, Any]) -> str:
    """Equal where two commands are of the same sweep."""
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()[:16]


def of_the_job(overrides: list[str]) -> list[str]:
    """Without what says only how and where the sweep runs."""
    return [word for word in overrides if not is_of_the_command(word)]


def is_of_the_command(word: str) -> bool:
    """Whether an override says only how and where a sweep runs."""
    key = _key(word)
    return any(key == name or key.startswith(f"{name}.") for name in OF_THE_COMMAND)


def of_one_run(overrides: list[str]) -> list[str]:
    """Without what says that, and how, a job was one of a sweep."""
    return [word for word in of_the_job(overrides) if _key(word).partition(".")[0] != "sweep"]


def alone(config_name: str | None, dirs: Iterable[str]) -> list[str]:
    """The words that let a job of a sweep run alone, before what was typed for it."""
    words = [word for path in dirs for word in ("--config-dir", path)]
    if config_name not in (None, "train", "tune"):  # a file that says itself that it is a sweep
        words += ["--config-name", str(config_name), "hydra.mode=RUN", "launch=none", "sweep=none"]
    return words


def quoted(value: str) -> str:
    """A value in Hydra's grammar, in quotes where it holds what the grammar would read."""
    if re.fullmatch(r"[\w./:-]+", value, re.ASCII):
        return value
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    return f"'{escaped}'"


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """A line per difference of two definitions."""
    lines = [
        f"{name}: {old[name]} -> {new[name]}"
        for name in ("config", "config_dirs")
        if old[name] != new[name]
    ]
    before, after = ({_key(word): word for word in side["overrides"]} for side in (old, new))
    lines += [
        f"{before.get(key, 'nothing')} -> {after.get(key, 'nothing')}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]
    return lines or [f"the order: {' '.join(before)} -> {' '.join(after)}"]


def command() -> list[str]:
    """The words of this process's command."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    start = ["-m", spec.name] if spec is not None else sys.argv[:1]
    return ["python", *start, *sys.argv[1:]]

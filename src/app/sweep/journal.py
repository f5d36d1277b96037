"""What became of each job of a sweep: `journal.jsonl`, a line per event, of which later ones win.

The events are those of events.py. Several processes may write: a line is one write under a lock.
Needs no torch.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from app.errors import Unreadable
from app.process.files import opened, skipped, sync_folder, why
from app.record.states import State
from app.sweep.events import event_in

NAME = "journal.jsonl"
LARGEST_LINE_BYTES = 1 << 26
"""What a sweep of some ten thousand jobs needs is less."""
TAIL_BYTES = 1 << 16


@dataclass(kw_only=True)
class Job:
    """The last that the journal says of one job.

    Attributes:
        folder: relative to that of the sweep; None before the job has started.
        attempt: how often it was started.
        value: what the task returned, where that is a number; a sweeper may want it.
    """

    job: int
    overrides: list[str]
    folder: str | None = None
    state: State = State.queued
    attempt: int = 0
    device: str | None = None
    seconds: float | None = None
    error: str | None = None
    value: float | None = None

    def __post_init__(self) -> None:
        self.state = State(self.state)  # a word where it was read

    @property
    def place(self) -> str:
        """The folder that it has or, before it has started, will most likely have."""
        return self.folder or str(self.job)


@dataclass(kw_only=True)
class Sweep:
    """What the journal says of the sweep, and its jobs by their numbers.

    Attributes:
        command: words, as typed.
        definition: what decides which jobs there are.
        has_ended: whether its last launcher came to its end.
        note: what is to be said of lines that were skipped; empty where none was.
    """

    command: list[str]
    cwd: str
    definition: dict[str, Any]
    hash: str
    jobs: dict[int, Job]
    has_ended: bool
    note: str

    def unfinished(self) -> list[Job]:
        """The jobs that a resumed sweep runs."""
        return [job for job in self.jobs.values() if job.state.is_to_run]


class Journal:
    """The journal in the folder of a sweep."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME

    def write(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Append the events, each with the time; cuts off a line that a killed writer tore.

        They are on the disk when it returns. Raises OSError where that is full.
        """
        now = datetime.now().astimezone().isoformat(timespec="milliseconds")
        lines = [json.dumps({**event, "time": now}).encode() + b"\n" for event in events]
        is_new = not self.path.exists()
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            _cut_torn_line(descriptor)
            for line in lines:
                if os.write(descriptor, line) != len(line):
                    _cut_torn_line(descriptor)
                    raise OSError(f"{self.path} could not be written: is the disk full?")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if is_new:
            sync_folder(self.path.parent)

    def read(self) -> Sweep | None:
        """What it says; None where there is no journal, or none with a line that is whole.

        Raises Unreadable where no whole line says which sweep it is of.
        """
        sweep: dict[str, Any] | None = None
        has_ended = False
        jobs: dict[int, dict[str, Any]] = {}
        number, torn = 0, []
        for number, event in self._lines():
            if event is None:
                torn.append(number)
            elif event["event"] == "sweep":
                sweep, has_ended = event, False
                for job, overrides in enumerate(event["jobs"]):  # also where a job's line is torn
                    jobs.setdefault(job, {"job": job, "overrides": overrides})
            elif event["event"] == "end":
                has_ended = True
            else:
                before = jobs.get(event["job"], {})
                before.pop("error", None)  # of an earlier attempt
                jobs[event["job"]] = {**before, **event}
        if sweep is None:
            if number == 0:
                return None
            raise Unreadable(self.path, f"no line says which sweep it is of; {skipped(torn)}")
        names = [field.name for field in fields(Job)]
        return Sweep(
            command=sweep["command"],
            cwd=sweep["cwd"],
            definition=sweep["definition"],
            hash=sweep["hash"],
            jobs={
                number: Job(**{name: event[name] for name in names if name in event})
                for number, event in sorted(jobs.items())
                if "overrides" in event
            },
            has_ended=has_ended,
            note=f"{self.path}: {skipped(torn)}" if torn else "",
        )

    def required(self) -> Sweep:
        """What it says. Raises Unreadable where it says nothing."""
        sweep = self.read()
        if sweep is None:
            raise Unreadable(self.path, "it holds no whole line")
        return sweep

    def events(self) -> list[dict[str, Any]]:
        """The events in their order, without lines that are torn or none of ours."""
        return [event for _, event in self._lines() if event is not None]

    def _lines(self) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """Number and event of each line, None for one that is torn or none of ours.

        The last one is left out where it is not ended: somebody may be writing it.
        """
        file = opened(self.path)
        if file is None:
            return
        with file:
            number = 0
            while (line := self._line(file)).endswith(b"\n"):
                number += 1
                yield number, event_in(line)

    def _line(self, file: IO[bytes]) -> bytes:
        try:
            line = file.readline(LARGEST_LINE_BYTES)
        except OSError as error:
            raise Unreadable(self.path, why(error)) from None
        if len(line) == LARGEST_LINE_BYTES:
            raise Unreadable(self.path, f"a line has more than {LARGEST_LINE_BYTES} bytes")
        return line


def _cut_torn_line(descriptor: int) -> None:
    """Make the file end with a line: whoever did not end one was killed, or the lock were his."""
    size = end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - TAIL_BYTES)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        end = start if newline < 0 else start + newline + 1
        if newline >= 0:
            break
    if end < size:
        os.ftruncate(descriptor, end)

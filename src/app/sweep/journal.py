"""What became of each job of a sweep: `journal.jsonl`, a line per event, of which later ones win.

Events are `{"event": "sweep", command, cwd, definition, hash, jobs, time}`, `{"event": "job", job,
overrides, folder, state, attempt, device, seconds, error, value, time}`, where a job's event says
only what it changes, and `{"event": "end", time}`, where the launcher has told what it came to.
Several processes may write: a line is one write under a lock. Needs no torch.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

NAME = "journal.jsonl"
DONE = ("finished", "pruned", "cancelled")
"""States of jobs that a resumed sweep does not run."""
TAIL_BYTES = 1 << 16


@dataclass(kw_only=True)
class Job:
    """The last that the journal says of one job.

    Attributes:
        folder: relative to that of the sweep; None before the job has started.
        state: queued, running, finished, pruned, failed, interrupted or cancelled.
        attempt: how often it was started.
        value: what the task returned, where that is a number; a sweeper may want it.
    """

    job: int
    overrides: list[str]
    folder: str | None = None
    state: str = "queued"
    attempt: int = 0
    device: str | None = None
    seconds: float | None = None
    error: str | None = None
    value: float | None = None


@dataclass(kw_only=True)
class Sweep:
    """What the journal says of the sweep, and its jobs by their numbers.

    Attributes:
        command: words, as typed.
        definition: what decides which jobs there are.
        has_ended: whether its last launcher came to its end.
    """

    command: list[str]
    cwd: str
    definition: dict[str, Any]
    hash: str
    jobs: dict[int, Job]
    has_ended: bool

    def unfinished(self) -> list[Job]:
        """The jobs that a resumed sweep runs."""
        return [job for job in self.jobs.values() if job.state not in DONE]


class Journal:
    """The journal in the folder of a sweep."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME

    def write(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Append the events, each with the time; cuts off a line that a killed writer tore.

        Raises OSError where the disk is full.
        """
        now = datetime.now().astimezone().isoformat(timespec="milliseconds")
        lines = [json.dumps({**event, "time": now}).encode() + b"\n" for event in events]
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            _cut_torn_line(descriptor)
            for line in lines:
                if os.write(descriptor, line) != len(line):
                    _cut_torn_line(descriptor)
                    raise OSError(f"{self.path} could not be written: is the disk full?")
        finally:
            os.close(descriptor)

    def read(self) -> Sweep | None:
        """What it says; None where there is no journal, or none of a sweep."""
        if not self.path.exists():
            return None
        sweep: dict[str, Any] | None = None
        has_ended = False
        jobs: dict[int, dict[str, Any]] = {}
        for event in self.events():
            if event["event"] == "sweep":
                sweep, has_ended = event, False
            elif event["event"] == "end":
                has_ended = True
            else:
                before = jobs.get(event["job"], {})
                before.pop("error", None)  # of an earlier attempt
                jobs[event["job"]] = {**before, **event}
        if sweep is None:
            return None
        names = [field.name for field in fields(Job)]
        return Sweep(
            command=sweep["command"],
            cwd=sweep["cwd"],
            definition=sweep["definition"],
            hash=sweep["hash"],
            jobs={
                number: Job(**{name: event[name] for name in names if name in event})
                for number, event in sorted(jobs.items())
            },
            has_ended=has_ended,
        )

    def events(self) -> list[dict[str, Any]]:
        """The events in their order; a torn last line is none."""
        *lines, _ = self.path.read_bytes().split(b"\n")
        return [json.loads(line) for line in lines]


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

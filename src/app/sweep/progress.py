"""What the user sees while the jobs of a sweep run: a line per job that ended, and in a terminal
how far the sweep is below."""

import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence

from app.record.states import State
from app.sweep.journal import Job


class Progress:
    """Prints how a sweep goes on.

    Args:
        jobs: all jobs of the sweep, also those that are not run now.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self._labels = labels(jobs)
        self._is_live = sys.stdout.isatty()
        self._began: dict[int, float] = {}
        self._took: list[float] = []
        self._most_at_once = 0

    def started(self, job: Job) -> None:
        """A job has begun."""
        self._began[job.job] = time.monotonic()
        self._most_at_once = max(self._most_at_once, len(self._began))

    def ended(self, job: Job, *, waiting: int) -> None:
        """A job has ended, in the state that it has now, while so many wait."""
        seconds = time.monotonic() - self._began.pop(job.job)
        if job.state.is_done:
            self._took.append(seconds)
        error = f"  {first_line(job.error)}" if job.error else ""
        again = "  (will be tried again)" if job.state == State.queued else ""
        state = State.failed if again else job.state
        head = f"#{job.job} {state}  {seconds:.1f} s  {self._labels[job.job]}"
        tail = "" if self._is_live else f"  [{self._summary(waiting)}]"
        self.say(f"{head}{error}{again}{tail}")

    def say(self, text: str) -> None:
        """Print a line above the live one."""
        print(f"\r\x1b[K{text}" if self._is_live else text, flush=True)

    def live(self, *, waiting: int) -> None:
        """Draw how far the sweep is, where somebody sees it."""
        if self._is_live:
            print(f"\r\x1b[K{self._summary(waiting)}", end="", flush=True)

    def close(self) -> None:
        """Take the live line away."""
        if self._is_live:
            print("\r\x1b[K", end="", flush=True)

    def _summary(self, waiting: int) -> str:
        done = sum(job.state.is_done for job in self._jobs)
        failed = sum(job.state == State.failed for job in self._jobs)
        text = f"{done}/{len(self._jobs)} done, {len(self._began)} running, {failed} failed"
        left = self._left_s(waiting)
        return text if left is None else f"{text}, about {duration(left)} left"

    def _left_s(self, waiting: int) -> float | None:
        """Seconds, by the mean of those that have finished; None before."""
        if not self._took or not (self._began or waiting):
            return None
        mean, now = sum(self._took) / len(self._took), time.monotonic()
        running = [max(0.0, mean - (now - began)) for began in self._began.values()]
        if not waiting:
            return max(running)
        return (sum(running) + mean * waiting) / self._most_at_once


def labels(jobs: Sequence[Job]) -> dict[int, str]:
    """By number, what tells a job from the others; all that was typed where it is alone."""
    if len(jobs) == 1:
        return {job.job: " ".join(job.overrides) for job in jobs}
    shared = set.intersection(*(set(job.overrides) for job in jobs)) if jobs else set()
    return {job.job: " ".join(w for w in job.overrides if w not in shared) for job in jobs}


def table(jobs: Iterable[Job]) -> str:
    """A line per job."""
    jobs = list(jobs)
    names = labels(jobs)
    rows = [("job", "state", "attempt", "device", "seconds", "overrides")]
    rows += [
        (
            str(job.job),
            job.state,
            str(job.attempt),
            job.device or "",
            "" if job.seconds is None else f"{job.seconds:.1f}",
            names[job.job] + (f"  {first_line(job.error)}" if job.error else ""),
        )
        for job in jobs
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = (
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]])
        for row in rows
    )
    return "\n".join(map(plain, lines))


def counts(jobs: Sequence[Job]) -> str:
    """How many jobs are in which state."""
    found = Counter(job.state for job in jobs)
    return ", ".join(f"{number} {state}" for state, number in found.items())


def duration(seconds: float) -> str:
    """Hours, minutes and seconds; the larger two."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def first_line(text: str | None) -> str:
    """The first line of an error, printable."""
    return plain((text or "").partition("\n")[0])


def plain(text: str) -> str:
    """One line of printable characters, which a terminal shows and does not act on."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "\ufffd" for c in text)

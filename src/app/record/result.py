"""What a run leaves: result.json."""

import platform
import subprocess
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from app import DISTRIBUTION
from app.config import config_hash
from app.process.requeue import slurm_job
from app.process.tracebacks import in_a_line
from app.record.folder import RunFolder
from app.record.states import SLURM_JOB, State


class Record:
    """Collects the content of result.json and keeps the file up to date, on a failure too.

    Args:
        writes: whether this process is the one that writes the file.

    Attributes:
        outcome: what a run has come to that neither failed nor was interrupted.
    """

    def __init__(self, config: Mapping[str, Any], folder: RunFolder, *, writes: bool) -> None:
        self._folder = folder
        self._writes = writes
        self._seconds: dict[str, float] = {}
        self.outcome = State.finished
        self.content: dict[str, Any] = {
            "status": State.running,
            "name": config["name"],
            "config_hash": config_hash(config),
            **({} if (debug := config.get("debug")) is None else {"debug": debug}),
            "seconds": self._seconds,
            **({} if (job := slurm_job()) is None else {SLURM_JOB: job}),
            "continued_after": [],
            "git_commit": git_commit(),
            "versions": versions(),
        }

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Write the file now and at the end: with `outcome`, interrupted or failed."""
        self.write()
        try:
            yield
            self.content["status"] = self.outcome
        except (KeyboardInterrupt, SystemExit, BrokenPipeError):
            self.content["status"] = State.interrupted
            raise
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            self.content |= {
                "status": State.failed,
                "error": in_a_line(error),
                "where": f"{last.filename}:{last.lineno} in {last.name}",
            }
            raise
        finally:
            self.write()

    def write(self) -> None:
        """Bring the file up to date."""
        if self._writes:
            self._folder.write_result(self.content)

    def note_continued(self, step: int) -> None:
        """Note after which optimizer step a run goes on that was cut."""
        self.content["continued_after"] = sorted({*self.content["continued_after"], step})
        self.write()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the seconds of a phase of the run."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] = round(time.monotonic() - start, 3)


def versions() -> dict[str, str]:
    """Of Python and the packages; ours is missing where the source is run without an install."""
    found = {"python": platform.python_version()}
    for name in (DISTRIBUTION, "torch", "lightning", "hydra-core"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def git_commit() -> str | None:
    """The commit of the working directory, `-dirty` where it was changed; None outside of git."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()

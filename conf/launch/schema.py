"""Where the jobs of a sweep run: one after another in this process, or a queue over all devices.

A queue gives each job a process and devices of its own, notes in the sweep's `journal.jsonl` what
became of it, and leaves a sweep that goes on where it was cut: by the same command, or by
`python -m app.sweep resume DIR`.

| preset | what it does                                                                     |
|--------|----------------------------------------------------------------------------------|
| local  | a job per GPU of this machine, or per core where it has none                     |
"""

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from ..rules import require


class StartMethod(str, Enum):
    """How a job's process begins."""

    forkserver = "forkserver"
    spawn = "spawn"


# what to do with the jobs that wait when one has failed for the last time; `continue` is a keyword
OnFail = Enum("OnFail", {"continue": "continue", "stop": "stop"}, type=str)


@dataclass(kw_only=True)
class Local:
    """A queue over the devices of this machine."""

    slots: int | None = MISSING
    """Devices that the jobs use, >= 1; null = every GPU, or every core where there is none."""
    devices_per_job: int | None = MISSING
    """Devices that a job gets, >= 1; null = as many as its trainer.devices says."""
    start_method: StartMethod = MISSING
    """forkserver imports torch once for all jobs; spawn once a job."""
    retries: int = MISSING
    """How often a job that failed is run again, from its last checkpoint, >= 0."""
    on_fail: OnFail = MISSING
    """continue runs the other jobs all the same; stop starts no more."""
    jobs: list[int] | None = MISSING
    """Numbers of the jobs to run; null = all that are not finished."""

    def __post_init__(self) -> None:
        for name in ("slots", "devices_per_job"):
            value = getattr(self, name)
            key = f"launch.{name}"
            require(value is None or value >= 1, key, "be >= 1", value, f"type {key}=null")
        require(
            self.retries >= 0, "launch.retries", "be >= 0", self.retries, "type launch.retries=1"
        )


PRESETS = {"local": Local}

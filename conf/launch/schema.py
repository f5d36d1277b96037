"""Where runs are trained: in this process, in a queue over all devices, or on a SLURM cluster.

A queue gives each job a process and devices of its own, notes in the sweep's `journal.jsonl` what
became of it, and leaves a sweep that goes on where it was cut: by the same command, or by
`python -m app.sweep resume DIR`.

| preset | what it does                                                                     |
|--------|----------------------------------------------------------------------------------|
| local  | a job per GPU of this machine, or per core where it has none                     |
| slurm  | a job of SLURM for a run or for each job of a sweep, submitted with submitit     |

A job of SLURM has as many machines as `trainer.num_nodes` says and `trainer.devices` tasks on each.
Before its time is up, or where it is pre-empted, it saves after the optimizer step that it is in,
is requeued, and goes on.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

from omegaconf import MISSING

from ..rules import TEN_YEARS_MIN, count, number, require, text

NULL = "type {key}=null"

StartMethod = StrEnum("StartMethod", "forkserver spawn")
"""How a job's process begins."""

SLURM_LOOKS_EVERY_S = 30
"""How often it compares the time that jobs have run with their limits (`PERIODIC_TIMEOUT`)."""

OnFail = StrEnum("OnFail", "continue stop")
"""What becomes of the jobs that wait when one has failed for the last time."""


@dataclass(kw_only=True)
class Local:
    """A queue over the devices of this machine."""

    slots: int | None = count(at_most=4096, instead=NULL)
    """Devices that the jobs use, >= 1; null = every GPU, or every core where there is none."""
    devices_per_job: int | None = count(at_most=1024, instead=NULL)
    """Devices that a job gets, >= 1; null = as many as its trainer.devices says."""
    start_method: StartMethod = MISSING
    """forkserver imports torch once for all jobs; spawn once a job."""
    retries: int = count(at_least=0, at_most=1000, instead="type {key}=1")
    """How often a job that failed is run again, from its last checkpoint, >= 0."""
    on_fail: OnFail = MISSING
    """continue runs the other jobs all the same; stop starts no more."""
    jobs: list[int] | None = count(at_least=0, instead=NULL)
    """Numbers of the jobs to run; null = all that are not finished."""


OnInterrupt = StrEnum("OnInterrupt", "ask cancel leave")
"""What becomes of the jobs where Ctrl-C ends the command that waits for them."""


@dataclass(kw_only=True)
class Slurm:
    """Jobs of SLURM; what is null is the cluster's choice."""

    is_submitted: ClassVar[bool] = True

    partition: str | None = text(instead=NULL)
    """Of the cluster."""
    account: str | None = text(instead=NULL)
    """Whose time it is."""
    qos: str | None = text(instead=NULL)
    """Quality of service."""
    constraint: str | None = text(instead=NULL)
    """Features that the machines must have."""
    timeout_min: int = count(at_most=TEN_YEARS_MIN, instead="type {key}=60")
    """Time limit in minutes, >= 1; a longer run is requeued and goes on."""
    cpus_per_task: int | None = number(above=0, at_most=4096, instead=NULL)
    """Cores for each device, >= 1; DataLoader workers need some."""
    mem_gb: float | None = number(above=0, at_most=1_000_000, instead=NULL)
    """Memory of each machine in GB, > 0."""
    setup: list[str] = MISSING
    """Lines of shell before the run, such as 'module load cuda'."""
    options: dict[str, Any] = MISSING
    """More options of sbatch by their names: +launch.options.exclude=node7."""
    max_parallel: int = count(at_most=100_000, instead="type {key}=60")
    """Jobs of a sweep that run at the same time, >= 1."""
    signal_s: int = count(at_most=60 * TEN_YEARS_MIN, instead="type {key}=60")
    """Seconds before the time limit at which a run saves and is requeued, >= 1: more than a step
    and a checkpoint take. SLURM signals up to half a minute earlier."""
    max_requeues: int = count(at_least=0, at_most=1_000_000, instead="type {key}=0")
    """How often a job may be run again, by a time-out, a pre-emption or a dead machine, >= 0; then
    it fails. A run goes on from there with the same command."""
    wait: bool = MISSING
    """Whether the command waits for its jobs; false prints their numbers and returns."""
    on_interrupt: OnInterrupt = MISSING
    """Ctrl-C while waiting: cancel the jobs, leave them, or ask; without a terminal ask leaves."""
    jobs: list[int] | None = count(at_least=0, instead=NULL)
    """Numbers of the jobs to submit; null = all that are not finished."""

    def __post_init__(self) -> None:
        require(
            self.signal_s < 60 * self.timeout_min - SLURM_LOOKS_EVERY_S,
            f"launch.signal_s must be < {60 * self.timeout_min - SLURM_LOOKS_EVERY_S}, "
            f"launch.timeout_min={self.timeout_min} in seconds less the {SLURM_LOOKS_EVERY_S} "
            f"between SLURM's looks, got {self.signal_s}; type "
            f"launch.signal_s={20 * self.timeout_min}",
        )


PRESETS = {"local": Local, "slurm": Slurm}

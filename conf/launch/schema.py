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
from enum import Enum
from typing import Any

from omegaconf import MISSING

from ..rules import require


class StartMethod(str, Enum):
    """How a job's process begins."""

    forkserver = "forkserver"
    spawn = "spawn"


SLURM_LOOKS_EVERY_S = 30
"""How often it compares the time that jobs have run with their limits (`PERIODIC_TIMEOUT`)."""

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


class OnInterrupt(str, Enum):
    """What becomes of the jobs where Ctrl-C ends the command that waits for them."""

    ask = "ask"
    cancel = "cancel"
    leave = "leave"


@dataclass(kw_only=True)
class Slurm:
    """Jobs of SLURM; what is null is the cluster's choice."""

    partition: str | None = MISSING
    """Of the cluster."""
    account: str | None = MISSING
    """Whose time it is."""
    qos: str | None = MISSING
    """Quality of service."""
    constraint: str | None = MISSING
    """Features that the machines must have."""
    timeout_min: int = MISSING
    """Time limit in minutes, >= 1; a longer run is requeued and goes on."""
    cpus_per_task: int | None = MISSING
    """Cores for each device, >= 1; DataLoader workers need some."""
    mem_gb: float | None = MISSING
    """Memory of each machine in GB, > 0."""
    setup: list[str] = MISSING
    """Lines of shell before the run, such as 'module load cuda'."""
    options: dict[str, Any] = MISSING
    """More options of sbatch by their names: +launch.options.exclude=node7."""
    max_parallel: int = MISSING
    """Jobs of a sweep that run at the same time, >= 1."""
    signal_s: int = MISSING
    """Seconds before the time limit at which a run saves and is requeued, >= 1: more than a step
    and a checkpoint take. SLURM signals up to half a minute earlier."""
    max_requeues: int = MISSING
    """How often a job may be run again, by a time-out, a pre-emption or a dead machine, >= 0; then
    it fails. A run goes on from there with the same command."""
    wait: bool = MISSING
    """Whether the command waits for its jobs; false prints their numbers and returns."""
    on_interrupt: OnInterrupt = MISSING
    """Ctrl-C while waiting: cancel the jobs, leave them, or ask; without a terminal ask leaves."""
    jobs: list[int] | None = MISSING
    """Numbers of the jobs to submit; null = all that are not finished."""

    def __post_init__(self) -> None:
        for name, least in (("timeout_min", 1), ("max_parallel", 1), ("signal_s", 1)):
            value, key = getattr(self, name), f"launch.{name}"
            require(value >= least, key, f"be >= {least}", value, f"type {key}=60")
        for name in ("cpus_per_task", "mem_gb"):
            value, key = getattr(self, name), f"launch.{name}"
            require(value is None or value > 0, key, "be > 0", value, f"type {key}=null")
        require(
            self.max_requeues >= 0,
            "launch.max_requeues",
            "be >= 0",
            self.max_requeues,
            "type launch.max_requeues=0",
        )
        require(
            self.signal_s < 60 * self.timeout_min - SLURM_LOOKS_EVERY_S,
            "launch.signal_s",
            f"be < {60 * self.timeout_min - SLURM_LOOKS_EVERY_S}, launch.timeout_min="
            f"{self.timeout_min} in seconds less the {SLURM_LOOKS_EVERY_S} between SLURM's looks",
            self.signal_s,
            f"type launch.signal_s={20 * self.timeout_min}",
        )


PRESETS = {"local": Local, "slurm": Slurm}

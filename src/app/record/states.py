"""What can become of a run, in a word. Needs no torch."""

from enum import StrEnum

SLURM_JOB = "slurm_job"
"""The key of result.json that names the job of SLURM which trains the run."""


class State(StrEnum):
    """What has become of a run; files hold the plain word."""

    queued = "queued"
    running = "running"
    finished = "finished"
    pruned = "pruned"
    failed = "failed"
    interrupted = "interrupted"
    cancelled = "cancelled"
    unreadable = "unreadable"
    """Its result.json or its config.yaml is torn, or no run's."""
    missing = "missing"
    """It has ended according to the journal of its sweep, but left no result."""

    @property
    def is_done(self) -> bool:
        """Whether it came to its end: nothing is left to do."""
        return self in (State.finished, State.pruned)

    @property
    def is_under_way(self) -> bool:
        """Whether it waits or runs."""
        return self in (State.queued, State.running)

    @property
    def is_lost(self) -> bool:
        """Whether it ended before it was done."""
        return self in (State.failed, State.interrupted, State.cancelled)

    @property
    def has_no_result(self) -> bool:
        """Whether only a reader says so: no file holds these words."""
        return self in (State.unreadable, State.missing)

    @property
    def is_to_run(self) -> bool:
        """Whether a resumed sweep runs it."""
        return not self.is_done and self not in (State.cancelled, State.missing)

    @property
    def is_to_drop(self) -> bool:
        """Whether a cancelled sweep drops it."""
        return self.is_under_way or self is State.interrupted

    @property
    def is_to_retry(self) -> bool:
        """Whether it is run again only where that is asked for."""
        return self in (State.failed, State.cancelled) or self.has_no_result

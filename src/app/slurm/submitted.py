"""What a task of a submitted job does: one rank of one run. Needs no torch until it trains."""

import atexit
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from app.errors import Refused, ended_from_outside
from app.launch.failures import HEAD_START_S, Failure, failure_of, first_of
from app.process.asked import asked
from app.process.ending import leave
from app.process.files import write_to
from app.process.ranks import num_slurm_tasks
from app.process.requeue import RESTARTS, requeued_or_told
from app.record.folder import LOG, RunFolder, result_in
from app.record.states import State

FAILURES = "slurm/failures"


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A run as submitit pickles it and each task calls it.

    Attributes:
        cfg: its configuration, which needs nothing of Hydra.
        typed: what to note in overrides.yaml.
        note: tells the sweep that it is a job of what became of it; None where it is of none.
        attempt: how often the job was submitted, with this time; SLURM may run it again.
        environment: variables to set.
    """

    cfg: DictConfig
    typed: list[str]
    note: Callable[..., None] | None
    attempt: int
    environment: Mapping[str, str]

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.cfg.run_dir)

    def __call__(self) -> float | None:
        """Train; the objective. Raises what the run raises: SLURM is told by the exit code."""
        with asked.listening():
            try:
                value = self._run()
                # torch's threads can abort a process that ends in the usual way
                atexit.register(leave, 0)
                return value
            except SystemExit:
                requeued_or_told(
                    self.cfg.name, max_requeues=self.cfg.launch.max_requeues
                )  # where the run was not there yet to heed a signal
                raise

    def _run(self) -> float | None:
        os.environ.update(self.environment)
        rank = int(os.environ.get("SLURM_PROCID", "0"))
        restarts = int(os.environ.get(RESTARTS, "0"))
        if rank == 0:
            write_to(self.folder / LOG)
            for path in self._failures.glob("*"):
                path.unlink()  # of an earlier attempt
            self._note(State.running, "attempt", "device", attempt=self.attempt + restarts)
        try:
            if restarts > self.cfg.launch.max_requeues:
                raise Refused(
                    f"launch.max_requeues={self.cfg.launch.max_requeues}: the job was requeued "
                    f"{restarts} times; to go on from its last checkpoint type the same command"
                )
            value = self._train()
        except BaseException as error:
            exit_code = error.code if isinstance(error, SystemExit) else 1
            if not exit_code:
                raise
            self._settle(error, rank)
            raise SystemExit(2 if isinstance(error, Refused) else exit_code) from error
        if rank == 0:
            result = result_in(self.folder)
            self._note(State(result.get("status", State.finished)), "value", value=value)
        return value

    def _train(self) -> float | None:
        from app.fit import objective, run

        result = run(self.cfg, typed=self.typed)
        return None if result is None else objective(self.cfg.objective, result["metrics"])

    @property
    def _failures(self) -> Path:
        return self.folder / FAILURES

    def _settle(self, error: BaseException, rank: int) -> None:
        """Note how the run failed, by the rank that failed first; print the traceback."""
        failure = failure_of(error, rank)
        if failure.exit_code is None:
            print(failure.refusal or failure.trace, file=sys.stderr, flush=True)
        self._failures.mkdir(parents=True, exist_ok=True)
        partial = self._failures / f".{rank}"
        partial.write_bytes(pickle.dumps(failure))
        partial.replace(self._failures / str(rank))
        if failure.is_of_a_lost_peer:
            time.sleep(HEAD_START_S)
        found = [pickle.loads(path.read_bytes()) for path in self._failures.glob("[0-9]*")]
        first: Failure = first_of(found)
        is_of_its_own = first.exit_code is None and not first.is_of_a_lost_peer
        silent = {*range(num_slurm_tasks())} - {failure.rank for failure in found}
        if silent and not is_of_its_own and any(failure.is_of_a_lost_peer for failure in found):
            self._note_failure(min(silent), ended_from_outside(min(silent)).error)
        elif first.exit_code is None:
            self._note_failure(first.rank, first.error)
        elif first.exit_code > 128 and rank == 0:
            name = signal.Signals(first.exit_code - 128).name
            self._note(State.interrupted, "error", error=f"asked to stop by {name}")

    def _note_failure(self, rank: int, error: str) -> None:
        """Keep which rank failed first, as far as this one knows: the last to leave knows best."""
        run = RunFolder(self.folder)
        result = result_in(self.folder)
        told = {"status": State.failed, "error": error, "rank": rank}
        if State(result.get("status", State.queued)).is_done or told.items() <= result.items():
            return
        if rank != 0:
            result.pop("where", None)  # of rank 0, which may only have lost its peer
        run.write_result({**result, **told})
        self._note(State.failed, "error", error=error)

    def _note(self, state: State, *names: str, **values: Any) -> None:
        if self.note is not None:
            self.note(state, *names, **values)

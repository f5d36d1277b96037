"""A run in a process of its own, a job of a sweep, and how it ended. Needs no torch."""

import os
import pickle
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hydra import version
from hydra.core.utils import run_job, setup_globals
from hydra.types import HydraContext
from hydra.utils import instantiate
from omegaconf import DictConfig

from app.cli import VERSION_BASE
from app.errors import RankFailed
from app.launch.failures import failure_of
from app.process.asked import HEEDED
from app.process.ending import GRACE_S, end_in_time, leave
from app.process.files import write_to
from app.record.folder import LOG, RunFolder
from app.record.states import State

INTERRUPTED = tuple(128 + number for number in (signal.SIGINT, *HEEDED))
JOB_GRACE_S = 2 * GRACE_S
"""How long a job may take to end after SIGTERM: its own ranks have GRACE_S."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a job ended.

    Attributes:
        state: finished, pruned, failed or interrupted.
        is_refusal: whether what was typed is not allowed, so that trying again cannot help.
    """

    state: State
    value: Any = None
    error: str | None = None
    is_refusal: bool = False


class JobProcess:
    """A job that runs.

    Attributes:
        outcome: how it ended; None while it runs.
    """

    def __init__(
        self,
        *,
        context: BaseContext,
        task: Callable[[DictConfig], Any],
        cfg: DictConfig,
        folder: Path,
        environment: Mapping[str, str],
    ) -> None:
        self.outcome: Outcome | None = None
        self._is_ready = False
        self._pending: signal.Signals | None = None
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(  # type: ignore[attr-defined]
            target=_work, args=(task, cfg, folder, dict(environment), sender)
        )
        self._process.start()
        sender.close()

    @property
    def sources(self) -> list[Any]:
        """What `multiprocessing.connection.wait` can wait for: one is ready when there is news."""
        return [self._process.sentinel, *([] if self._receiver.closed else [self._receiver])]

    def stop(self, number: signal.Signals) -> None:
        """Ask the job to stop, as soon as it can hear it."""
        self._pending = number
        self._pass_on()

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()

    def read(self) -> bool:
        """Take in the news; whether the process has ended, with an `outcome`."""
        while not self._receiver.closed and self._receiver.poll():
            try:
                told = pickle.loads(self._receiver.recv_bytes())
            except EOFError:
                self._receiver.close()
                break
            self._is_ready = True
            self.outcome = told
            self._pass_on()
        if self._process.is_alive():
            return False
        if self.outcome is None:
            self.outcome = self._ended_silently(self._process.exitcode)
        self._receiver.close()
        return True

    def _pass_on(self) -> None:
        if self._pending is not None and self._is_ready and self._process.is_alive():
            os.kill(self._process.pid, self._pending)
            self._pending = None

    def _ended_silently(self, exit_code: int) -> Outcome:
        pid = self._process.pid
        if exit_code >= 0:
            return Outcome(
                state=State.failed, error=f"process {pid} ended with exit code {exit_code}"
            )
        hint = "; was memory short?" if -exit_code == signal.SIGKILL else ""
        name = signal.Signals(-exit_code).name
        return Outcome(state=State.failed, error=f"process {pid} was ended by {name}{hint}")


def _work(
    task: Callable[[DictConfig], Any],
    cfg: DictConfig,
    folder: Path,
    environment: Mapping[str, str],
    sender: "Connection[Any, Any]",
) -> None:
    """What the process of a job does."""
    os.setpgid(0, 0)  # a Ctrl-C in the terminal is the launcher's to pass on
    end_in_time(grace_s=JOB_GRACE_S)
    os.environ.clear()  # of the server that this was forked from
    os.environ.update(environment)
    write_to(folder / LOG)
    version.setbase(VERSION_BASE)
    setup_globals()
    try:
        sender.send_bytes(pickle.dumps(None))  # signals are heard from here on
        outcome = _outcome(task, cfg, folder)
    except (KeyboardInterrupt, SystemExit):
        outcome = Outcome(state=State.interrupted)
    sender.send_bytes(pickle.dumps(outcome))
    leave(0 if outcome.state.is_done else 1)


def _callbacks(cfg: DictConfig) -> Any:
    """Hydra's callbacks of a job, by the configuration; one that fails only warns, as in Hydra."""
    made = list((instantiate(cfg.hydra.callbacks, _convert_="all") or {}).values())

    def tell(name: str, **given: Any) -> None:
        for one in made if name == "on_job_start" else reversed(made):
            try:
                getattr(one, name)(**given)
            except Exception as error:
                said = f"{type(one).__name__}.{name} raised {type(error).__name__}: {error}"
                warnings.warn(f"Callback {said}", stacklevel=2)

    return SimpleNamespace(**{name: partial(tell, name) for name in ("on_job_start", "on_job_end")})


def _outcome(task: Callable[[DictConfig], Any], cfg: DictConfig, folder: Path) -> Outcome:
    loader: Any = None  # of which a job has no need
    try:
        done = run_job(
            hydra_context=HydraContext(config_loader=loader, callbacks=_callbacks(cfg)),
            task_function=task,
            config=cfg,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        value = done.return_value  # raises what the job raised
        result = RunFolder(folder).read_result() or {}
        return Outcome(state=State(result.get("status", State.finished)), value=value)
    except KeyboardInterrupt:
        return Outcome(state=State.interrupted)
    except SystemExit as stop:
        if stop.code in INTERRUPTED:
            return Outcome(state=State.interrupted)
        return Outcome(state=State.failed, error=f"SystemExit: {stop.code}")
    except BaseException as error:
        failure = failure_of(error, 0)
        text = error.error if isinstance(error, RankFailed) else failure.refusal or failure.error
        print(failure.refusal or failure.trace, file=sys.stderr)
        return Outcome(state=State.failed, error=text, is_refusal=failure.refusal is not None)

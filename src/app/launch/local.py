"""Processes of this machine, one a rank, that nobody beyond it can speak to."""

import logging
import logging.config
import math
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection
from pathlib import Path
from types import FrameType
from typing import Any

from app.errors import RankFailed, Refused
from app.launch.failures import HEAD_START_S, Failure, failure_of, first_of
from app.process.ending import GRACE_S, end_in_time, leave
from app.process.files import write_atomically
from app.process.ranks import LOOPBACK, keep_to_loopback, store_at

PRELOADED = ["app.launch.preloaded"]

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1,
             signal.SIGUSR2)  # fmt: skip

KILL_AFTER_S = GRACE_S + 2.0
"""How long ranks may take to stop before they are killed."""

POLL_S = 0.1


def run_local(
    function: Callable[..., Any],
    *arguments: Any,
    num_processes: int,
    start_method: str,
    logging_config: Mapping[str, Any] | None,
) -> Any:
    """Call `function(*arguments)` in processes of this machine, one a rank; returns rank 0's value.

    Tensors in the arguments arrive in shared memory. Can be called again and again, also under a
    sweep and from a notebook; no process stays, also where this one is killed.

    Args:
        num_processes: ranks, >= 1.
        start_method: forkserver or spawn, of Python's multiprocessing.
        logging_config: for `logging.config.dictConfig` on rank 0; the others say warnings only.

    Raises:
        RankFailed: naming the rank that failed first.
        Refused: where a rank refused what was typed.
        SystemExit: where the ranks or this process were interrupted: 128 and the signal.
    """
    if start_method == "forkserver":
        multiprocessing.set_forkserver_preload(PRELOADED)
    context: Any = multiprocessing.get_context(start_method)
    store = store_at(LOOPBACK, size=num_processes)
    processes: list[Any] = []
    with tempfile.TemporaryDirectory(prefix="app-ranks-") as name:
        folder = Path(name)
        try:
            for rank in range(num_processes):
                environment = _environment(rank, num_processes, store.port)
                work = (function, arguments, folder, environment, logging_config)
                process = context.Process(target=_work, args=work)
                process.start()
                processes.append(process)
            failed, asked = _ended(processes)
        finally:
            for process in processes:
                process.kill()
                process.join()
        if failed is not None:
            raise _explained(folder, processes.index(failed), failed.exitcode, failed.pid)
        if asked is not None:
            raise SystemExit(128 + asked)
        return pickle.loads((folder / "value").read_bytes())


def _environment(rank: int, size: int, port: int) -> dict[str, str]:
    """Variables of this process, and those by which torch and Lightning know a rank."""
    environment = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // size)),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 offers no store either
    }
    keep_to_loopback(environment)
    return environment


def _ended(processes: Sequence[Any]) -> tuple[Any, int | None]:
    """Wait until all have ended; which one failed, so that the others were asked to end, and by
    which signal they were asked."""
    running = list(processes)
    told: list[int] = []

    def pass_on(number: int, frame: FrameType | None = None) -> None:
        told.append(number)
        for process in running:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)

    failed, kill_at = None, math.inf
    with _handling(pass_on):
        while running:
            connection.wait([process.sentinel for process in running], timeout=POLL_S)
            running[:] = [process for process in running if process.exitcode is None]
            if failed is None and not told:
                failed = next((process for process in processes if process.exitcode), None)
                if failed is not None:
                    pass_on(signal.SIGTERM)
            if told:
                kill_at = min(kill_at, time.monotonic() + KILL_AFTER_S)
            if time.monotonic() > kill_at:
                pass_on(signal.SIGKILL)
    return failed, told[0] if told else None


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Take the signals that are passed on, but for those that nohup or a shell has switched off.

    Only the main thread can: in another one the signals are somebody else's.
    """
    is_main = threading.current_thread() is threading.main_thread()
    heard = [n for n in PASSED_ON if is_main and signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _explained(folder: Path, rank: int, exit_code: int, pid: int) -> BaseException:
    """What to raise: the failure that came first, not those of ranks that lost their peer."""
    failures = [pickle.loads(path.read_bytes()) for path in folder.glob("*.failure")]
    if (exit_code < 0 and -exit_code != signal.SIGTERM) or not failures:
        name = signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"
        error = f"rank {rank} (process {pid}) was ended by {name}"
        hint = "; was memory short?" if -exit_code == signal.SIGKILL else ""
        return RankFailed(
            rank=rank,
            error=error,
            details=f"{error}{hint}; the other ranks were ended. To go on from the last "
            "checkpoint type the same command with the same name=",
        )
    found: Failure = first_of(failures)
    if found.refusal is not None:
        return Refused(found.refusal)
    if found.exit_code is not None:
        return SystemExit(found.exit_code)
    return RankFailed(
        rank=found.rank,
        error=found.error,
        details=f"rank {found.rank} failed, and the other ranks were ended:\n{found.trace}",
    )


def _work(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    folder: Path,
    environment: Mapping[str, str],
    logging_config: Mapping[str, Any] | None,
) -> None:
    """What each process does; only rank 0's value is sent back."""
    end_in_time(grace_s=GRACE_S)
    os.environ.clear()  # of the server that this was forked from: it may have an older one
    os.environ |= environment
    rank = int(os.environ["RANK"])
    _set_up_logging(rank, logging_config)
    try:
        value = function(*arguments)
        if rank == 0:
            write_atomically(folder / "value", pickle.dumps(value))
    except BaseException as error:
        failure = failure_of(error, rank)
        write_atomically(folder / f"{rank}.failure", pickle.dumps(failure))
        if failure.is_of_a_lost_peer:
            time.sleep(HEAD_START_S)
        leave(failure.exit_code or 1)


def _set_up_logging(rank: int, config: Mapping[str, Any] | None) -> None:
    from lightning.pytorch.utilities import rank_zero_only

    # was read at import: before a forked process had a rank
    rank_zero_only.rank = rank  # type: ignore[attr-defined]
    if rank == 0 and config is not None:
        logging.config.dictConfig(dict(config))
    else:
        prefix = f"rank {rank}: " if rank else ""
        level = logging.WARNING if rank else logging.INFO
        logging.basicConfig(level=level, format=f"{prefix}%(message)s")

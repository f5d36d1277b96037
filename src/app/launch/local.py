"""Processes of this machine, one a rank, started by torch's elastic agent."""

import logging
import logging.config
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import Any

from app.errors import RankFailed, Refused
from app.launch.failures import HEAD_START_S, Failure, failure_of, first_of

PRELOADED = ["app.launch.preloaded"]

OF_THE_AGENT = ("RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_",
                "TORCH_NCCL_ASYNC")  # fmt: skip
"""How the variables begin that the agent sets for a rank."""

GRACE_S = 10.0
"""How long a rank may take to end after SIGTERM."""


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
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if start_method == "forkserver":
        multiprocessing.set_forkserver_preload(PRELOADED)
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic") or name == "torch.multiprocessing.spawn":
            logging.getLogger(name).setLevel(logging.CRITICAL)  # we say what happened
    with tempfile.TemporaryDirectory(prefix="app-ranks-") as folder:
        launch = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            run_id=Path(folder).name,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            start_method=start_method,
            shutdown_timeout=int(GRACE_S),
            signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2",
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        handlers = {number: signal.getsignal(number) for number in _handled(launch)}
        content = _Arguments(arguments)
        try:
            values = elastic_launch(launch, _work)(
                function, content, folder, dict(os.environ), logging_config
            )
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            raise _explained(Path(folder), rank, failure.exitcode, failure.pid) from None
        except SignalException as stop:
            raise SystemExit(128 + stop.sigval) from None
        finally:
            if threading.current_thread() is threading.main_thread():
                for number, handler in handlers.items():
                    signal.signal(number, handler)
    return values[0]


class _Arguments:
    """The arguments as one object: the agent looks for macros in each that is a string."""

    def __init__(self, values: tuple[Any, ...]) -> None:
        self.values = values


def _handled(launch: Any) -> list[signal.Signals]:
    """The signals for which the agent sets handlers of its own."""
    return [signal.Signals[name] for name in launch.signals_to_handle.split(",")]


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
    arguments: _Arguments,
    folder: str,
    environment: Mapping[str, str],
    logging_config: Mapping[str, Any] | None,
) -> Any:
    """What each process does; only rank 0's value is sent back."""
    end_in_time(grace_s=GRACE_S)
    of_the_agent = {key: os.environ[key] for key in os.environ if key.startswith(OF_THE_AGENT)}
    os.environ.clear()  # of the server that this was forked from: it may have an older one
    os.environ |= {**environment, **of_the_agent}
    # one machine: no name of it needs to be found in a network
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    rank = int(os.environ["RANK"])
    _set_up_logging(rank, logging_config)
    try:
        value = function(*arguments.values)
    except BaseException as error:
        failure = failure_of(error, rank)
        path = Path(folder) / f"{rank}.failure"
        partial = path.with_suffix(".part")
        partial.write_bytes(pickle.dumps(failure))
        partial.replace(path)
        if failure.is_of_a_lost_peer:
            time.sleep(HEAD_START_S)
        leave(failure.exit_code or 1)
    return value if rank == 0 else None


def end_in_time(*, grace_s: float) -> None:
    """End this process with the one that started it, however that ends, and soon after SIGTERM.

    A thread sees to it: the main one may wait for a peer that is gone. Else this process is like
    one that was typed: Ctrl-C interrupts it, and it starts others the way its system does.

    Args:
        grace_s: seconds that the main thread has after SIGTERM.
    """
    starter = multiprocessing.parent_process()
    assert starter is not None
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        signalled = False
        while not signalled:
            ready = connection.wait([starter.sentinel, reader])
            if starter.sentinel in ready:
                leave(1)
            signalled = signal.SIGTERM in os.read(reader, 64)
        time.sleep(grace_s)
        leave(128 + signal.SIGTERM)

    # a handler, or the signal ends the process at once; Lightning sets its own in a fit
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    # or each of a DataLoader's workers would be forked from a server of its own, without torch
    multiprocessing.set_start_method(None, force=True)
    os.register_at_fork(after_in_child=partial(signal.set_wakeup_fd, -1))  # not ours to hear
    threading.Thread(target=watch, daemon=True).start()


def leave(exit_code: int) -> None:
    """Exit without waiting for any thread, and take the DataLoader's workers along."""
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


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

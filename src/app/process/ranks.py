"""The processes that train together: which one this is, and what the first tells the others.

They speak through the key-value store of the rendezvous, which is there before any process group
is, and which no thread or device waits in.
"""

import io
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar

from app.errors import Refused
from app.process.files import write_atomically
from app.process.imports import importing

T = TypeVar("T")

LOOPBACK = "127.0.0.1"

PATIENCE = timedelta(days=7)
"""How long a rank waits for the first one, which may search or read data; a launcher ends it where
the first one has died."""


def started_elsewhere() -> bool:
    """Whether torchrun, srun or `run_local` started this process as one of several. No torch."""
    if {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys():
        return int(os.environ["WORLD_SIZE"]) > 1
    return num_slurm_tasks() > 1


def num_slurm_tasks() -> int:
    """Of the step of SLURM that this process is one of; 1 where it is of none."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))


class Ranks:
    """The processes of a run, seen from one of them; of a process alone where `store` is None.

    Args:
        rank: number of this process, 0 to size - 1.
        size: number of processes.
        store: a `torch.distributed.Store` that all of them reach.
    """

    def __init__(self, *, rank: int, size: int, store: Any | None) -> None:
        assert (size == 1) == (store is None)
        self.rank = rank
        self.size = size
        self._store = store
        self._num_told = 0

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that writes and prints."""
        return self.rank == 0

    def first(self, function: Callable[[], T]) -> T:
        """What `function` returns on rank 0, on every rank: tensors and plain values.

        All ranks call it in the same order. Where it raises on rank 0, the others leave with
        SystemExit: the error is told once.
        """
        if self.size == 1:
            return function()
        key = f"told/{self._num_told}"
        self._num_told += 1
        return self._telling(key, function) if self.is_first else self._told(key)

    def one(self, function: Callable[[], T], *, patience_s: float) -> T:
        """As `first`, but for ranks that leave: once, and from wherever each of them is.

        Where rank 0 does not come, since it waits for a rank that has left, another one calls
        `function`.

        Args:
            patience_s: how long that other one waits for rank 0.
        """
        if self._store is None:
            return function()
        if not self.is_first:
            with suppress(RuntimeError):  # it has not come
                self._store.wait(["one"], timedelta(seconds=patience_s))
        decides = self._store.add("one/asked", 1) == 1
        return self._telling("one", function) if decides else self._told("one")

    def gathered(self, value: T) -> list[T]:
        """The values of all ranks, in their order, on every rank: tensors and plain values."""
        if self._store is None:
            return [value]
        key = f"gathered/{self._num_told}"
        self._num_told += 1
        self._store.set(f"{key}/{self.rank}", _dumped({"value": value}))
        return [_loaded(self._store.get(f"{key}/{rank}"))["value"] for rank in range(self.size)]

    def refuse_different(self, mine: Mapping[str, Any]) -> None:
        """Raise Refused, naming the keys, where this rank would train another run than rank 0."""
        theirs = self.first(lambda: mine)
        changed = [key for key in sorted({*mine, *theirs}) if mine.get(key) != theirs.get(key)]
        if changed:
            lines = "\n".join(f"  {key}: {theirs.get(key)} -> {mine.get(key)}" for key in changed)
            raise Refused(
                f"rank {self.rank} has another configuration than rank 0:\n{lines}\n"
                "start every rank with the same command"
            )

    def tell_failure(self) -> None:
        """Let rank 0 know that this rank fails, before a launcher ends the others because of it."""
        if self._store is not None:
            with suppress(RuntimeError):  # the store was rank 0's, and has ended with it
                self._store.set("failed", str(self.rank))

    def has_failed(self) -> bool:
        """Whether a rank has said that it fails."""
        return self._store is not None and bool(self._store.check(["failed"]))

    def come(self) -> None:
        """Let the others know that this rank leaves."""
        if self._store is not None:
            self._store.set(f"here/{self.rank}", "")

    def absent(self, within_s: float) -> list[int]:
        """The ranks that do not `come` in time."""
        end = time.monotonic() + within_s
        while self._store is not None:
            missing = [n for n in range(self.size) if not self._store.check([f"here/{n}"])]
            if not missing or time.monotonic() > end:
                return missing
            time.sleep(0.1)
        return []

    def _telling(self, key: str, function: Callable[[], T]) -> T:
        try:
            value = function()
        except BaseException as error:
            exit_code = 2 if isinstance(error, Refused) else 1
            self._tell(key, {"exit_code": exit_code})
            raise
        self._tell(key, {"value": value})
        return value

    def _told(self, key: str) -> Any:
        told = _loaded(self._store.get(key))  # type: ignore[union-attr]
        self._forget(key)
        if "exit_code" in told:
            raise SystemExit(told["exit_code"])
        return told["value"]

    def _tell(self, key: str, content: Mapping[str, Any]) -> None:
        assert self._store is not None
        self._store.set(key, _dumped(content))

    def _forget(self, key: str) -> None:
        """Take away what all others have read, so that a long run does not fill the store."""
        assert self._store is not None
        if self._store.add(f"{key}/read", 1) == self.size - 1:
            self._store.delete_key(key)
            self._store.delete_key(f"{key}/read")


@cache
def ranks() -> Ranks:
    """The processes this one belongs to: meets the others at the first call, uninterrupted."""
    if not started_elsewhere():
        return Ranks(rank=0, size=1, store=None)
    with importing(), _slurm_tasks_named():
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            keep_to_loopback(os.environ)
        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    return Ranks(rank=rank, size=size, store=PrefixStore("app", store))


def store_at(address: str, *, size: int) -> Any:
    """A store for so many ranks that listens at a free port of this address only: one that torch
    binds listens on all interfaces. Those that torch makes in this process share it."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, 0), family=family)
    port = listener.getsockname()[1]
    return TCPStore(
        address, port, size, True, PATIENCE, wait_for_workers=False, multi_tenant=True,
        master_listen_fd=listener.detach(),
    )  # fmt: skip


def keep_to_loopback(environment: MutableMapping[str, str]) -> None:
    """Let what the ranks of one machine open be for that machine, whatever its name stands for."""
    for library in ("GLOO", "NCCL"):
        environment.setdefault(f"{library}_SOCKET_IFNAME", "lo")


@contextmanager
def _slurm_tasks_named() -> Iterator[None]:
    """Let torch's rendezvous, and Lightning, find tasks that srun started; all meet in the block.

    Rank 0 listens at a free port, and tells it in a file where the job was started: a port made
    from the job's number may be taken.
    """
    if "RANK" in os.environ:
        yield
        return
    rank, size = os.environ["SLURM_PROCID"], os.environ["SLURM_STEP_NUM_TASKS"]
    step = [os.environ.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT")]
    place = Path(os.environ.get("SUBMITIT_FOLDER", ".")) / f".meeting-{'-'.join(step)}"
    if rank == "0":
        address = _address()
        store = store_at(address, size=int(size))
        write_atomically(place, f"{address} {store.port}")
    while not place.exists():
        os.scandir(place.parent).close()  # a shared file system looks again
        time.sleep(0.1)
    address, port = place.read_text().split()
    os.environ |= {
        "RANK": rank,
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "GROUP_RANK": os.environ["SLURM_NODEID"],
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": str(int(size) // int(os.environ["SLURM_STEP_NUM_NODES"])),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }
    yield
    if rank == "0":
        place.unlink()


def _address() -> str:
    """Of this machine, where the others of its step reach it; MASTER_ADDR, where that is set.

    Its own name may stand for a loopback address: it is asked for last.
    """
    if os.environ["SLURM_STEP_NUM_NODES"] == "1":
        return LOOPBACK
    mine = os.environ.get("SLURMD_NODENAME", "")
    names = (os.environ.get("MASTER_ADDR", ""), *_others(mine), mine, socket.gethostname())
    found = (address for name in names if name for address in _towards(name))
    return next((address for address in found if not ip_address(address).is_loopback), LOOPBACK)


def _others(mine: str) -> list[str]:
    """The names of the step's other machines; none where SLURM does not answer."""
    command = ["scontrol", "show", "hostnames", os.environ.get("SLURM_STEP_NODELIST", "")]
    with suppress(OSError, subprocess.CalledProcessError):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [name for name in done.stdout.split() if name != mine]
    return []


def _towards(name: str) -> Iterator[str]:
    """The addresses from which this machine would speak to one of this name; sends nothing."""
    with suppress(OSError):
        for family, kind, _, _, target in sorted(
            socket.getaddrinfo(name, 9, type=socket.SOCK_DGRAM)
        ):
            with suppress(OSError), socket.socket(family, kind) as probe:
                probe.connect(target)
                yield probe.getsockname()[0]


def _dumped(content: Mapping[str, Any]) -> bytes:
    """In torch's format, of which only tensors and plain values are read: no code arrives."""
    import torch

    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    return buffer.getvalue()


def _loaded(content: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(content), weights_only=True)

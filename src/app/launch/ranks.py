"""The processes that train together: which one this is, and what the first tells the others.

They speak through the key-value store of the rendezvous, which is there before any process group
is, and which no thread or device waits in.
"""

import io
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

from app.cli import Refused
from app.folder import what_decides

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long a rank waits for the first one, which may search or read data; a launcher ends it where
the first one has died."""


def started_elsewhere() -> bool:
    """Whether torchrun, srun or `run_local` started this process as one of several. No torch."""
    if {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys():
        return int(os.environ["WORLD_SIZE"]) > 1
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


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
        if not self.is_first:
            told = _loaded(self._store.get(key))  # type: ignore[union-attr]
            self._forget(key)
            if "exit_code" in told:
                raise SystemExit(told["exit_code"])
            value: T = told["value"]
            return value
        try:
            value = function()
        except BaseException as error:
            exit_code = 2 if isinstance(error, Refused) else 1
            self._tell(key, {"exit_code": exit_code})
            raise
        self._tell(key, {"value": value})
        return value

    def gathered(self, value: T) -> list[T]:
        """The values of all ranks, in their order, on every rank: tensors and plain values."""
        if self._store is None:
            return [value]
        key = f"gathered/{self._num_told}"
        self._num_told += 1
        self._store.set(f"{key}/{self.rank}", _dumped({"value": value}))
        return [_loaded(self._store.get(f"{key}/{rank}"))["value"] for rank in range(self.size)]

    def refuse_different(self, config: Mapping[str, Any]) -> None:
        """Raise Refused, naming the keys, where this rank would train another run than rank 0."""
        mine = what_decides(config)
        theirs = self.first(lambda: mine)
        changed = [key for key in sorted({*mine, *theirs}) if mine.get(key) != theirs.get(key)]
        if changed:
            lines = "\n".join(f"  {key}: {theirs.get(key)} -> {mine.get(key)}" for key in changed)
            raise Refused(
                f"rank {self.rank} has another configuration than rank 0:\n{lines}\n"
                "start every rank with the same command"
            )

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
    """The processes this one belongs to: meets the others at the first call.

    Raises Refused where srun started several tasks and the address of the first is not known.
    """
    if not started_elsewhere():
        return Ranks(rank=0, size=1, store=None)
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    _name_slurm_tasks()
    store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    return Ranks(rank=rank, size=size, store=PrefixStore("app", store))


def _name_slurm_tasks() -> None:
    """Let torch's rendezvous find tasks that srun started, where Lightning will look for them."""
    if "RANK" in os.environ:
        return
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    slurm = SLURMEnvironment(auto_requeue=False)
    os.environ |= {
        "RANK": str(slurm.global_rank()),
        "LOCAL_RANK": str(slurm.local_rank()),
        "WORLD_SIZE": str(slurm.world_size()),
        "LOCAL_WORLD_SIZE": os.environ.get("SLURM_NTASKS_PER_NODE", str(slurm.world_size())),
        "MASTER_ADDR": slurm.main_address,
        "MASTER_PORT": str(slurm.main_port),
    }


def _dumped(content: Mapping[str, Any]) -> bytes:
    """In torch's format, of which only tensors and plain values are read: no code arrives."""
    import torch

    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    return buffer.getvalue()


def _loaded(content: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(content), weights_only=True)

"""The devices of this machine that a queue hands out to jobs. Needs no torch."""

import os
from collections.abc import Mapping
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any

from omegaconf import DictConfig

from app.config import is_single
from app.errors import Refused

VISIBLE = "CUDA_VISIBLE_DEVICES"


class Slots:
    """Devices, of which each is used by one job at a time.

    Args:
        names: what `CUDA_VISIBLE_DEVICES` calls them, or numbers of cores.
        are_gpus: whether a job sees only its own.
    """

    def __init__(self, names: list[str], *, are_gpus: bool) -> None:
        self.names = names
        self.are_gpus = are_gpus
        self._free = list(names)

    def needed(self, cfg: DictConfig, *, devices_per_job: int | None) -> int:
        """How many a job takes.

        Raises Refused where it needs more GPUs than there are, or than it would get.
        """
        asked = cfg.trainer.devices
        if asked == "auto":
            needs_one = is_single(cfg.strategy) or not self.are_gpus
            asked = 1 if needs_one else devices_per_job or len(self.names)
        if devices_per_job is not None and devices_per_job < asked:
            raise Refused(
                f"launch.devices_per_job must be >= trainer.devices={asked}, got "
                f"{devices_per_job}; type launch.devices_per_job=null"
            )
        wanted = int(devices_per_job or asked)
        if self.are_gpus and wanted > len(self.names):
            key = "trainer.devices" if devices_per_job is None else "launch.devices_per_job"
            raise Refused(
                f"{key} must be <= {len(self.names)}, the GPUs that the queue has, got {wanted}; "
                f"type {key}={len(self.names)}"
            )
        return min(wanted, len(self.names))  # cores can be shared

    def take(self, number: int) -> list[str] | None:
        """So many devices; None while they are not free."""
        if number > len(self._free):
            return None
        taken, self._free = self._free[:number], self._free[number:]
        return taken

    def give_back(self, names: list[str]) -> None:
        """Let other jobs have them."""
        free = {*self._free, *names}
        self._free = [name for name in self.names if name in free]

    def environment(self, names: list[str]) -> dict[str, str]:
        """The environment of a job that has these devices, and on cores as many threads."""
        if self.are_gpus:
            return {**os.environ, VISIBLE: ",".join(names)}
        return {"OMP_NUM_THREADS": str(len(names)), **os.environ}


def find_slots(*, asked: int | None, accelerator: str, context: BaseContext) -> Slots:
    """The devices of this machine: GPUs, or cores where there are none or none are wanted.

    Raises Refused where fewer GPUs are there than are asked for.
    """
    gpus = [] if accelerator == "cpu" else _gpus(context)
    if gpus:
        if asked is not None and asked > len(gpus):
            raise Refused(
                f"launch.slots must be <= {len(gpus)}, the GPUs of this machine, got {asked}; "
                "type launch.slots=null"
            )
        return Slots(gpus[:asked], are_gpus=True)
    num_cores = len(os.sched_getaffinity(0)) if asked is None else asked
    return Slots([str(number) for number in range(num_cores)], are_gpus=False)


def _gpus(context: BaseContext) -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` calls the GPUs: a child counts them, so that this process and
    those forked for the jobs never start CUDA."""
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_count, args=(sender, dict(os.environ)))  # type: ignore[attr-defined]
    child.start()
    sender.close()
    count = receiver.recv()
    child.join()
    visible = os.environ.get(VISIBLE)
    names = map(str, range(count)) if visible is None else visible.split(",")
    return list(names)[:count]


def _send_count(sender: "Connection[int, Any]", environment: Mapping[str, str]) -> None:
    import torch

    os.environ.update(environment)
    sender.send(torch.cuda.device_count())

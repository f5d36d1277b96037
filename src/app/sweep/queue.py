"""The launcher of `launch=local`: the jobs of a sweep, a queue over devices. Needs no torch."""

import multiprocessing
import signal
from collections.abc import Sequence
from multiprocessing import forkserver

from hydra.core.config_loader import ConfigLoader
from hydra.core.utils import JobReturn
from hydra.types import TaskFunction
from omegaconf import DictConfig

from app.launch.local import PRELOADED
from app.sweep.batch import Batch
from app.sweep.journal import Job
from app.sweep.progress import Progress
from app.sweep.runner import Runner
from app.sweep.slots import find_slots


class Queue:
    """A queue over the devices of this machine, for one sweep.

    Args:
        loader, task, config: of `Batch`.

    Raises Refused where the sweep's folder is held, or holds another sweep.
    """

    def __init__(self, *, loader: ConfigLoader, task: TaskFunction, config: DictConfig) -> None:
        self._batch = Batch(loader=loader, task=task, config=config)
        self._settings = self._batch.settings
        self._context = multiprocessing.get_context(self._settings.start_method.value)
        if self._settings.start_method.value == "forkserver":
            multiprocessing.set_forkserver_preload(PRELOADED)
            forkserver.ensure_running()  # imports torch while the sweeper composes the jobs

    def launch(self, job_overrides: Sequence[Sequence[str]]) -> Sequence[JobReturn]:
        """Run what is not finished of a batch; the values of all its jobs.

        Raises SystemExit where the sweep was interrupted: 128 and the signal.
        """
        return self._batch.launch(job_overrides, self._run)

    def _run(
        self, jobs: Sequence[Job], todo: list[Job], progress: Progress
    ) -> signal.Signals | None:
        slots = find_slots(
            asked=self._settings.slots,
            accelerator=self._batch.config.trainer.accelerator.value,
            context=self._context,
        )
        unit = "GPU" if slots.are_gpus else "CPU slot"
        progress.say(f"{len(slots.names)} {unit}{'s' if len(slots.names) > 1 else ''}")
        runner = Runner(
            folder=self._batch.folder,
            settings=self._settings,
            slots=slots,
            progress=progress,
            context=self._context,
            task=self._batch.task,
            compose=self._batch.composed,
        )
        return runner.run(todo)

"""What Hydra finds of this project: it starts launchers of this package only.

Every command imports this file, so all that a queue needs is imported when there is one.
"""

from collections.abc import Sequence

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class Queue(Launcher):
    """The launcher of `launch=local`."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Hold the folder of the sweep."""
        from app.sweep.queue import Queue

        self._queue = Queue(loader=hydra_context.config_loader, task=task_function, config=config)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run a batch of jobs; numbers are those that the folder knows."""
        return self._queue.launch(job_overrides)

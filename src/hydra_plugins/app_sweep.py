"""What Hydra finds of this project: it starts launchers and sweepers of this package only.

Every command imports this file, so all that a sweep needs is imported when there is one.
"""

from collections.abc import Mapping, Sequence

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class Jobs(Launcher):
    """The launcher of `launch=local` and `launch=slurm`."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Hold the folder of the sweep."""
        from app.config import is_slurm
        from app.sweep import cluster, queue

        kind = cluster.Cluster if is_slurm(config.launch) else queue.Queue
        self._launcher = kind(context=hydra_context, task=task_function, config=config)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run a batch of jobs; numbers are those that the folder knows."""
        return self._launcher.launch(job_overrides)


class Study(Sweeper):
    """The sweeper of `sweep=optuna`."""

    def __init__(self, *, params: Mapping[str, str] | None) -> None:
        self._params = params

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Hold the folder of the study."""
        from app.sweep.study import Trials

        self._trials = Trials(
            params=self._params, context=hydra_context, task=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the trials that are left."""
        self._trials.run(arguments)

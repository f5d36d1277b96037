"""What Hydra finds of this project: it starts launchers of this package only.

Every command imports this file, so all that a cluster needs is imported when there is one.
"""

from collections.abc import Sequence

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class Slurm(Launcher):
    """The launcher of `launch=slurm`."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Hold the folder of the sweep."""
        from app.sweep.cluster import Cluster

        self._cluster = Cluster(
            loader=hydra_context.config_loader, task=task_function, config=config
        )

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Submit a batch of jobs; numbers are those that the folder knows."""
        return self._cluster.launch(job_overrides)

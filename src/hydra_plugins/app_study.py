"""What Hydra finds of this project: it starts sweepers of this package only.

Every command imports this file, so all that a study needs is imported when there is one.
"""

from collections.abc import Mapping

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class Study(Sweeper):
    """The sweeper of `sweep=optuna`."""

    def __init__(self, *, params: Mapping[str, str] | None) -> None:
        self._params = params

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Hold the folder of the study."""
        from app.sweep.study import Study

        self._study = Study(params=self._params, config=config)
        self._study.setup(hydra_context=hydra_context, task_function=task_function)

    def sweep(self, arguments: list[str]) -> None:
        """Run the trials that are left."""
        self._study.sweep(arguments)

"""What each tracker is told of a run: at the start what it is, at the end what it came to."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from omegaconf import OmegaConf

from app.config import flat
from app.logger.tracker import Tracker, in_a_line
from app.process.ranks import ranks
from app.record.loggers import NoLogger
from app.record.states import State

FILES = ("config.yaml", "overrides.yaml", "tuned.yaml", "metrics.csv", "result.json", "curves.png")
"""Those of a run's folder that its trackers keep."""

ENDS = {State.finished: "FINISHED", State.failed: "FAILED"}
"""What MLflow calls the ends of a run; all others are KILLED."""

OF_THE_END = "result/"
"""Begins the names of what was measured of the delivered checkpoint, where these would be points
of a curve."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run came to.

    Attributes:
        config: flat, as it was resolved.
        metrics: those of result.json; empty where there are none.
    """

    state: State
    config: Mapping[str, Any]
    metrics: Mapping[str, float]
    folder: Path
    checkpoint: str | None

    def files(self, logger: Logger) -> list[Path]:
        """What a tracker keeps."""
        names = [*FILES]
        if self.checkpoint is not None and getattr(logger, "checkpoints", False):
            names.append(self.checkpoint)
        return [self.folder / name for name in names if (self.folder / name).is_file()]


class Tracking(pl.Callback):
    """Tells the trackers, those of the user too, what a run is, as training starts.

    Args:
        facts: returns what is known by then beside the configuration.

    Attributes:
        loggers: of the run, once it is built.
    """

    def __init__(
        self, config: Mapping[str, Any], folder: Path, facts: Callable[[], dict[str, Any]]
    ) -> None:
        self.loggers: Sequence[Logger] = ()
        self._config = config
        self._folder = folder
        self._facts = facts

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                text = OmegaConf.to_yaml(OmegaConf.create(dict(self._config)))
                logger.experiment.add_text("config", f"```yaml\n{text}```")
            if not isinstance(logger, NoLogger):
                logger.log_hyperparams({**flat(self._config), **self._facts()})

    @contextmanager
    def told(self, result: Mapping[str, Any]) -> Iterator[None]:
        """Tell the trackers at the end what the run came to, also where it raises.

        Args:
            result: the content of result.json, complete by then.
        """
        try:
            yield
        finally:
            if ranks().is_first:
                self._tell_end(result)

    def _tell_end(self, result: Mapping[str, Any]) -> None:
        delivered = result.get("checkpoints", {})
        outcome = Outcome(
            state=State(result["status"]),
            config={**flat(self._config), **self._facts()},
            metrics=result.get("metrics", {}),
            folder=self._folder,
            checkpoint=delivered.get("best") or delivered.get("last"),
        )
        for logger in self.loggers:
            end = next((end for kind, end in END.items() if isinstance(logger, kind)), None)
            if end is None or (isinstance(logger, Tracker) and not logger.try_again()):
                continue
            try:
                end(logger, outcome)
            except Exception as error:  # a tracker fails no run
                said = f"{type(logger).__name__} was not told how the run ends"
                print(f"{said}: {in_a_line(error)}", flush=True)


def _end_tensorboard(logger: Any, outcome: Outcome) -> None:
    metrics = {f"{OF_THE_END}{name}": value for name, value in outcome.metrics.items()}
    if metrics:
        logger.log_hyperparams(dict(outcome.config), metrics)
        logger.experiment.flush()


def _end_wandb(logger: Any, outcome: Outcome) -> None:
    run = logger.experiment
    run.summary.update({**outcome.metrics, "status": str(outcome.state)})
    for file in outcome.files(logger):  # copies: the folder may be moved before they are synced
        path = Path(run.dir, "run", file.name)  # not beside W&B's own config.yaml
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, path)
        run.save(str(path), base_path=run.dir, policy="now")
    run.finish(exit_code=int(outcome.state is not State.finished))


def _end_mlflow(logger: Any, outcome: Outcome) -> None:
    client, run_id = logger.experiment, logger.run_id
    logger.log_metrics({f"{OF_THE_END}{name}": value for name, value in outcome.metrics.items()})
    for file in outcome.files(logger):
        client.log_artifact(run_id, str(file))
    client.set_tag(run_id, "status", str(outcome.state))
    client.set_terminated(run_id, ENDS.get(outcome.state, "KILLED"))


END: Mapping[type[Logger], Callable[[Any, Outcome], None]] = {
    TensorBoardLogger: _end_tensorboard,
    WandbLogger: _end_wandb,
    MLFlowLogger: _end_mlflow,
}
"""How a tracker is told, by the logger of Lightning's that it is: also one that the user adds."""

"""Where the metrics of a run go: into its folder, and to a tracker that compares many runs.

| preset      | writes                                                                       |
|-------------|------------------------------------------------------------------------------|
| default     | metrics.csv, and for TensorBoard where it is installed                       |
| csv         | metrics.csv                                                                  |
| tensorboard | files for TensorBoard                                                        |
| wandb       | metrics.csv, and a run of Weights & Biases; offline where there is no login  |
| mlflow      | metrics.csv, and a run of MLflow; in ./mlflow.db where no server is named    |
| many        | all four                                                                     |
| custom      | metrics.csv, and any Logger: logger._target_=theirs.Logger                   |

A tracker, also one of the user's, gets once in a run the flat configuration as it was resolved, the
number of trained parameters, the git commit, and the effective batch. At the end TensorBoard's,
W&B's and MLflow's get what result.json says: metrics, state, and the files of the run. A run that
is continued goes on in the tracker as the same run; `trackers.json` holds its id. The jobs of a
sweep are a group. Searches and evaluations are not tracked.

A tracker that fails at the start ends the run, before a step is lost; one that fails later does
not: it is said in a line, and metrics.csv has all. What logs in is never in a configuration, which
is written to files: `wandb login`, or WANDB_API_KEY; MLFLOW_TRACKING_TOKEN and the like.

A model's `self.logger` is the first that is not ours: TensorBoard's, or one added with
+logger.mine._target_=theirs.Logger. With metrics.csv alone, `self.logger.experiment` takes figures,
texts and all else, and leaves them out; with logger=none, in a search and in an evaluation, all is
left out. `trainer.log_dir` is in the run's folder.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from omegaconf import MISSING

from ..rules import RULE, Name, folder, require_package, text

IN_THE_RUN = "type '{key}=${{run_dir}}'"


@dataclass(kw_only=True)
class MetricsCsv:
    """A line per logged optimizer step."""

    _target_: str = "app.record.loggers.MetricsCsv"
    save_dir: str = folder(instead=IN_THE_RUN)
    """Folder of the file."""


@dataclass(kw_only=True)
class TensorBoardWhereInstalled:
    """Event files, or none; look at them with `tensorboard --logdir runs`."""

    _target_: str = "app.logger.tensorboard_where_installed"
    save_dir: str = folder(instead=IN_THE_RUN)
    """Folder above the files."""
    name: str = field(default=MISSING, metadata={RULE: Name("type {key}=tensorboard")})
    """Folder of the files, below save_dir."""
    version: str = MISSING
    """Folder below name; empty = none."""


@dataclass(kw_only=True)
class TensorBoard(TensorBoardWhereInstalled):
    """Event files; look at them with `tensorboard --logdir runs`."""

    _target_: str = "app.logger.TensorBoard"

    def __post_init__(self) -> None:
        require_package("tensorboard", "logger.tensorboard", "use logger=csv")


@dataclass(kw_only=True)
class Wandb:
    """Weights & Biases; look at runs that were offline after `wandb sync runs/NAME/wandb/*run*`."""

    _target_: str = "app.logger.Wandb"
    save_dir: str = folder(instead=IN_THE_RUN)
    """Folder of its files."""
    project: str | None = text(instead="type {key}=mine, or {key}=null")
    """null = WANDB_PROJECT, or else the folder that the command was typed in."""
    entity: str | None = text(instead="type {key}=TEAM, or {key}=null")
    """User or team; null = WANDB_ENTITY, or else the one that is logged in."""
    name: str | None = text(instead="type {key}=mine, or {key}=null")
    """Of the run; null = its folder, and that of the sweep, if it is a job of one."""
    group: str | None = text(instead="type {key}=mine, or {key}=null")
    """null = WANDB_RUN_GROUP, or else the folder of the sweep, if the run is a job of one."""
    tags: list[str] = MISSING
    """Of the run."""
    offline: bool | None = MISSING
    """Whether to write files only; null = WANDB_MODE, or else where there is no login."""
    checkpoints: bool = MISSING
    """Whether the checkpoint that is delivered is among the files of the run."""

    def __post_init__(self) -> None:
        require_package("wandb", "logger.wandb", "type logger.wandb=null")


@dataclass(kw_only=True)
class MLFlow:
    """MLflow; look at local runs with `mlflow ui --backend-store-uri sqlite:///mlflow.db`."""

    _target_: str = "app.logger.MLFlow"
    save_dir: str = folder(instead=IN_THE_RUN)
    """Folder of the run."""
    tracking_uri: str | None = text(instead="type {key}=http://HOST:5000, or {key}=null")
    """null = MLFLOW_TRACKING_URI, or else mlflow.db where the command was typed."""
    experiment_name: str | None = text(instead="type {key}=mine, or {key}=null")
    """null = MLFLOW_EXPERIMENT_NAME, or else the folder that the command was typed in."""
    run_name: str | None = text(instead="type {key}=mine, or {key}=null")
    """Of the run; null = its folder, and that of the sweep, if it is a job of one."""
    group: str | None = text(instead="type {key}=mine, or {key}=null")
    """The tag `group`; null = the folder of the sweep, if the run is a job of one."""
    tags: dict[str, str] = MISSING
    """Of the run."""
    checkpoints: bool = MISSING
    """Whether the checkpoint that is delivered is among the files of the run."""

    def __post_init__(self) -> None:
        require_package("mlflow", "logger.mlflow", "type logger.mlflow=null")
        if self.tracking_uri is None or self.tracking_uri.startswith("sqlite"):
            require_package("alembic", "logger.mlflow", "type logger.mlflow.tracking_uri=URI")


@dataclass(kw_only=True)
class Loggers:
    """Loggers by name; add one with +logger.mine._target_=theirs.Logger."""

    _takes_others_: ClassVar[bool] = True

    csv: MetricsCsv | None = None
    tensorboard: TensorBoard | None = None
    wandb: Wandb | None = None
    mlflow: MLFlow | None = None


@dataclass(kw_only=True)
class DefaultLoggers:
    """Likewise."""

    _takes_others_: ClassVar[bool] = True

    csv: MetricsCsv | None = None
    tensorboard: TensorBoardWhereInstalled | None = None


PRESETS = {
    "default": DefaultLoggers,
    "csv": Loggers,
    "tensorboard": Loggers,
    "wandb": Loggers,
    "mlflow": Loggers,
    "many": Loggers,
}

"""Where the metrics of a run go. Everything is in the run's folder.

| preset      | writes                                                 |
|-------------|--------------------------------------------------------|
| default     | metrics.csv, and for TensorBoard where it is installed |
| csv         | metrics.csv                                            |
| tensorboard | files for TensorBoard                                  |

A model's `self.logger` is the first that is not ours: TensorBoard's, or one added with
+logger.mine._target_=theirs.Logger. With metrics.csv alone, `self.logger.experiment` takes figures,
texts and all else, and leaves them out; with logger=none, in a search and in an evaluation, all is
left out. `trainer.log_dir` is in the run's folder.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from omegaconf import MISSING

from ..rules import RULE, Name, folder, require_package

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

    _target_: str = "app.record.loggers.tensorboard_where_installed"
    save_dir: str = folder(instead=IN_THE_RUN)
    """Folder above the files."""
    name: str = field(default=MISSING, metadata={RULE: Name("type {key}=tensorboard")})
    """Folder of the files, below save_dir."""
    version: str = MISSING
    """Folder below name; empty = none."""


@dataclass(kw_only=True)
class TensorBoardLogger(TensorBoardWhereInstalled):
    """Event files; look at them with `tensorboard --logdir runs`."""

    _target_: str = "lightning.pytorch.loggers.TensorBoardLogger"

    def __post_init__(self) -> None:
        require_package("tensorboard", "logger=tensorboard", "use logger=csv")


@dataclass(kw_only=True)
class Loggers:
    """Loggers by name; add one with +logger.mine._target_=theirs.Logger."""

    _takes_others_: ClassVar[bool] = True

    csv: MetricsCsv | None = None
    tensorboard: TensorBoardLogger | None = None


@dataclass(kw_only=True)
class DefaultLoggers:
    """Likewise."""

    _takes_others_: ClassVar[bool] = True

    csv: MetricsCsv | None = None
    tensorboard: TensorBoardWhereInstalled | None = None


PRESETS = {"default": DefaultLoggers, "csv": Loggers, "tensorboard": Loggers}

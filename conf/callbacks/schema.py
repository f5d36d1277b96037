"""What happens beside the training: checkpoints, early stopping, progress.

| preset         | callbacks                                         |
|----------------|---------------------------------------------------|
| default        | checkpoints and progress                          |
| early_stopping | those, and an end when validation improves no more |

Add one with +callbacks.mine._target_=theirs.Callback.
"""

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from ..rules import require


class Mode(str, Enum):
    """Whether a metric is better when smaller or larger."""

    min = "min"
    max = "max"


@dataclass(kw_only=True)
class Checkpoints:
    """Keep the best checkpoint, the last one, and the one before the last."""

    _target_: str = "app.checkpoint.Checkpoints"
    dirpath: str = MISSING
    """Folder of the checkpoints."""
    monitor: str | None = MISSING
    """Metric of the validation that decides which is best; null keeps no best one."""
    mode: Mode = MISSING
    """min or max: which values of the metric are better."""
    every_n_steps: int | None = MISSING
    """Also after this many optimizer steps, >= 1; null = at the epochs' ends."""
    every_min: float | None = MISSING
    """Also after this many minutes, > 0; null = at the epochs' ends."""

    def __post_init__(self) -> None:
        for key in ("every_n_steps", "every_min"):
            value = getattr(self, key)
            require(
                value is None or value > 0,
                f"callbacks.checkpoint.{key}",
                "be > 0",
                value,
                f"for the epochs' ends only type callbacks.checkpoint.{key}=null",
            )


@dataclass(kw_only=True)
class EarlyStopping:
    """End the run when a metric has not improved for some validations."""

    _target_: str = "lightning.pytorch.callbacks.EarlyStopping"
    monitor: str = MISSING
    """Metric of the validation."""
    mode: Mode = MISSING
    """min or max: which values of the metric are better."""
    patience: int = MISSING
    """Validations without an improvement, >= 1."""
    min_delta: float = MISSING
    """Smallest change that counts as an improvement, >= 0."""

    def __post_init__(self) -> None:
        key = "callbacks.early_stopping"
        require(
            self.patience >= 1,
            f"{key}.patience",
            "be >= 1",
            self.patience,
            f"type {key}.patience=5",
        )
        require(
            self.min_delta >= 0,
            f"{key}.min_delta",
            "be >= 0",
            self.min_delta,
            f"type {key}.min_delta=0",
        )


@dataclass(kw_only=True)
class Progress:
    """A line per epoch, and in a terminal a bar below."""

    _target_: str = "app.progress.progress"
    refresh_every_n_batches: int = MISSING
    """How often the bar is drawn, >= 1."""

    def __post_init__(self) -> None:
        key = "callbacks.progress.refresh_every_n_batches"
        require(
            self.refresh_every_n_batches >= 1,
            key,
            "be >= 1",
            self.refresh_every_n_batches,
            f"type {key}=20",
        )


@dataclass(kw_only=True)
class Callbacks:
    """Callbacks by name."""

    checkpoint: Checkpoints | None = None
    early_stopping: EarlyStopping | None = None
    progress: Progress | None = None


PRESETS = {"default": Callbacks, "early_stopping": Callbacks}

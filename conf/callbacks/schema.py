"""What happens beside the training: checkpoints, early stopping, progress, a summary of the model.

| preset         | callbacks                                         |
|----------------|---------------------------------------------------|
| default        | checkpoints and progress                          |
| early_stopping | those, and an end when validation improves no more |
| summary        | those of default, and the model's layers at the start |
| custom         | the default ones, and one of yours                |

Add one with callbacks=custom callbacks.custom._target_=theirs.Callback, more with
+callbacks.mine._target_=theirs.Callback, or in `configure_callbacks` of a model; one
derived from a class here takes its place there. Lightning's own techniques, such as
EMAWeightAveraging, are refused: ours would know nothing of them.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

from omegaconf import MISSING

from ..rules import MANY, RULE, TEN_YEARS_MIN, Template, count, folder, number, require, text

AT_THE_ENDS = "for the epochs' ends only type {key}=null"

AS_TEMPLATE = "type '{key}=\"epoch={{epoch}}-{{val_loss:.3f}}\"'"

Mode = StrEnum("Mode", "min max")
"""Whether a metric is better when smaller or larger."""


@dataclass(kw_only=True)
class Checkpoints:
    """Keep the best checkpoint, the last one, and the one before the last."""

    _target_: str = "app.run.checkpoint.Checkpoints"
    dirpath: str = folder(instead="type '{key}=${{run_dir}}/checkpoints'")
    """Folder of the checkpoints."""
    monitor: str | None = text(instead="to keep no best one type {key}=null")
    """Metric that decides which is best, after a validation that measures it or after the epoch;
    null keeps no best one."""
    mode: Mode | None = None
    """min or max: which values of the metric are better; null = by its name, such as val_acc."""
    top_k: int | None = number(above=0, at_most=MANY, instead="to keep all type {key}=null")
    """How many of the best are kept, >= 1; null = all. best.ckpt is the best of them."""
    filename: str | None = field(default=MISSING, metadata={RULE: Template(AS_TEMPLATE)})
    """Their name, with fields for {epoch}, which counts from 1, {step} and metrics, as in
    'epoch={epoch}-{val_loss:.3f}'; null = best.ckpt, and of several 'epoch={epoch}-step={step}'."""
    every_n_steps: int | None = number(above=0, at_most=MANY, instead=AT_THE_ENDS)
    """Also after this many optimizer steps, >= 1; null = at the epochs' ends."""
    every_min: float | None = number(above=0, at_most=TEN_YEARS_MIN, instead=AT_THE_ENDS)
    """Also after this many minutes, > 0; null = at the epochs' ends."""
    keep_every_n_steps: int | None = number(
        above=0, at_most=MANY, instead="for none type {key}=null"
    )
    """Also after this many optimizer steps, >= 1, and kept as step=N.ckpt, from which `branch_of`
    begins; null = none. Each takes the room of last.ckpt; raise it where that is much."""

    def __post_init__(self) -> None:
        require(
            self.keep_every_n_steps is None or self.filename != "step={step}",
            f"callbacks.checkpoint.filename must not be {self.filename}, the name of those of "
            "callbacks.checkpoint.keep_every_n_steps; type callbacks.checkpoint.filename=null",
        )
        for key, value, default in (("top_k", self.top_k, 1), ("filename", self.filename, None)):
            require(
                self.monitor is not None or value == default,
                f"callbacks.checkpoint.{key} has no effect: callbacks.checkpoint.monitor is null, "
                "which keeps no best one; type callbacks.checkpoint.monitor=val_loss",
            )


@dataclass(kw_only=True)
class EarlyStopping:
    """End the run when a metric has not improved for some validations."""

    _target_: str = "lightning.pytorch.callbacks.EarlyStopping"
    monitor: str | None = text(instead="type {key}=val_loss")
    """Metric of the validation or the training; null = that of the checkpoints."""
    mode: Mode | None = None
    """min or max: which values of the metric are better; null = as the checkpoints, or by name."""
    check_on_train_epoch_end: bool | None = None
    """true = after the epoch, false = after the validation; null = as Lightning does, and after the
    epoch where the metric is named train."""
    patience: int = count(instead="type {key}=5")
    """Validations without an improvement, >= 1."""
    min_delta: float = number(at_least=0, at_most=MANY, instead="type {key}=0")
    """Smallest change that counts as an improvement, >= 0."""


@dataclass(kw_only=True)
class Progress:
    """A line per epoch, and in a terminal a bar below."""

    _target_: str = "app.run.progress.progress"
    refresh_every_n_batches: int = count(instead="type {key}=20")
    """How often the bar is drawn, >= 1."""


@dataclass(kw_only=True)
class Summary:
    """The layers of the model with their parameters, printed when training starts."""

    _target_: str = "app.screen.summary.summary"
    max_depth: int = number(at_least=-1, at_most=MANY, instead="for all of them type {key}=-1")
    """Levels of modules in modules, >= 0; 0 = no summary, -1 = all."""


@dataclass(kw_only=True)
class Callbacks:
    """Callbacks by name."""

    _takes_others_: ClassVar[bool] = True

    checkpoint: Checkpoints | None = None
    early_stopping: EarlyStopping | None = None
    progress: Progress | None = None


@dataclass(kw_only=True)
class WithSummary(Callbacks):
    """Callbacks by name; elsewhere `summary` is a name like others."""

    summary: Summary | None = None


@dataclass(kw_only=True)
class WithOne(Callbacks):
    """Callbacks by name, of which one has to be named by its class."""

    custom: Any = MISSING
    """Any callback: `callbacks.custom._target_=theirs.Callback`, and what it takes."""


PRESETS = {
    "default": Callbacks,
    "early_stopping": Callbacks,
    "summary": WithSummary,
    "custom": WithOne,
}

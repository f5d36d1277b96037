"""Finders: search the micro-batch and the learning rate before the fit, then run with the answers.

A finder is a function from a configuration to overrides: it probes throwaway objects, and the run
is built as if the overrides had been typed. Answers are kept in the run's `tuned.yaml` and, by what
decides them, in `tuner.cache`: a continued run and a sweep do not search again.

A search trains with the techniques and callbacks of the fit; loggers, checkpoints, what ends a fit
early, and all schedules of the rate, the model's too, are off. A larger batch leaves fewer
optimizer steps in the same epochs, so that a run tuned to the memory alone often ends below the one
it came from. `full` therefore keeps the effective batch: the micro-batches are divisors of the
batch typed, and accumulation makes up for a smaller one. `batch_size` answers the largest that
fits, for those who ask for just that, and moves the rate with the root of the batch (arXiv
1404.5997, and for Adam 2205.10287), which errs on the safe side for SGD. What changes is said in a
line. A key that changes nothing is said, and stays.

| preset     | what it searches                                                   | source      |
|------------|--------------------------------------------------------------------|-------------|
| batch_size | the largest micro-batch that fits, or the smallest that is as fast |             |
| lr_find    | the learning rate: a range test of some hundred optimizer steps    | 1506.01186  |
| full       | both, in that order                                                |             |
| milestones | the learning rate, before the fit and again inside, at given epochs |            |

Sources are arXiv numbers.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from omegaconf import MISSING

from ..rules import LARGEST_RATE, MANY, count, folder, number, require, text

BatchMode = StrEnum("BatchMode", "auto model power binsearch")
"""How to look for the largest size."""

Goal = StrEnum("Goal", {"largest": "largest", "fastest": "fastest"})
"""Which of the sizes that fit is the answer."""

SweepMode = StrEnum("SweepMode", "exponential linear")
"""The spacing of the learning rates."""

LrRule = StrEnum("LrRule", "slope valley minimum steepest")
"""Which learning rate of a curve is the answer."""

Effective = StrEnum("Effective", "keep root ignore")
"""What becomes of the effective batch where the micro-batch changes."""

OnDoubt = StrEnum("OnDoubt", "keep use")
"""What to do where the curve gives no clear answer."""


@dataclass(kw_only=True)
class BatchSize:
    """The search for the micro-batch."""

    key: str | None = text(instead="type {key}=null")
    """Key to tune; null = data.batch_size, else model.batch_size."""
    mode: BatchMode = MISSING
    """auto = model where the device reports its memory, else binsearch; model predicts from the
    memory of two sizes and confirms from both sides; power doubles; binsearch doubles, then
    bisects."""
    goal: Goal = MISSING
    """largest, or fastest: the smallest within 3 % of the most samples per second."""
    effective: Effective = MISSING
    """keep = micro-batch x accumulation stays the batch typed, root = the learning rate moves with
    the root of the batch where no finder of it follows, ignore = only the micro-batch changes."""
    init_val: int = count(instead="type {key}=1")
    """First size tried, >= 1."""
    max_val: int | None = count(instead="type {key}=1")
    """Largest size allowed, >= 1; null = the data set."""
    min_batches: int = count(instead="type {key}=1")
    """Micro-batches that an epoch must have at least, >= 1: a run of few steps learns little."""
    max_trials: int = count(at_most=10_000, instead="type {key}=1")
    """Sizes tried, >= 1."""
    steps_per_trial: int = count(at_least=2, at_most=100_000, instead="type {key}=2")
    """Optimizer steps of each trial, >= 2: the second one has the optimizer's state."""
    margin: float = number(
        at_least=0, below=1, rule="be from 0 to below 1", instead="type {key}=0.0"
    )
    """Share taken off the largest size that fits, 0 to below 1."""
    memory_fraction: float = number(
        above=0, at_most=1, rule="be above 0, up to 1", instead="type {key}=0.9"
    )
    """Share of the device's memory that may be used, above 0 to 1."""

    def __post_init__(self) -> None:
        require(
            self.max_val is None or self.init_val <= self.max_val,
            f"tuner.batch_size.init_val must be at most tuner.batch_size.max_val={self.max_val}, "
            f"got {self.init_val}; type tuner.batch_size.init_val=1",
        )


@dataclass(kw_only=True)
class LearningRate:
    """The range test."""

    key: Any = MISSING
    """Key to tune, or a list with one for each optimizer of the model; null = optimizer.lr, else
    model.lr or model.learning_rate."""
    lowest: float = number(above=0, at_most=LARGEST_RATE, instead="type {key}=1e-7")
    """First learning rate, > 0."""
    highest: float = number(above=0, at_most=LARGEST_RATE, instead="type {key}=10.0")
    """Last learning rate, above the first."""
    num_steps: int = count(at_least=10, at_most=1_000_000, instead="type {key}=100")
    """Optimizer steps of the sweep, >= 10."""
    mode: SweepMode = MISSING
    """exponential or linear spacing."""
    divergence: float = number(above=0, at_most=MANY, instead="type {key}=4")
    """Stop where the loss is above its best by this many times the range seen so far, > 0."""
    rule: LrRule = MISSING
    """slope, valley, minimum or steepest; all are drawn."""
    on_doubt: OnDoubt = MISSING
    """keep the configured rate, or use the suggestion, where the curve gives no clear answer."""

    def __post_init__(self) -> None:
        keys = self.key if isinstance(self.key, list) else [self.key]
        require(
            all(name is None or isinstance(name, str) for name in keys),
            f"tuner.lr.key must be a key, or a list of keys, got {self.key}; type "
            "tuner.lr.key=optimizer.lr",
        )
        require(
            self.highest > self.lowest,
            f"tuner.lr.highest must be above tuner.lr.lowest={self.lowest}, got {self.highest}; "
            f"type tuner.lr.highest={self.lowest * 1e6:g}",
        )


@dataclass(kw_only=True)
class Tuner:
    """The finders of a run: those that are not null run before it, batch size first."""

    batch_size: BatchSize | None = None
    lr: LearningRate | None = None
    milestones: list[int] = count(instead="type '{key}=[5,10]'")
    """Epochs, > 0, at whose start the finders that are on search again, inside the fit."""
    cache: str | None = folder(instead="for no cache type {key}=null")
    """Folder of the answers of all runs; null = search in every new run."""

    def __post_init__(self) -> None:
        require(
            self.milestones == sorted(set(self.milestones)),
            f"tuner.milestones must be rising epochs > 0, got {self.milestones}; type "
            "'tuner.milestones=[5,10]'",
        )
        require(
            not self.milestones or self.lr is not None or self.batch_size is not None,
            f"tuner.milestones must have a finder, got {self.milestones}; use tuner=milestones",
        )


PRESETS = dict.fromkeys(("batch_size", "lr_find", "full", "milestones"), Tuner)

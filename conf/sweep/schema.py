"""How a sweep chooses its jobs: all that was typed, or a search for the best value of `objective`.

A search is a study: its trials are the jobs of a sweep. It is kept in `study.db` in the folder of
the sweep, and the same command with the same `name=` continues it. The space is what is swept on
the command line: `optimizer.lr=tag(log,interval(1e-3,1))`, `averaging=none,ema`.

| preset | what it does                                                                     |
|--------|----------------------------------------------------------------------------------|
| optuna | Optuna's samplers, each trial chosen by those before it                          |
"""

from dataclasses import dataclass
from enum import StrEnum

from omegaconf import MISSING

from ..rules import MANY, count, number, require, require_package

Sampler = StrEnum("Sampler", "tpe cmaes random")
"""How a trial is chosen."""

Pruner = StrEnum("Pruner", "median halving none")
"""How a trial is ended early."""


@dataclass(kw_only=True)
class Optuna:
    """A search with Optuna."""

    num_trials: int = count(at_most=1_000_000, instead="type {key}=10")
    """Trials of the whole study, >= 1, failed and pruned ones included; a continued one runs those
    left."""
    num_parallel: int = count(at_most=1024, instead="type {key}=10")
    """Trials that are chosen at once, >= 1; with launch=local they also run at once."""
    sampler: Sampler = MISSING
    """tpe for any space (NeurIPS 2011, Bergstra et al.), cmaes for numbers only, or random."""
    num_random: int = count(at_most=1_000_000, instead="type {key}=10")
    """Trials drawn at random before tpe and cmaes learn from them, >= 1."""
    max_failure_rate: float = number(
        at_least=0, at_most=1, rule="be in [0, 1]", instead="type {key}=1"
    )
    """Share of failed trials among num_parallel above which the study ends, in [0, 1]. A trial has
    failed where its run did, or where it came to its end with an objective that is NaN or
    infinite."""
    pruner: Pruner = MISSING
    """Ends a trial after a validation: median, where its best objective so far is worse than the
    median of the trials before it at that epoch (Vizier, KDD 2017); halving, where it is not among
    the best quarter that goes on (arXiv 1810.05934); none."""
    prune_after_trials: int = count(at_least=0, instead="type {key}=1")
    """With median: trials that end before one is pruned, >= 0."""
    prune_after_epochs: float = number(at_least=0, at_most=MANY, instead="type {key}=1")
    """Epochs of a trial before which it is not pruned, >= 0; with halving > 0: trials compare after
    these, after four times these, and so on. Where an epoch has no length, 1000 steps are one."""
    trial: int | None = count(at_least=0, instead="type {key}=null")
    """Number of the trial that a run is, given by the study."""

    def __post_init__(self) -> None:
        require_package("optuna", "sweep=optuna", "use sweep=none")
        require(
            self.pruner != Pruner.halving or self.prune_after_epochs > 0,
            "sweep.prune_after_epochs must be > 0 with sweep.pruner=halving, got "
            f"{self.prune_after_epochs}; type sweep.prune_after_epochs=1",
        )


PRESETS = {"optuna": Optuna}

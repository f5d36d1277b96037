"""The root of a run: one slot per group, and the rules between them."""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING


class Resume(str, Enum):
    """What to do where the run's folder already holds a run of this name."""

    auto = "auto"
    never = "never"


class Weights(str, Enum):
    """Which checkpoint to test."""

    best = "best"
    last = "last"
    none = "none"


@dataclass(kw_only=True)
class Train:
    """One training run."""

    name: str = MISSING
    """Folder of the run below runs/; the same name again continues it."""
    seed: int = MISSING
    """Of every random number generator, >= 0."""
    resume: Resume = MISSING
    """auto continues an unfinished run of this name; never moves it aside and begins anew."""
    test: Weights = MISSING
    """The checkpoint tested after the fit: best, last, or none for no test."""
    run_dir: str = MISSING
    """Folder of the run, given by Hydra."""
    model: Any = MISSING
    data: Any = MISSING
    optimizer: Any = None
    scheduler: Any = None
    accumulate: Any = None
    clip: Any = None
    averaging: Any = None
    trainer: Any = MISSING
    precision: Any = MISSING
    logger: Any = None
    callbacks: Any = None


class Stage(str, Enum):
    """What to do with the trained model."""

    test = "test"
    validate = "validate"
    predict = "predict"


@dataclass(kw_only=True)
class Evaluate:
    """The evaluation of a run."""

    run: str = MISSING
    """Folder of the run."""
    stage: Stage = MISSING
    """test, validate, or predict (written to predictions.pt)."""
    checkpoint: str = MISSING
    """best, last, or the path of a checkpoint."""
    overrides: list[str] = MISSING
    """Changes to the configuration of the run, such as trainer.accelerator=cpu."""


ROOTS = {"train": Train, "evaluate": Evaluate}

"""The root of a run: one slot per group, and the rules between them."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


class Resume(str, Enum):
    """What to do where the run's folder already holds a run."""

    auto = "auto"
    never = "never"


@dataclass(kw_only=True)
class Train:
    """One training run."""

    name: str = MISSING
    seed: int = MISSING
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


ROOTS = {"train": Train}

"""The root of a run: one slot per group, and the rules between them."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

from omegaconf import MISSING

from .rules import require


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
    fit: bool = MISSING
    """Whether to train; false ends after the finders."""
    tuned: str | None = MISSING
    """A tuned.yaml whose overrides to use instead of a search."""
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
    tuner: Any = None

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", "be >= 0", self.seed, "type seed=42")
        require(
            self.fit or self.tuner is not None,
            "fit",
            "be true where tuner is off",
            self.fit,
            "use tuner=full",
        )
        for rule in RULES:
            if rule.is_broken(self):
                raise ValueError(rule.message(self))


class Rule(NamedTuple):
    """A combination that is refused: it would fail after a while, or do nothing in silence."""

    is_broken: Callable[[Train], bool]
    message: Callable[[Train], str]


def _late_starts(run: Train) -> list[int]:
    """Starts of an accumulation schedule that the run never reaches."""
    by = _get(run.accumulate, "by")
    end = run.trainer.max_epochs if by == "epoch" else run.trainer.max_steps
    return [] if by is None or end is None else [s for s in run.accumulate.starts if s >= end]


def _average_start(run: Train) -> tuple[str, float, int] | None:
    """Key and value of an averaging start, and the end of the run in the same unit."""
    for key, end in (
        ("start_step", run.trainer.max_steps),
        ("start_epoch", run.trainer.max_epochs),
        ("start", run.trainer.max_epochs),
    ):
        start = _get(run.averaging, key)
        if start is not None and end is not None and not isinstance(start, float):
            return key, start, end
    return None


def _never_averages(run: Train) -> bool:
    found = _average_start(run)
    return found is not None and found[1] >= found[2]


def _never_averages_message(run: Train) -> str:
    found = _average_start(run)
    assert found is not None
    key, start, end = found
    return (
        f"averaging.{key}={start} is not before the end of the run ({end}), so that nothing would "
        f"be averaged; type averaging.{key}={end // 2}, or use averaging=none"
    )


def _has_no_length(run: Train) -> bool:
    return run.trainer.max_epochs is None and run.trainer.max_steps is None


def _has_no_validation(run: Train) -> bool:
    return run.trainer.limit_val_batches in (0, 0.0)


def _get(slot: Any, key: str) -> Any:
    """A key of a group that is off, a schema, or free-form."""
    return slot.get(key) if isinstance(slot, dict) else getattr(slot, key, None)


BY_LENGTH = ("app.optim.WarmupDecay", "app.optim.OneCycle")
"""Schedules that are laid out over the whole run."""

RULES = (
    Rule(
        lambda run: run.scheduler is not None and run.optimizer is None,
        lambda run: (
            "scheduler needs an optimizer whose rate it sets, and optimizer=none leaves the model "
            "its own; choose an optimizer, or use scheduler=none"
        ),
    ),
    Rule(
        lambda run: _get(run.scheduler, "_target_") in BY_LENGTH and _has_no_length(run),
        lambda run: (
            "scheduler needs the length of the run; type trainer.max_epochs=30 or "
            "trainer.max_steps=1000, or use scheduler=none"
        ),
    ),
    Rule(
        lambda run: any(e >= (run.trainer.max_epochs or e + 1) for e in _milestones(run)),
        lambda run: (
            f"scheduler.milestones={_milestones(run)} are not all before "
            f"trainer.max_epochs={run.trainer.max_epochs}; type "
            f"'scheduler.milestones=[{run.trainer.max_epochs // 2}]'"
        ),
    ),
    Rule(
        lambda run: _get(run.scheduler, "monitor") is not None and _has_no_validation(run),
        lambda run: (
            "scheduler=plateau watches the validation, which trainer.limit_val_batches=0 switches "
            "off; type trainer.limit_val_batches=null, or use another scheduler"
        ),
    ),
    Rule(
        lambda run: _get(run.callbacks, "early_stopping") is not None and _has_no_validation(run),
        lambda run: (
            "callbacks.early_stopping watches the validation, which trainer.limit_val_batches=0 "
            "switches off; type trainer.limit_val_batches=null, or use callbacks=default"
        ),
    ),
    Rule(
        lambda run: bool(_late_starts(run)),
        lambda run: (
            f"accumulate.starts has {_late_starts(run)}, which the run never reaches "
            f"(trainer.max_{run.accumulate.by.value}s="
            f"{_get(run.trainer, f'max_{run.accumulate.by.value}s')}); leave them out"
        ),
    ),
    Rule(_never_averages, _never_averages_message),
    Rule(
        lambda run: (
            isinstance(_get(run.averaging, "start"), float) and run.trainer.max_epochs is None
        ),
        lambda run: (
            f"averaging.start={run.averaging.start} is a share of trainer.max_epochs, which is "
            "null; type averaging.start=null averaging.start_step=1000"
        ),
    ),
    Rule(
        lambda run: (
            _get(run.averaging, "horizon") is not None
            and run.averaging.decay is None
            and run.averaging.half_life_steps is None
            and _has_no_length(run)
        ),
        lambda run: (
            "averaging.horizon is a share of the run's optimizer steps, which neither "
            "trainer.max_epochs nor trainer.max_steps bounds; type averaging.decay=0.999"
        ),
    ),
    Rule(
        lambda run: _get(run.averaging, "validate") == "both" and _has_no_validation(run),
        lambda run: (
            "averaging.validate=both needs the validation, which trainer.limit_val_batches=0 "
            "switches off; type averaging.validate=averaged"
        ),
    ),
    Rule(
        lambda run: run.precision.mode == "16-mixed" and run.trainer.accelerator == "cpu",
        lambda run: (
            "precision=fp16 needs a GPU: trainer.accelerator=cpu has no scaled float16; "
            "use precision=bf16"
        ),
    ),
)


def _milestones(run: Train) -> list[int]:
    return list(_get(run.scheduler, "milestones") or [])


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
    tuner: Any = None

    def __post_init__(self) -> None:
        require(
            self.tuner is None or (self.tuner.batch_size is not None and self.tuner.lr is None),
            "tuner",
            "be batch_size or none",
            "a finder of the learning rate",
            "use tuner=batch_size",
        )


ROOTS = {"train": Train, "evaluate": Evaluate}

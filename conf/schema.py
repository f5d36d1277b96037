"""The root of a run: one slot per group."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from .combinations import check_combinations, notes_of
from .rules import MANY, NAME, RULE, count, folder, number, require, text

if TYPE_CHECKING:
    from .launch.schema import Local, Slurm
    from .precision.schema import Precision
    from .sweep.schema import Optuna
    from .trainer.schema import Trainer
    from .tuner.schema import Tuner

    Launch = Local | Slurm
else:  # a slot that OmegaConf knows a type of would take no other schema
    Launch = Optuna = Precision = Trainer = Tuner = Any

Resume = StrEnum("Resume", "auto never")
"""What to do where the run's folder already holds a run of this name."""

Weights = StrEnum("Weights", "best last none")
"""Which checkpoint to test."""

InitWeights = StrEnum("InitWeights", "averaged raw")
"""Which weights of a checkpoint that has both."""

Direction = StrEnum("Direction", "minimize maximize")
"""Which values of the objective are better."""


@dataclass(kw_only=True)
class Train:
    """One training run."""

    name: str = field(default=MISSING, metadata={RULE: NAME})
    """Folder of the run below runs/; the same name again continues it."""
    seed: int = count(at_least=0, at_most=2**32 - 1, instead="type {key}=42")
    """Of every random number generator, >= 0."""
    resume: Resume = MISSING
    """auto continues an unfinished run of this name; never moves it aside and begins anew."""
    test: Weights = MISSING
    """The checkpoint tested after the fit: best, last, or none for no test."""
    fit: bool = MISSING
    """Whether to train; false ends after the finders."""
    tuned: str | None = text(instead="type {key}=runs/NAME/tuned.yaml, or {key}=null")
    """A tuned.yaml whose overrides to use instead of a search."""
    extend: bool | str = False
    """true goes on with a finished run of this name to a larger trainer.max_epochs or max_steps, as
    if it had been as long from its start; relay lays out its schedules anew over that length."""
    branch_of: str | None = text(instead="type {key}=runs/NAME, or {key}=null")
    """Folder of a run with scheduler=wsd, from which this one decays; it has its configuration."""
    branch_at: int | None = number(above=0, at_most=MANY, instead="type {key}=N, or {key}=null")
    """The optimizer step, >= 1, of which that run keeps the checkpoint to begin from. The length
    follows: branch_at is what scheduler.decay leaves of it, or it ends that many steps later."""
    init_from: str | None = text(instead="type {key}=runs/NAME, or {key}=null")
    """Weights to begin from: a run's folder, for those that it delivers, or a file of weights."""
    init_weights: InitWeights | None = None
    """averaged or raw, of a file that has both; null = those that its run delivers."""
    init_only: Any = None
    """A pattern of names, such as encoder.*, or a list of them: what matches is taken as far as it
    fits; null = all, which have to fit exactly."""
    init_rename: Any = None
    """Names of modules in the file, each with that of the same in the model."""
    link: Any = None
    """Keys, each with the attribute of the data, once these are set up, that it gets."""
    objective: str | None = text(instead="type {key}=val_loss, or {key}=null")
    """A metric of result.json that the command returns to a sweeper, such as val_loss."""
    direction: Direction | None = None
    """Whether a sweeper looks for the least or the greatest objective; null = by its name."""
    debug: str | None = text(instead="type {key}=fast, or {key}=none")
    """The preset of `debug` that has made the run a short one."""
    run_dir: str = folder(instead="type name=NAME")
    """Folder of the run, given by Hydra."""
    model: Any = MISSING
    data: Any = None
    optimizer: Any = None
    scheduler: Any = None
    accumulate: Any = None
    clip: Any = None
    averaging: Any = None
    sharing: Any = None
    trainer: Trainer = MISSING
    strategy: Any = MISSING
    precision: Precision = MISSING
    memory: Any = None
    compile: Any = None
    logger: Any = None
    callbacks: Any = None
    tuner: Tuner | None = None
    launch: Launch | None = None
    sweep: Optuna | None = None

    def __post_init__(self) -> None:
        require(
            self.fit or self.tuner is not None,
            f"fit must be true where tuner is off, got {self.fit}; use tuner=full",
        )
        require(
            self.fit or self.objective is None,
            f"fit must be true with objective={self.objective}, got {self.fit}; type "
            "objective=null",
        )
        require(
            self.extend in (True, False, "relay"),
            f"extend must be true, false or relay, got {self.extend}; type extend=true",
        )
        _check_begin(self)
        check_combinations(self)

    @property
    def notes(self) -> list[str]:
        """What to say of choices that are allowed."""
        return notes_of(self)


def _check_begin(run: Train) -> None:
    for key, other, instead in (
        ("branch_of", "branch_at", "=N"),
        ("branch_at", "branch_of", "=runs/NAME"),
    ):
        require(
            getattr(run, key) is None or getattr(run, other) is not None,
            f"{key} needs {other}, got null; type {other}{instead} as well",
        )
    require(
        run.branch_of is None or run.extend is False,
        f"extend must be false in a branch, whose length follows from it, got {run.extend}; type "
        "another branch_at",
    )
    for key in ("init_weights", "init_only", "init_rename"):
        require(
            run.init_from is not None or getattr(run, key) is None,
            f"{key} has no effect without weights to begin from; type init_from=runs/NAME as well",
        )
    for key, instead in (
        ("init_rename", "{backbone: encoder}"),
        ("link", "{model.num_classes: num_classes}"),
    ):
        value = getattr(run, key)
        require(
            value is None
            or (isinstance(value, dict) and all(isinstance(one, str) for one in value.values())),
            f"{key} must be a mapping of names, got {value}; type '{key}={instead}'",
        )
    only = run.init_only
    patterns = only if isinstance(only, list) else [only]
    require(
        only is None or (patterns != [] and all(isinstance(one, str) and one for one in patterns)),
        f"init_only must be a pattern of names, or a list of them, got {only}; type "
        "'init_only=encoder.*'",
    )


Stage = StrEnum("Stage", "test validate predict")
"""What to do with the trained model."""


@dataclass(kw_only=True)
class Evaluate:
    """The evaluation of a run."""

    run: str = text(instead="type {key}=runs/NAME")
    """Folder of the run."""
    stage: Stage = MISSING
    """test, validate, or predict (written to predictions.pt)."""
    checkpoint: str = text(instead="type {key}=best")
    """best, last, or the path of a checkpoint."""
    overrides: list[str] = MISSING
    """Changes to the configuration of the run, such as trainer.accelerator=cpu."""
    tuner: Any = None

    def __post_init__(self) -> None:
        require(
            self.tuner is None or (self.tuner.batch_size is not None and self.tuner.lr is None),
            "tuner must be batch_size or none, got a finder of the learning rate; use "
            "tuner=batch_size",
        )


ROOTS = {"train": Train, "evaluate": Evaluate}

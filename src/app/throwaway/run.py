"""A throwaway run: what the fit will run, as long as a search lets it, without a trace."""

import copy
import gc
import shutil
import signal
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks as theirs
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from app.accumulate import Accumulation
from app.averaging import Averaging
from app.config import Config
from app.errors import Refused
from app.record.loggers import NoLogger
from app.run.build import Run, build, build_callbacks, build_techniques
from app.run.checkpoint import Kept
from app.run.progress import EpochLines
from app.run.trainer import Trainer
from app.stop.signals import Listens

OURS = ("checkpoint", "early_stopping", "progress")
"""Callbacks of the configuration that no search needs, by their names."""

LEFT_OUT = (theirs.Checkpoint, theirs.ProgressBar, theirs.ModelSummary, theirs.EarlyStopping,
            theirs.Timer, EpochLines)  # fmt: skip
"""Callbacks that save, draw, or end a fit; all others act in a search as in the fit."""

MOST_BATCHES = 1000
"""Micro-batches after which an optimizer step must have come."""

AFTER = ("on_train_epoch_end", "on_train_end", "on_fit_end")
"""Hooks that follow the last micro-batch of a search, whose outcome they do not change."""

ROUNDS = 10
"""Times the steps that are enough, after which an optimizer that steps rarely is waited for no
longer."""


class ThrowawayTrainer(Trainer):
    """The trainer of a search: it shows a model the limits of the fit, and only `end` ends it.

    What a model writes into its folders is deleted with it.

    Args:
        max_epochs, max_steps: of the fit: shown, not heeded.
        max_minutes: of the fit: so long a search may take.
        The others are the Trainer's.
    """

    def __init__(
        self,
        *,
        max_epochs: int | None,
        max_steps: int | None,
        max_minutes: float | None,
        **settings: Any,
    ) -> None:
        self._is_over = False
        self._shown_epochs = -1 if max_epochs is None else max_epochs
        self._shown_steps = -1 if max_steps is None else max_steps
        self.until = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        folder = mkdtemp()
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        limits: Any = {"max_epochs": None, "max_steps": None, "max_minutes": None}
        own = {"run_dir": Path(folder), "loggers": [NoLogger(save_dir=folder)], "profiler": None}
        own |= {"min_epochs": None, "min_steps": None}
        super().__init__(**limits, **(settings | own))

    @property
    def max_epochs(self) -> int:
        return self._shown_epochs

    @property
    def max_steps(self) -> int:
        return self._shown_steps

    @property
    def should_stop(self) -> bool:
        """Whether the search has ended the run: early stopping and pruning do not."""
        return self._is_over

    @should_stop.setter
    def should_stop(self, value: bool) -> None:
        """Nothing: a callback, or the model, would end the fit."""

    @property
    def is_over(self) -> bool:
        """Whether it has been ended."""
        return self._is_over

    def save_checkpoint(self, *args: Any, **settings: Any) -> None:
        """Nothing: a callback of the user's would write over what a fit has kept."""

    def end(self) -> None:
        """End the run after the micro-batch."""
        self._is_over = True


class Steps(pl.Callback):
    """Counts the steps that the optimizers themselves make, and ends the run when they are enough.

    They are counted also where Lightning sees none (`use_pl_optimizer=False`). The model's own
    schedules stand still. An epoch without a micro-batch ends the run as well.

    Args:
        enough: micro-batches with a step, >= 1, of each optimizer.

    Attributes:
        num_batches: micro-batches so far.
        num_steps: those of them on which an optimizer has stepped.

    Raises:
        Refused: where no step comes in MOST_BATCHES micro-batches.
    """

    def __init__(self, enough: float) -> None:
        self.enough = enough
        self.num_batches = 0
        self.num_steps = 0
        self._stepped: set[int] = set()
        self._of_each: list[int] = []
        self._is_told = True
        self._global_step = 0
        self._idle = 0
        self._begun_at = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        trainer.fit_loop.max_epochs = -1

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for config in trainer.strategy.lr_scheduler_configs:
            config.interval = "never"  # of which Lightning's loop takes no notice
            config.reduce_on_plateau = False
            vars(config.scheduler)["step"] = _stand_still  # where the model steps it itself
        self._of_each = [0] * len(trainer.optimizers)
        for position, optimizer in enumerate(trainer.optimizers):
            if isinstance(optimizer, Optimizer):
                optimizer.register_step_pre_hook(partial(self._before, position))
                optimizer.register_step_post_hook(partial(self._after, position))
            else:  # DeepSpeed's
                self._is_told = False

    def before_step(self, position: int, optimizer: Optimizer) -> None:
        """What is to be done before a step of the optimizer at `position`."""

    def after_step(self, position: int, optimizer: Optimizer) -> None:
        """What is to be done after it."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.num_batches += 1
        if not self._is_told and trainer.global_step != self._global_step:
            self._global_step = trainer.global_step
            self._stepped = {*range(len(self._of_each))}
        for position in self._stepped:
            self._of_each[position] += 1
        self.has_stepped = bool(self._stepped)
        self._stepped = set()
        self.num_steps += self.has_stepped
        self._idle = 0 if self.has_stepped else self._idle + 1
        if self._idle >= MOST_BATCHES + trainer.accumulate_grad_batches:
            raise Refused(
                f"tuner needs the steps of {type(trainer.lightning_module).__name__}, which made "
                f"none in {self._idle} micro-batches; step an optimizer that configure_optimizers "
                "returns, or use tuner=none"
            )
        is_enough = min(self._of_each) >= self.enough or self.num_steps >= ROUNDS * self.enough
        if is_enough or (trainer.world_size == 1 and is_late(trainer)):  # ranks differ in clocks
            end(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.num_batches == self._begun_at:
            end(trainer)
        self._begun_at = self.num_batches

    def _before(self, position: int, optimizer: Optimizer, *args: Any) -> None:
        self.before_step(position, optimizer)

    def _after(self, position: int, optimizer: Optimizer, *args: Any) -> None:
        self._stepped.add(position)
        self.after_step(position, optimizer)


def end(trainer: pl.Trainer) -> None:
    """End a throwaway run; what the user's callbacks and model then do may be for want of a fit."""
    assert isinstance(trainer, ThrowawayTrainer)
    if not trainer.is_over:
        forgive(trainer, trainer.lightning_module, AFTER)
    trainer.end()


def forgive(trainer: pl.Trainer, model: pl.LightningModule, hooks: Sequence[str]) -> None:
    """Let hooks of the user's callbacks and model fail, with a warning, for want of a whole fit."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for one in (*callbacks, model):
        for name in hooks if not type(one).__module__.startswith("app.") else ():
            if not isinstance(hook := getattr(one, name), partial):
                vars(one)[name] = partial(_forgiven, f"{type(one).__name__}.{name}", hook)


def _forgiven(name: str, hook: Callable[..., None], *args: Any) -> None:
    """Call a hook in a search, which measures no validation and is no whole fit."""
    try:
        hook(*args)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        rank_zero_warn(f"tuner: {name} fails in a search: {type(error).__name__}: {error}")


def end_before_training(trainer: pl.Trainer) -> None:
    """End a throwaway run at its start; what callbacks and model do after a fit would find none."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for one in (*callbacks, trainer.lightning_module):
        vars(one)["on_fit_end"] = _stand_still
    end(trainer)


def is_late(trainer: pl.Trainer) -> bool:
    """Whether a throwaway run has taken as long as the fit may."""
    until = getattr(trainer, "until", None)
    return until is not None and time.monotonic() > until


def throwaway(
    config: Config,
    *,
    steps: Steps,
    validates: bool,
    callbacks: Sequence[pl.Callback] = (),
    num_ranks: int | None = None,
    served: Callable[[Any], Any] | None = None,
) -> Run:
    """Build a run that leaves no file, and that `steps` ends.

    The techniques and callbacks are those of the fit; an average starts at once, for its memory
    counts, and an accumulation schedule stays at its first factor. Loggers, checkpoints, bars, what
    ends a fit early, and all schedules of the learning rate are off. The model sees the limits of
    the fit, and a logger that ignores everything.

    Args:
        validates: whether an evaluation step follows the last optimizer step.
        num_ranks: ranks whose accumulation this one stands for; None: as many as there are.
        served: of `build`.
    """
    techniques = build_techniques(config)
    for technique in techniques:
        if isinstance(technique, Averaging):
            technique.begin_at_once()
        if isinstance(technique, Accumulation):
            technique.stay_as_begun(num_ranks=num_ranks)
    changed = config.but(
        scheduler=None,
        tuner=None,
        sharing=None,  # each size would be a copy of its own
        logger=None,
        callbacks=None,
        trainer={
            "limit_val_batches": int(validates and config.trainer.limit_val_batches != 0),
            "val_check_interval": 1.0,
            "check_val_every_n_epoch": 1,
            "num_sanity_val_steps": 0,
        },
    )
    changed.holding(copy.deepcopy(config.objects))  # the fit begins with them as they are
    made_by = f"{ThrowawayTrainer.__module__}.{ThrowawayTrainer.__name__}"
    changed.plain["trainer"] = {**changed.plain["trainer"], "_target_": made_by}
    chosen = config.plain["callbacks"] or {}
    of_user = build_callbacks({name: one for name, one in chosen.items() if name not in OURS})
    run = build(
        changed,
        [*callbacks, steps, Listens(), *kept(of_user), keeper := Kept(dirpath="")],
        techniques=techniques,
        served=served,
    )
    if not validates:  # whose metrics may be asked for
        forgive(run.trainer, run.model, ("on_train_epoch_end",))
    keeper.directory = Path(run.trainer.default_root_dir) / "checkpoints"
    of_model = run.model.configure_callbacks
    run.model.configure_callbacks = lambda: kept(of_model())  # type: ignore[method-assign]
    return run


def kept(callbacks: "Iterable[pl.Callback] | pl.Callback") -> list[pl.Callback]:
    """The callbacks that act in a search."""
    several = [callbacks] if isinstance(callbacks, pl.Callback) else callbacks
    return [one for one in several if not isinstance(one, LEFT_OUT)]


def fit(run: Run) -> None:
    """Fit a throwaway run. Raises KeyboardInterrupt at Ctrl-C, which Lightning makes an exit."""
    try:
        run.trainer.fit(run.model, datamodule=run.data)
    except SystemExit as stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores it from now on
        raise KeyboardInterrupt from stop


def release_memory() -> None:
    """Give the memory of a throwaway run that nobody holds any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _stand_still(*args: Any, **settings: Any) -> None:
    """A step of a schedule in a search, and what comes after a fit that was none."""

"""A fit that is asked to stop: the ranks agree on a step, save after it, and leave."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import distributed
from torch.utils.data import DataLoader

from app.process.asked import HEEDED, asked
from app.resume.exact import ExactResume
from app.resume.hooks import after_batch, switch_off, switch_on
from app.resume.position import ResumableLoader
from app.run.checkpoint import Checkpoints, ends_now, validation_is_due

SHARE_OF_TIME = 0.01
"""Of a training step, which the ranks may spend on asking each other."""

RECENT = 0.1
"""Weight of the latest question in the mean of what one costs."""

MOST_S = 0.5
"""How long a signal may wait for the ranks to ask each other, where steps are short."""


ASKS = ("on_train_batch_end", "on_validation_batch_end")
"""Hooks in which a fit asks whether it is to stop."""


class Listens(pl.Callback):
    """Takes the signals back from Lightning, whose handler of SIGTERM waits for the other ranks."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        asked.listen()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        asked.listen()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        asked.listen()


class StopsOnSignal(Listens):
    """Saves a fit that was asked to stop, and leaves it, between two optimizer steps.

    A signal in a validation, or before one that is due, is heeded after a batch of it; the
    checkpoint says that the validation has not begun, and the continued run makes it anew. Not
    after the last step, of `trainer.max_steps` or because the fit is to stop: Lightning would not
    come back to that validation.
    """

    def __init__(self) -> None:
        self._agreement: _Agreement | None = None
        self._num_val_batches = 0
        self._least_val_batches: float = math.inf

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        _guard_workers(trainer)
        super().on_train_start(trainer, pl_module)
        self._agreement = _Agreement() if trainer.world_size > 1 else None
        if self._agreement is None:
            switch_off(self, *ASKS)  # it costs nothing until the first signal
        asked.hold(lambda: switch_on(self, *ASKS))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
            _guard_workers(trainer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        window_open = (batch_idx + 1) % trainer.accumulate_grad_batches != 0
        if window_open or trainer.is_last_batch or validation_is_due(trainer, batch_idx):
            return
        if self._is_agreed():
            after_batch(pl_module, partial(self._leave, trainer))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._num_val_batches = 0
        if self._agreement is not None and trainer.state.fn == "fit":
            num_batches = sum(trainer.num_val_batches)
            self._least_val_batches = self._agreement.least(num_batches)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._num_val_batches += 1
        if self._num_val_batches >= self._least_val_batches or ends_now(trainer):
            return
        if self._is_agreed():
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, ExactResume):
                    callback.repeats_validation = True
            self._leave(trainer)

    def _is_agreed(self) -> bool:
        if self._agreement is None:
            return asked.first is not None
        number = self._agreement.greatest(int(asked.first or 0))
        if number:
            asked.note(number)
        return bool(number)

    def _leave(self, trainer: pl.Trainer) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Checkpoints):
                callback.save(trainer)
        raise SystemExit(asked.exit_code)


class _Agreement:
    """What the ranks ask each other, all at the same moments, for a small share of their time."""

    def __init__(self) -> None:
        # on the CPU: a device would have to finish its work first
        is_on_cpu = distributed.get_backend() == "gloo"
        self._group = None if is_on_cpu else distributed.new_group(backend="gloo")
        self._num_calls = 0
        self._ask_at = 1
        self._pause = 1
        self._cost_s = 0.0
        self._began = time.perf_counter()

    def greatest(self, number: int) -> int:
        """The greatest number on any rank; 0 where the ranks do not ask each other this time."""
        self._num_calls += 1
        if self._num_calls < self._ask_at:
            return 0
        start = time.perf_counter()
        told = torch.tensor([number, self._pause])
        distributed.all_reduce(told, distributed.ReduceOp.MAX, group=self._group)
        end = time.perf_counter()
        self._cost_s += RECENT * (end - start - self._cost_s)
        between_s = (start - self._began) / self._num_calls
        wanted = math.ceil(self._cost_s / (SHARE_OF_TIME * between_s))
        self._pause = max(1, min(wanted, int(MOST_S / between_s)))
        self._num_calls, self._began, self._ask_at = 0, end, int(told[1])
        return int(told[0])

    def least(self, number: float) -> float:
        """The least number on any rank."""
        told = torch.tensor(float(number))
        distributed.all_reduce(told, distributed.ReduceOp.MIN, group=self._group)
        return float(told)


def _guard_workers(trainer: pl.Trainer) -> None:
    for loaders in (trainer.train_dataloader, trainer.val_dataloaders):
        for loader in CombinedLoader(loaders).flattened if loaders is not None else ():
            _let_workers_end_with_parent(loader)


def _let_workers_end_with_parent(loader: Any) -> None:
    if isinstance(loader, ResumableLoader):
        loader = loader.loader
    is_guarded = isinstance(getattr(loader, "worker_init_fn", None), _EndsWithParent)
    if isinstance(loader, DataLoader) and loader.num_workers > 0 and not is_guarded:
        loader.worker_init_fn = _EndsWithParent(loader.worker_init_fn)


class _EndsWithParent:
    """Of the signals that a job gets, a DataLoader's worker heeds its parent's only.

    SLURM sends them to all processes of a job: a worker that ended would take the batches with it
    that the parent waits for, before it comes to its checkpoint.
    """

    def __init__(self, init: Callable[[int], None] | None) -> None:
        self._init = init

    def __call__(self, worker_id: int) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, HEEDED)
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
        if self._init is not None:
            self._init(worker_id)


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo(HEEDED).si_pid != parent:
        pass
    os._exit(0)

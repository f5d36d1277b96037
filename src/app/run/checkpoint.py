"""Checkpoints: when they are written, how they reach the disk, and which one to go on from."""

import math
import os
import pickle
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from app.errors import Refused
from app.optim import Watched, epochs_done
from app.process.files import replacing, sync_folder
from app.process.intact import Checked, refuse_damaged
from app.record.kept import is_due, kept_name
from app.record.loggers import MetricsCsv
from app.record.names import logged_as, stage_of
from app.record.top import Top, link, remove
from app.resume.exact import ExactResume
from app.resume.hooks import after_batch

PLAIN = (bool, int, float, complex, str, bytes, type(None))


def plain(value: Any, path: str) -> Any:
    """`value` as tensors, plain Python values and containers of them; itself where it is that.

    Raises TypeError naming `path` where it holds anything else: a checkpoint with it would name
    code to import when it is loaded.
    """
    if type(value) in PLAIN or isinstance(value, Tensor | torch.dtype | torch.device | torch.Size):
        return value
    if isinstance(value, Mapping):
        items = {plain(key, path): plain(value[key], f"{path}.{key}") for key in value}
        same = type(value) in (dict, OrderedDict, Counter) and all(
            items[k] is value[k] for k in items
        )
        return value if same else items
    if isinstance(value, list | tuple | set | frozenset):
        kind = next(kind for kind in (list, tuple, set, frozenset) if isinstance(value, kind))
        return kind(plain(item, f"{path}[{index}]") for index, item in enumerate(value))
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Enum):
        return plain(value.value, path)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{path} holds a {type(value).__module__}.{type(value).__qualname__}")


class CheckpointFiles(TorchCheckpointIO):
    """Writes and loads tensors and plain values only, and no file but a whole one."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Raises Refused naming what a callback, model or optimizer put in that is not plain.

        Hyper-parameters of a model that are not plain are left out, with a warning: no continued
        run needs them.
        """
        assert storage_options is None
        content = {}
        for key, value in checkpoint.items():
            if key.endswith("hyper_parameters"):
                content[key] = self._plain_hyper_parameters(value, key)
            elif not isinstance(value, type):  # Lightning notes the class of the hyper-parameters
                content[key] = self._plain_state(value, key)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            archive = Checked(file)
            torch.save(content, archive)  # type: ignore[arg-type]  # asks for no more
            archive.close_archive()

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """The content of a checkpoint; never runs code that the file names.

        Raises Refused where the file is damaged, would have to run code, or is no checkpoint.
        """
        path = Path(path)
        refuse_damaged(path)
        try:
            content: Any = torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            raise Refused(
                f"{path} holds more than tensors and plain values, and loading it could run code "
                f"that the file names: {error}"
            ) from error
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of an archive of somebody else's: almost anything
            raise Refused(f"{path} is no checkpoint that torch can read: {error}") from error
        for name in ("state_dict", "pytorch-lightning_version"):
            if not isinstance(content, dict) or name not in content:
                raise Refused(f"{path} is no checkpoint of a LightningModule: it has no {name}")
        return dict(content)

    @staticmethod
    def _plain_state(value: Any, key: str) -> Any:
        try:
            return plain(value, key)
        except TypeError as error:
            raise Refused(
                f"checkpoint: {error}; a checkpoint holds tensors and plain values only, so that "
                "loading it never runs code: return those from state_dict()"
            ) from None

    @staticmethod
    def _plain_hyper_parameters(values: Mapping[str, Any], key: str) -> dict[str, Any]:
        kept = {}
        for name, value in values.items():
            try:
                kept[name] = plain(value, f"{key}.{name}")
            except TypeError as error:
                rank_zero_warn(f"checkpoint: {error}; it is left out of the file")
        return kept


def newest_intact(directory: Path) -> Path | None:
    """The checkpoint to go on from: the last one, or the one before where that is damaged.

    Raises Refused where both are: the run would begin anew, over what is left of it.
    """
    found = [path for name in ("last.ckpt", "previous.ckpt") if (path := directory / name).exists()]
    for path in found:
        try:
            refuse_damaged(path)
        except Refused as refusal:
            rank_zero_warn(f"{refusal}; looking for the one before")
        else:
            return path
    if found:
        raise Refused(
            f"{directory} holds no whole checkpoint to go on from; to begin anew, with the old run "
            "moved aside, type resume=never"
        )
    return None


class Kept(Checkpoint):
    """What a model may ask of `trainer.checkpoint_callback`, as of Lightning's ModelCheckpoint. It
    stands, and keeps nothing, where no checkpoint is written.

    Args:
        dirpath: folder of the checkpoints.
    """

    def __init__(self, *, dirpath: str) -> None:
        self.directory = Path(dirpath)
        self.monitor: str | None = None
        self.mode: str | None = None
        self.best_model_path = ""
        self.best_score: float | None = None
        self._top: Top | None = None

    @property
    def best_k_models(self) -> dict[str, float]:
        """The files of the best checkpoints and their scores; empty where best.ckpt is all."""
        return {str(self.directory / name): of for name, of in self._scores().items()}

    def _scores(self) -> dict[str, float]:
        return {} if self._top is None else dict(self._top.scores)

    @property
    def dirpath(self) -> str:
        """Folder of the checkpoints."""
        return str(self.directory)

    @property
    def last(self) -> Path:
        """Where the last checkpoint is written."""
        return self.directory / "last.ckpt"

    @property
    def last_model_path(self) -> str:
        """The last checkpoint; empty where there is none."""
        return str(self.last) if self.last.exists() else ""

    @property
    def best_model_score(self) -> Tensor | None:
        """The metric of the best checkpoint; None where there is none."""
        return (
            None if self.best_score is None else torch.tensor(self.best_score, dtype=torch.float64)
        )


class Checkpoints(Kept):
    """Keeps the best checkpoint by a metric, the last one, and the one before the last.

    The best is written after a validation, or after the epoch where it is the training that
    measures the metric; the last at the end of each epoch and, where
    `every_n_steps` or `every_min` asks for it, at the end of an optimizer step. A validation that
    is due comes first: Lightning does not run it again in a resumed run. A fit that was to stop
    when its last checkpoint was written does not go on from it: it is over.

    Args:
        dirpath: folder of the checkpoints.
        monitor: metric of the validation or the training, also where the model logs it with another
            separator, `val/loss` for `val_loss`; None keeps no best one.
        mode: min or max: which values are better; None where there is no monitor.
        top_k, filename: of `Top`; with 1 and None there is best.ckpt alone. With others that is
            the best of them too.
        every_n_steps: also after this many optimizer steps, >= 1; None only at the epochs' ends.
        every_min: also after this many minutes, > 0; None only at the epochs' ends.
        keep_every_n_steps: also after this many optimizer steps, >= 1, and kept as step=N.ckpt, a
            second name of the last one's file; None keeps none.
    """

    def __init__(
        self,
        *,
        dirpath: str,
        monitor: str | None,
        mode: str | None,
        top_k: int | None,
        filename: str | None,
        every_n_steps: int | None,
        every_min: float | None,
        keep_every_n_steps: int | None,
    ) -> None:
        super().__init__(dirpath=dirpath)
        if top_k != 1 or filename is not None:
            self._top = Top(top_k=top_k, filename=filename, mode=mode)
        self.monitor = monitor
        self.mode = mode
        self.every_n_steps = every_n_steps
        self.every_min = every_min
        self.keep_every_n_steps = keep_every_n_steps
        self._saved_step = 0
        self._saved_at = time.monotonic()
        self._late = False
        self._asked_again_at = 0
        self._resume: ExactResume | None = None
        self._watched = Watched("")
        self._of_validation = False
        self._has_validated = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
        resumes = [c for c in trainer.callbacks if isinstance(c, ExactResume)]  # type: ignore[attr-defined]
        self._resume = resumes[0] if resumes else None
        if trainer.is_global_zero:
            for torn in self.directory.glob("*.part"):  # of a process that was killed
                torn.unlink()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if validation_is_due(trainer, batch_idx):
            if self._resume is not None:
                after_batch(pl_module, partial(self._resume.note_before_validation, trainer))
            return
        if trainer.is_last_batch or not self._is_due(trainer):
            return
        window_open = (batch_idx + 1) % trainer.accumulate_grad_batches != 0
        if not window_open:
            after_batch(pl_module, partial(self.save, trainer))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.monitor is not None:
            self._watched = Watched(logged_as(self.monitor, trainer.callback_metrics))
            self._watched.begin(trainer)
        is_inside = trainer.state.fn == "fit" and not (trainer.sanity_checking or ends_now(trainer))
        if is_inside and not trainer.is_last_batch and self._keeps(trainer) and self._resume:
            self._resume.repeats_validation = True
            self.save(trainer)
            self._resume.repeats_validation = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit" or self.monitor is None:
            return
        self._has_validated = True
        name = logged_as(self.monitor, trainer.callback_metrics)
        is_measured = self._watched.is_measured(trainer) or self._watched.name != name
        if trainer.strategy.broadcast(is_measured):
            self._of_validation = True
            self._keep_if_best(trainer, name)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.monitor is not None and not self._of_validation:
            self._judge_epoch(trainer, pl_module, self.monitor)
        self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._saved_step != trainer.global_step:
            self.save(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # of a fit that had ended Lightning does not do it
        trainer.fit_loop.epoch_progress.current.completed = epochs_done(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # a validation comes before the end
        checkpoint["has_ended"] = bool(trainer.should_stop) and not trainer.validating

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == "fit" and checkpoint.get("has_ended"):
            trainer.should_stop = True

    def _judge_epoch(self, trainer: pl.Trainer, model: pl.LightningModule, monitor: str) -> None:
        name = logged_as(monitor, trainer.callback_metrics)
        if trainer.strategy.broadcast(name in trainer.callback_metrics):
            self._keep_if_best(trainer, name)
        elif self._has_validated or not (trainer.enable_validation or stage_of(monitor) == "val"):
            logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            rank_zero_warn(
                f"callbacks.checkpoint.monitor={monitor} is not logged by "
                f"{type(model).__name__}, which logs {logged}; no best checkpoint is kept. "
                "Type callbacks.checkpoint.monitor=METRIC, or =null for the last one only"
            )
            self.monitor = None

    def _keep_if_best(self, trainer: pl.Trainer, monitor: str) -> None:
        value = trainer.callback_metrics.get(monitor, math.nan)
        score = float(
            trainer.strategy.broadcast(float(value))
        )  # of the first rank: all save, or none
        best = self.directory / "best.ckpt"
        if is_best := self._is_better(score):
            self.best_score, self.best_model_path = score, str(best)
        if self._top is None:
            if is_best:
                trainer.save_checkpoint(best, weights_only=False)
        elif self._top.takes(score):
            name, displaced = self._top.add(trainer, score)
            path = self.directory / name
            trainer.save_checkpoint(path, weights_only=False)
            if is_best and trainer.strategy.broadcast(path.is_dir()):  # DeepSpeed's
                trainer.save_checkpoint(best, weights_only=False)
            elif is_best and trainer.is_global_zero:
                link(path, best)
            if displaced is not None and trainer.is_global_zero:
                remove(self.directory / displaced)

    def state_dict(self) -> dict[str, Any]:
        return {
            "best_model_score": self.best_score,
            "monitor": self.monitor,
            "of_validation": self._of_validation,
            "has_validated": self._has_validated,
            "top": self._scores(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._of_validation = state_dict.get("of_validation", False)
        self._has_validated = state_dict.get("has_validated", False)
        best = self.directory / "best.ckpt"
        if state_dict["monitor"] == self.monitor and best.exists():
            self.best_score = state_dict["best_model_score"]
            self.best_model_path = str(best)
            if self._top is not None:
                self._top.restore(state_dict.get("top", {}), self.directory)

    def _keeps(self, trainer: pl.Trainer) -> bool:
        every = self.keep_every_n_steps
        return is_due(trainer.global_step, saved=self._saved_step, every=every)

    def _is_due(self, trainer: pl.Trainer) -> bool:
        if self._keeps(trainer):
            return True
        steps = trainer.global_step - self._saved_step
        if self.every_n_steps is not None and steps >= self.every_n_steps:
            return True
        return self.every_min is not None and steps > 0 and self._is_late(trainer, self.every_min)

    def _is_late(self, trainer: pl.Trainer, every_min: float) -> bool:
        """Whether the time is up, by rank 0's clock: all ranks save, or none.

        They ask it some twenty times an interval, not at every step.
        """
        step = trainer.global_step
        if step < self._asked_again_at:
            return self._late
        seconds = time.monotonic() - self._saved_at
        steps_per_s = (step - self._saved_step) / max(seconds, 1e-9)
        pause = max(1, int(steps_per_s * every_min * 60 / 20)) if trainer.world_size > 1 else 1
        late, pause = trainer.strategy.broadcast((seconds / 60 >= every_min, pause))
        self._late, self._asked_again_at = late, step + pause
        return bool(late)

    def _is_better(self, score: float) -> bool:
        if math.isnan(score):
            return False
        best = self.best_score
        return best is None or (score < best if self.mode == "min" else score > best)

    def save(self, trainer: pl.Trainer) -> None:
        """Write the last checkpoint, and keep the one before. All ranks call it."""
        keeps = self._keeps(trainer)
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
        self._late, self._asked_again_at = False, 0
        if trainer.is_global_zero and self.last.exists():
            previous = self.directory / "previous.ckpt"
            if previous.is_dir():
                remove(previous)
            self.last.replace(previous)
            sync_folder(self.directory)
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCsv):
                logger.sync()
        path = self.directory / kept_name(trainer.global_step) if keeps else self.last
        trainer.save_checkpoint(path, weights_only=False)
        if keeps and trainer.is_global_zero:
            link(path, self.last)


def ends_now(trainer: pl.Trainer) -> bool:
    """Whether the fit has made its last optimizer step."""
    return stops_now(trainer) or -1 < trainer.max_steps <= trainer.global_step


def stops_now(trainer: pl.Trainer) -> bool:
    """Whether the fit was asked to stop, and has made the epochs and steps that it has to."""
    if not trainer.should_stop:
        return False
    epochs: Any = trainer.fit_loop.epoch_progress.current
    has_made = epochs.processed >= (trainer.min_epochs or 0)
    return has_made and trainer.global_step >= (trainer.min_steps or 0)


def validation_is_due(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether Lightning validates after this micro-batch."""
    every = trainer.check_val_every_n_epoch
    interval = trainer.val_check_batch
    if stops_now(trainer):
        is_due = True
    elif interval in (None, math.inf):
        is_due = trainer.is_last_batch
    else:
        batches = (batch_idx if every else trainer.fit_loop.total_batch_idx) + 1
        is_due = batches % interval == 0
    if not is_due or (every and (trainer.current_epoch + 1) % every != 0):
        return False
    return trainer.enable_validation  # slow: not of every batch

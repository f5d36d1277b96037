"""What a run has measured, and of which weights each value is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from app.averaging.engine import averages_of
from app.run.checkpoint import Checkpoints

Where = dict[str, Any]
"""`on` train, validation or test; `checkpoint` best, last or None, of weights that none keeps;
`weights` raw or averaged; `epoch` and `step` that were trained then, as the lines of epochs say."""


class Measured(pl.Callback):
    """Notes what the last validation has measured, and the one by which the best checkpoint was
    chosen. Its state is plain, and in each checkpoint."""

    def __init__(self) -> None:
        self._before: dict[str, Tensor] = {}
        self._began_at: tuple[int, int] | None = None
        self.validation: dict[str, Any] | None = None
        self.best: dict[str, Any] | None = None
        self._best_score: float | None = None
        self._best_name: str | None = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        now = trainer.current_epoch, trainer.global_step
        if not trainer.sanity_checking and self._began_at != now:  # else a second time, of others
            self._before, self._began_at = dict(trainer.callback_metrics), now

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self.validation = self._note(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        kept = keeper(trainer)
        score, path = (getattr(kept, f"best_model_{name}", None) for name in ("score", "path"))
        if score is not None and float(score) != self._best_score:
            self._best_score = float(score)
        elif score is None and path and Path(path).name != self._best_name:
            self._best_name = Path(path).name  # of a keeper without a monitor
        else:
            return
        self.best = self._note(trainer)  # the file is being made

    def state_dict(self) -> dict[str, Any]:
        scored = {"best_score": self._best_score, "best_name": self._best_name}
        return {"validation": self.validation, "best": self.best, **scored}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validation, self.best = state_dict["validation"], state_dict["best"]
        self._best_score = state_dict["best_score"]
        self._best_name = state_dict.get("best_name")

    def _note(self, trainer: pl.Trainer) -> dict[str, Any]:
        """Of those metrics that are other objects than before the validation."""
        measured = trainer.callback_metrics.items()
        metrics = {k: float(v) for k, v in measured if v is not self._before.get(k)}
        of_train: list[str] = []
        if not trainer.validating:  # the epoch ends: these are of the training, or of before
            noted = self.validation or {"step": None, "metrics": {}}
            of_train = [name for name in metrics if name not in noted["metrics"]]
            if noted["step"] != trainer.global_step:
                metrics = {name: metrics[name] for name in of_train}
        return {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "is_averaged": _delivers_average(trainer),
            "metrics": metrics,
            "of_train": of_train,
        }


def keeper(trainer: pl.Trainer) -> pl.callbacks.Checkpoint | None:
    """What keeps the best and the last checkpoint: ours, else another one's."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    ours = (one for one in callbacks if isinstance(one, Checkpoints))
    return next(ours, trainer.checkpoint_callback)


def measured(
    trainer: pl.Trainer, before: Mapping[str, float], checkpoint: str | None
) -> dict[str, Any]:
    """What a fit has come to, for result.json.

    metrics        those of the delivered checkpoint, and others as they were measured last
    metrics_of     of each of them, where it was measured
    last_metrics   all as they were measured last
    averaged_after the optimizer step after which the average began, where there is one

    Args:
        before: what was measured before the fit was continued.
        checkpoint: best or last, which the run delivers; None where it keeps none.
    """
    note = _note_of(trainer)
    last = {**before, **{k: float(v) for k, v in trainer.callback_metrics.items()}}
    end = {"epoch": trainer.current_epoch, "step": trainer.global_step}
    of = {name: _where("train", "last" if checkpoint else None, "raw", end) for name in last}
    metrics = dict(last)
    for kind, noted in (("last", note.validation), ("best", note.best)):
        if noted is None or kind == "best" != checkpoint:
            continue
        kept = kind if checkpoint and (kind == "best" or noted["step"] == end["step"]) else None
        for name, value in noted["metrics"].items():
            on = "train" if name in noted.get("of_train", ()) else "validation"
            is_raw = (
                on == "train"
                or not noted["is_averaged"]
                or name.startswith("raw_")
                or _validates_raw(trainer)
            )
            metrics[name] = value
            of[name] = _where(on, kept, "raw" if is_raw else "averaged", noted)
    began = next((one.began_after for one in averages_of(trainer)), None)
    begun = {} if began is None else {"averaged_after": began}
    return {"metrics": metrics, "metrics_of": of, "last_metrics": last, **begun}


def tested(trainer: pl.Trainer, checkpoint: str | None) -> Where:
    """Where the test measures, which runs after a fit."""
    best = _note_of(trainer).best if checkpoint == "best" else None
    end = {"epoch": trainer.current_epoch, "step": trainer.global_step}
    is_averaged = best["is_averaged"] if best else _delivers_average(trainer)
    return _where("test", checkpoint, "averaged" if is_averaged else "raw", best or end)


def _where(on: str, checkpoint: str | None, weights: str, at: Mapping[str, Any]) -> Where:
    place = {"epoch": at["epoch"], "step": at["step"]}
    return {"on": on, "checkpoint": checkpoint, "weights": weights, **place}


def _note_of(trainer: pl.Trainer) -> Measured:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((one for one in callbacks if isinstance(one, Measured)), Measured())


def _delivers_average(trainer: pl.Trainer) -> bool:
    return any(one.has_begun for one in averages_of(trainer))


def _validates_raw(trainer: pl.Trainer) -> bool:
    return any(one.validate == "raw" for one in averages_of(trainer))

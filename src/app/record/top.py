"""The best checkpoints of a run beside best.ckpt: how many are kept, and what they are called."""

import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from app.config import FIELD
from app.process.files import sync_folder
from app.record.names import logged_as

WITHOUT_TEMPLATE = "epoch={epoch}-step={step}"


class Top:
    """The files of the best checkpoints and their scores, on every rank alike.

    Args:
        top_k: how many are kept, >= 1; None: all that are measured.
        filename: template of their names, `{epoch}` counting from 1, `{step}` and metrics in it.
        mode: min or max: which scores are better.
    """

    def __init__(self, *, top_k: int | None, filename: str | None, mode: str | None) -> None:
        self._most = math.inf if top_k is None else top_k
        self._template = filename or WITHOUT_TEMPLATE
        self._is_min = mode == "min"
        self.scores: dict[str, float] = {}

    def takes(self, score: float) -> bool:
        """Whether a checkpoint of this score is one of the best; never where it is NaN."""
        if math.isnan(score) or len(self.scores) < self._most:
            return not math.isnan(score)
        worst = self.scores[self._worst()]
        return score < worst if self._is_min else score > worst

    def add(self, trainer: pl.Trainer, score: float) -> tuple[str, str | None]:
        """The name for a file of this score, and that of the one which it displaces."""
        name = base = trainer.strategy.broadcast(self._filled(trainer))
        number = 0
        while f"{name}.ckpt" in self.scores:
            number += 1
            name = f"{base}-v{number}"
        displaced = self._worst() if len(self.scores) >= self._most else None
        if displaced is not None:
            del self.scores[displaced]
        self.scores[f"{name}.ckpt"] = score
        return f"{name}.ckpt", displaced

    def restore(self, scores: Mapping[str, float], directory: Path) -> None:
        """Go on with those of an earlier fit that are still there."""
        self.scores = {name: of for name, of in scores.items() if (directory / name).exists()}

    def _worst(self) -> str:
        worst = max if self._is_min else min
        return worst(self.scores, key=lambda name: self.scores[name])

    def _filled(self, trainer: pl.Trainer) -> str:
        known: dict[str, Any] = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step}
        metrics = trainer.callback_metrics

        def one(field: re.Match[str]) -> str:
            name, how = field.groups(default="")
            if name in known:
                return format(known[name], how)
            value = metrics.get(logged_as(name, metrics))
            if value is None:
                rank_zero_warn(
                    f"callbacks.checkpoint.filename names {name}, which is not logged; logged are "
                    f"{', '.join(sorted(metrics)) or 'none'}"
                )
            return format(math.nan if value is None else float(value), how)

        return FIELD.sub(one, self._template)


def link(path: Path, at: Path) -> None:
    """Let a file be found under a second name too, at once; a copy where a disk has no links."""
    beside = at.with_name(f".{at.name}.part")
    beside.unlink(missing_ok=True)
    try:
        os.link(path, beside)
    except OSError:
        shutil.copyfile(path, beside)
    beside.replace(at)
    sync_folder(at.parent)


def remove(path: Path) -> None:
    """Take a checkpoint away, which is a folder where DeepSpeed wrote it."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

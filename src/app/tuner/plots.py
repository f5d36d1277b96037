"""What a search saw, as a table and as a picture."""

import csv
from collections.abc import Sequence
from pathlib import Path

from app.pictures import finders
from app.tuner.lr_rules import Suggestion, beta_for, smooth
from app.tuner.search import Answer


def draw_lr(
    lrs: Sequence[float],
    losses: Sequence[float],
    found: Suggestion,
    *,
    key: str,
    path: Path,
) -> None:
    """Write `path`.csv (a line per step, then what each rule says) and `path`.png."""
    visited = lrs[: len(losses)]
    smoothed = smooth(losses, beta=beta_for(len(lrs)))
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["lr", "loss", "smoothed", "rule"])
        writer.writerows(
            [lr, loss, mean, ""] for lr, loss, mean in zip(visited, losses, smoothed, strict=True)
        )
        writer.writerows([lr, "", "", rule] for rule, lr in found.by_rule.items())
    finders.draw_lr(
        visited,
        losses,
        smoothed,
        rules=found.by_rule,
        chosen=found.lr,
        doubt=found.doubt,
        key=key,
        png=path.with_suffix(".png"),
    )


def draw_batch_size(answer: Answer, *, reason: str, key: str, path: Path) -> None:
    """Write `path`.csv (a line per trial) and, where anything was measured, `path`.png."""
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["size", "fits", "peak_bytes", "samples_per_s"])
        for trial in answer.trials:
            writer.writerow([trial.size, trial.fits, trial.peak_bytes, trial.samples_per_s])
    fitting = sorted((t for t in answer.trials if t.fits), key=lambda trial: trial.size)
    measured: dict[str, list[tuple[int, float]]] = {
        "samples / s": [(t.size, t.samples_per_s) for t in fitting if t.samples_per_s is not None],
        "peak memory, GiB": [
            (t.size, t.peak_bytes / 2**30) for t in fitting if t.peak_bytes is not None
        ],
    }
    shown = {label: points for label, points in measured.items() if points}
    if shown:
        finders.draw_batch_size(
            shown,
            refused=[trial.size for trial in answer.trials if not trial.fits],
            size=answer.size,
            reason=reason,
            key=key,
            png=path.with_suffix(".png"),
        )

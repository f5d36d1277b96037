"""What a search saw, as a table and as a picture."""

import csv
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

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
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(visited, losses, color="0.8", label="loss")
    axes.plot(visited, smoothed, color="C0", label="smoothed")
    for position, (rule, lr) in enumerate(found.by_rule.items()):
        if lr is not None:
            width = 2.5 if lr == found.lr else 1.0
            axes.axvline(lr, color=f"C{position + 1}", linewidth=width, label=f"{rule} {lr:.2g}")
    axes.set(xscale="log", xlabel=key, ylabel="loss", title="doubtful" if found.doubt else "")
    low, high = min(smoothed), max(smoothed[: max(2, len(smoothed) // 2)])
    axes.set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low) or None)
    axes.legend()
    figure.savefig(path.with_suffix(".png"))


def draw_batch_size(answer: Answer, *, key: str, path: Path) -> None:
    """Write `path`.csv (a line per trial) and `path`.png."""
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["size", "fits", "peak_bytes", "samples_per_s"])
        for trial in answer.trials:
            writer.writerow([trial.size, trial.fits, trial.peak_bytes, trial.samples_per_s])
    fitting = sorted((t for t in answer.trials if t.fits), key=lambda trial: trial.size)
    measured: dict[str, list[tuple[int, float]]] = {
        "samples / s": [(t.size, t.samples_per_s) for t in fitting if t.samples_per_s is not None],
        "peak memory, bytes": [(t.size, t.peak_bytes) for t in fitting if t.peak_bytes is not None],
    }
    shown = {label: points for label, points in measured.items() if points}
    if not shown:
        return
    figure = Figure(figsize=(6 * len(shown), 4), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False).flat
    for axes, (label, points) in zip(panels, shown.items(), strict=True):
        sizes, values = zip(*points, strict=True)
        axes.plot(sizes, values, marker="o")
        for trial in answer.trials:
            if not trial.fits:
                axes.axvline(trial.size, color="C3", linestyle=":")
        axes.axvline(answer.size, color="C1", label=f"answer {answer.size}")
        axes.set(xscale="log", xlabel=key, ylabel=label)
        axes.legend()
    figure.savefig(path.with_suffix(".png"))

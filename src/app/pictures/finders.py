"""What a finder saw: the point it chose is what one sees first, and why stands above."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from app.pictures.look import COLORS, MUTED, make_logarithmic, styled

INK = "#3a4047"
CHOSEN, REFUSED = COLORS[1], COLORS[3]
CHARACTERS_PER_INCH = 12


def draw_lr(
    lrs: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    *,
    rules: Mapping[str, float | None],
    chosen: float | None,
    doubt: str | None,
    key: str,
    png: Path,
) -> None:
    """Draw the curve of a range test, as far as it went, and what each rule says.

    Args:
        rules: each with its answer; None where it has none.
        doubt: why the answer is not trusted, if it is not.
    """
    from matplotlib.figure import Figure

    said = f"{key}: no answer" if chosen is None else f"{key}={chosen:.3g}"
    with styled():
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.plot(lrs, losses, color="#d5d9de", lw=1.0, label="loss")
        axes.plot(lrs, smoothed, color=INK, lw=1.4, label="smoothed")
        low, high = min(smoothed), max(smoothed[: max(2, len(smoothed) // 2)])
        axes.set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low) or None)
        for lr in {lr for lr in rules.values() if lr not in (None, chosen)}:
            named = ", ".join(rule for rule, other in rules.items() if other == lr)
            axes.axvline(lr, color=MUTED, lw=0.8, ls=":")
            _beside(axes, lr, f" {named} {lr:.2g}")
        if chosen is not None:
            rule = next((rule for rule, lr in rules.items() if lr == chosen), "")
            at = min(range(len(lrs)), key=lambda n: abs(lrs[n] - chosen))
            face = CHOSEN if doubt is None else "white"
            axes.axvline(chosen, color=CHOSEN, lw=1.6)
            axes.plot(
                chosen, smoothed[at], "o", color=CHOSEN, ms=12, mfc=face, mew=2, zorder=5,
                label=f"{rule} {chosen:.3g}",
            )  # fmt: skip
        axes.set(xlabel=key, ylabel="loss")
        make_logarithmic(axes.xaxis, lrs)
        _say(figure, axes, f"{said}, in doubt: {doubt}" if doubt else said)
        axes.legend()
        figure.savefig(png)


def draw_batch_size(
    measured: Mapping[str, Sequence[tuple[int, float]]],
    *,
    refused: Sequence[int],
    size: int,
    reason: str,
    key: str,
    png: Path,
) -> None:
    """Draw what was measured of each size that fits, a panel for each kind.

    Args:
        measured: size and value, by what they are.
        refused: sizes that did not fit.
        size: the answer.
        reason: why it is that one.
    """
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(figsize=(6 * len(measured), 4.2), layout="constrained")
        panels = figure.subplots(1, len(measured), squeeze=False).flat
        for axes, (label, points) in zip(panels, measured.items(), strict=True):
            axes.plot(*zip(*points, strict=True), color=COLORS[0], marker="o", label="fits")
            for number, other in enumerate(refused):
                name = "does not fit" if number == 0 else None
                axes.axvline(other, color=REFUSED, ls=":", lw=1.4, label=name)
            axes.axvline(size, color=CHOSEN, lw=1.6)
            at = [value for tried, value in points if tried == size]
            axes.plot([size] * len(at), at, "o", ms=12, color=CHOSEN, zorder=5, label=f"{size}")
            axes.set(xlabel=key, ylabel=label, ylim=(0, None))
            make_logarithmic(axes.xaxis, [size, *refused, *(tried for tried, _ in points)])
            axes.legend()
        _say(figure, None, f"{key}={size}: {reason}")
        figure.savefig(png)


def _beside(axes: Any, x: float, text: str) -> None:
    """A small text at the top of a vertical line."""
    axes.text(
        x, 0.99, text, transform=axes.get_xaxis_transform(), rotation=90, va="top", ha="right",
        fontsize=8, color=MUTED,
    )  # fmt: skip


def _say(figure: Any, axes: Any, text: str) -> None:
    """A title in as many lines as it takes."""
    width = int(CHARACTERS_PER_INCH * figure.get_figwidth())
    lines = "\n".join(textwrap.wrap(text, width))
    if axes is None:
        figure.suptitle(lines, x=0.02, ha="left", fontsize=11)
    else:
        axes.set_title(lines)

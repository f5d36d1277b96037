"""How pictures look. Needs no matplotlib until one is drawn."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
"""Of Okabe and Ito, told apart by everyone, and on light and dark ground."""

STYLE = Path(__file__).with_suffix(".mplstyle")

MUTED = "#7f7f7f"
"""For what is beside the point."""


MOST_FACTOR = 1e4
"""Between the ends of an axis that has ticks between the powers of ten."""


@contextmanager
def styled() -> Iterator[None]:
    """The look of all pictures, on white."""
    from matplotlib import rc_context

    with rc_context({"axes.edgecolor": "#d5d9de", "grid.color": "#d5d9de"}, fname=STYLE):
        yield


def make_logarithmic(axis: Any, values: Iterable[float]) -> None:
    """Let an axis rise by factors, where all values are above 0; its ticks are plain numbers."""
    known = [value for value in values if isfinite(value)]
    if not known or min(known) <= 0:
        return
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    is_long = max(known) > MOST_FACTOR * min(known)
    axis.set_major_locator(LogLocator(subs=(1.0,) if is_long else (1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FormatStrFormatter("%g"))

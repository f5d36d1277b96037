"""Which metric rows are compared by, and which way is better."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from app.errors import Refused
from app.monitored import mode_of
from app.record.states import State
from app.report.reading import StoredRun


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric, which way is better, and why it was chosen."""

    name: str
    lower_is_better: bool
    why: str
    why_mode: str
    others: tuple[str, ...]


def choose_metric(
    runs: Sequence[StoredRun], *, name: str | None, mode: str | None
) -> Metric | None:
    """The metric named, else the test counterpart of the monitored one, else the monitored one.

    Returns None where no run has finished with a metric.

    Raises Refused where no finished run has the metric named, or the mode is neither min nor max.
    """
    if mode not in (None, "min", "max"):
        raise Refused(f"--mode must be min or max, got {mode}; type --mode max")
    finished = [run for run in runs if run.state == State.finished]
    known = sorted({name for run in finished for name in run.metrics})
    if not known:
        return None
    monitor, monitor_mode = _monitored(runs)
    if name is not None:
        if name not in known:
            raise Refused(
                f"--metric {name} is in no finished run; choose one of {', '.join(known)}"
            )
        why = "as typed"
    else:
        name, why = _default(known, monitor)
    if mode is not None:
        lower, why_mode = mode == "min", "as typed"
    elif monitor is not None and stem(name) == stem(monitor):
        lower, why_mode = monitor_mode == "min", f"callbacks.checkpoint.mode={monitor_mode}"
    else:
        lower, why_mode = is_a_loss(name), "by its name"
    others = tuple(other for other in known if other != name)
    return Metric(name=name, lower_is_better=lower, why=why, why_mode=why_mode, others=others)


def stem(name: str) -> str:
    """The name of a metric without the part that says on what it is measured: `acc`."""
    return re.sub(r"^(raw_)?(train|val|test)_", "", name)


def is_a_loss(name: str) -> bool:
    """Whether a metric's name says that lower is better."""
    return mode_of(name) == "min"


def _monitored(runs: Sequence[StoredRun]) -> tuple[str | None, str | None]:
    """What most runs keep their best checkpoint by."""
    checkpoints = (((run.config or {}).get("callbacks") or {}).get("checkpoint") for run in runs)
    pairs = ((c.get("monitor"), c.get("mode")) for c in checkpoints if c)
    # a class of the user's may mean something else by them
    chosen = Counter(pair for pair in pairs if all(isinstance(word, str) for word in pair))
    return chosen.most_common(1)[0][0] if chosen else (None, None)


def _default(known: Sequence[str], monitor: str | None) -> tuple[str, str]:
    if monitor is not None:
        counterpart = f"test_{stem(monitor)}"
        if counterpart in known:
            return counterpart, f"{monitor}, which callbacks.checkpoint.monitor names, on test data"
        if monitor in known:
            return monitor, "callbacks.checkpoint.monitor names it"
    first = min(known, key=lambda m: (not m.startswith("test_"), not m.startswith("val_"), m))
    return first, "the first by name: no checkpoint is kept by a metric that is here"

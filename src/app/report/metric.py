"""Which metric rows are compared by, and which way is better."""

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass

from app.errors import Refused
from app.monitored import mode_of
from app.record.names import counterpart, stage_of, stem
from app.record.states import State
from app.report.reading import StoredRun


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric, which way is better, and why it was chosen.

    Attributes:
        tested: the metric that measures the same on test data, to be shown beside it.
        others: what else was measured.
    """

    name: str
    lower_is_better: bool
    why: str
    why_mode: str
    tested: str | None
    others: tuple[str, ...]


def choose_metric(
    runs: Sequence[StoredRun], *, name: str | None, mode: str | None
) -> Metric | None:
    """The metric named, else the monitored one, else one of the validation.

    The test chooses nothing, unless that is typed: what wins on it would be the luck of the test.
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
        of_test = {one for run in finished for one in run.metrics if run.is_of_test(one)}
        name, why = _default(known, of_test, monitor)
    tested = None if stage_of(name) == "test" else counterpart(name, "test", known)
    if mode is not None:
        lower, why_mode = mode == "min", "as typed"
    elif monitor is not None and stem(name) == stem(monitor):
        lower, why_mode = monitor_mode == "min", f"callbacks.checkpoint.mode={monitor_mode}"
    else:
        lower, why_mode = is_a_loss(name), "by its name"
    return Metric(
        name=name, lower_is_better=lower, why=why, why_mode=why_mode, tested=tested,
        others=tuple(other for other in known if other not in (name, tested)),
    )  # fmt: skip


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


def _default(known: Sequence[str], of_test: Container[str], monitor: str | None) -> tuple[str, str]:
    if monitor in known and monitor not in of_test:
        return str(monitor), "callbacks.checkpoint.monitor names it"
    order = ("val", None, "train", "test")
    first = min(known, key=lambda name: (name in of_test, order.index(stage_of(name)), name))
    if first in of_test:
        return first, "nothing but the test is measured, and the best of many on it is luck too"
    return first, "the first by name: no checkpoint is kept by a metric that is here"

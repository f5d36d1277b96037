"""Where the metrics of a run are kept: metrics.csv."""

import csv
import io
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor

from app.errors import Unreadable
from app.process.files import read_steps, skipped, write_atomically

MOST_STEPS = 10**18
"""Readers take a longer number for no step."""


class Nothing:
    """Takes any call, item or attribute, and does nothing.

    Args:
        said: what to warn of, once, with the first name that is asked for; None: of nothing.
        log_dir: where TensorBoard's writer and others would say that their files are.
    """

    def __init__(self, said: str | None = None, *, log_dir: str = "") -> None:
        self._said = said
        self.log_dir = self.dir = log_dir

    def get_logdir(self) -> str:
        """As TensorBoard's writer has it."""
        return self.log_dir

    def __getattr__(self, name: str) -> "Nothing":
        if name.startswith("_"):  # Python asks for what it could do with this
            raise AttributeError(name)
        if self._said is not None:
            said, self._said = self._said, None
            rank_zero_warn(said.format(name=name))
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> "Nothing":
        return self

    def __getitem__(self, key: Any) -> "Nothing":
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        """Nothing."""

    def __iter__(self) -> Iterator["Nothing"]:
        return iter(())

    def __enter__(self) -> "Nothing":
        return self

    def __exit__(self, *args: Any) -> None:
        """Nothing."""


class NoLogger(Logger):
    """Stands where nothing is logged, so that what a model does with `self.logger` goes on.

    Args:
        save_dir: folder of the run: what a model writes into `trainer.log_dir` is in there.
    """

    said: str | None = None
    """What to warn of at the first call that is ignored."""

    def __init__(self, *, save_dir: str) -> None:
        super().__init__()
        self._save_dir = save_dir
        self.experiment = Nothing(self.said, log_dir=save_dir)

    @property
    def name(self) -> str:
        """Of the kind of logger."""
        return "none"

    @property
    def version(self) -> str:
        """Empty: a run is logged once."""
        return ""

    @property
    def save_dir(self) -> str:
        """Folder of the run; `root_dir` and `log_dir` are the same."""
        return self._save_dir

    root_dir = log_dir = save_dir

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Nothing."""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the configuration stands in the run's folder."""

    def log_graph(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def __getattr__(self, name: str) -> Any:
        """What another logger may have: `log_image`, `watch`."""
        if name.startswith("_") or name == "experiment":
            raise AttributeError(name)
        return getattr(self.experiment, name)

    def __getitem__(self, index: int) -> "NoLogger":
        return self


class MetricsCsv(NoLogger):
    """One line per logged optimizer step, a column per metric, in `metrics.csv`.

    Lightning's CSVLogger deletes the file when a run is continued; here the lines before the place
    that it goes on from stay. A step of the user's own, as in `self.log("step", float(epoch))`,
    stands in the column `logged_step`. What is no number is left out, and said once.

    Args:
        save_dir: folder of the file.
    """

    said = (
        "{name}: only metrics are kept in metrics.csv, and this is left out; to have it type "
        "logger=tensorboard"
    )

    def __init__(self, *, save_dir: str) -> None:
        super().__init__(save_dir=save_dir)
        self.path = Path(save_dir) / "metrics.csv"
        self._columns: list[str] = []
        self._line: dict[str, Any] = {}
        self._line_start = 0
        self._is_saved = True
        self._is_in_file = False  # the line, as it was before
        self._early: list[dict[str, Any]] = []
        self._first_step: int | None = None
        self._waits = False
        self._trainer: pl.Trainer | None = None
        self._num_steps: Callable[[], int] = int  # 0
        self._left_out: set[str] = set()

    @property
    def name(self) -> str:
        """Of the kind of logger."""
        return "metrics"

    def follow(self, trainer: pl.Trainer, num_steps: Callable[[], int]) -> None:
        """Let a trainer say where it stands; write nothing until it has begun.

        Args:
            num_steps: returns the number of the line that Lightning logs next.
        """
        self._trainer, self._num_steps, self._waits = trainer, num_steps, True

    def begin(self, *, inside_epoch: bool) -> None:
        """Go on from where the trainer stands: lines from there on are written again.

        Args:
            inside_epoch: whether it stands in the line of a batch, which stays.
        """
        if self._waits:
            self._first_step, self._waits = self._num_steps() + inside_epoch, False

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add to the line of an optimizer step, counted from 0; None: to the line under way."""
        found = self._numbers(metrics)
        if not found:
            return
        if "step" in found:
            found["logged_step"] = found.pop("step")
        now = self._num_steps()
        again = False
        if step is None:
            step = self._line.get("step", 0) if self._trainer is None else now
            again = not found.keys().isdisjoint(self._line)
        elif self._is_users(step, now):
            again = step != self._line.get("logged_step")
            found["logged_step"], step = float(step), now
        if self._line and (again or self._line["step"] != step):
            self._close()
        self._line = {**self._line, **found, "step": int(step)}
        self._is_saved = False

    def _is_users(self, step: float, now: int) -> bool:
        """Whether a step is none of the trainer's: a model has logged it as a metric, which
        Lightning then takes for the axis, or it is no number of a line."""
        if step != int(step) or not 0 <= step < MOST_STEPS:
            return True
        if self._trainer is None or step in (now - 1, now):
            return False
        logged = self._trainer.logged_metrics.get("step")
        return logged is not None and int(logged) == step

    def _numbers(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, value in metrics.items():
            if isinstance(value, Mapping):
                found |= self._numbers({f"{name}/{part}": item for part, item in value.items()})
                continue
            try:
                number = value.detach() if isinstance(value, Tensor) else value
                found[name] = value if type(value) in (int, float) else float(number)
            except (TypeError, ValueError, RuntimeError):  # torch's, of a tensor of several numbers
                if name not in self._left_out:
                    self._left_out.add(name)
                    rank_zero_warn(f"metrics.csv holds numbers: {name}, {value!r:.60}, is left out")
        return found

    def _close(self) -> None:
        """Begin a line."""
        self.save()
        if self._waits:
            self._early.append(self._line)
        elif self._columns:
            self._line_start = self.path.stat().st_size
        self._line, self._is_in_file = {}, False

    @rank_zero_only
    def save(self) -> None:
        """Bring the file up to date."""
        if self._is_saved or self._waits:
            return
        if not self._columns or not self._line.keys() <= set(self._columns):
            self._rewrite()
        else:
            with self.path.open("r+", newline="", encoding="utf-8") as file:
                file.seek(self._line_start)
                csv.DictWriter(file, self._columns).writerow(self._line)
                file.truncate()
        self._is_saved = self._is_in_file = True

    @rank_zero_only
    def sync(self) -> None:
        """Let what was written reach the disk: before a checkpoint that goes on from there."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Bring the file up to date."""
        if self._waits:  # the trainer has not begun: but for a test, nothing is written again
            self._first_step = self._num_steps() if status == "success" else MOST_STEPS
            self._waits = False
        self.save()

    def _rewrite(self) -> None:
        lines: list[dict[str, Any]] = list(_read_lines(self.path))
        if not self._columns:
            first = self._line["step"] if self._first_step is None else self._first_step
            lines, self._early = [*_before(lines, first), *self._early], []
            if lines and int(lines[-1]["step"]) == self._line["step"]:
                self._line = {**lines.pop(), **self._line}  # of a validation that is repeated
        elif self._is_in_file:
            lines.pop()
        self._columns = list(dict.fromkeys(name for line in [*lines, self._line] for name in line))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns)
        writer.writeheader()
        writer.writerows(lines)
        self._line_start = len(text.getvalue().encode())
        writer.writerow(self._line)
        write_atomically(self.path, text.getvalue())


def _before(lines: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """The lines before those of a step: in the order of the file, as a model may have logged with
    steps of its own. Lines of the trainer have an epoch."""
    of_trainer = [at for at, line in enumerate(lines) if "epoch" in line]
    known = [at for at in of_trainer if int(lines[at]["step"]) < step]
    last = max(known, default=-1)
    ends = [at for at in of_trainer if int(lines[at]["step"]) >= step]
    ends += [at for at in range(last + 1, len(lines)) if int(lines[at]["step"]) >= step]
    return lines[: min(ends, default=len(lines))]


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a `metrics.csv`, without their empty cells; none where there is no file.

    Raises Unreadable where it is no file, and warns of what is torn: the run itself goes on.
    """
    return [{name: float(cell) for name, cell in line.items()} for line in _read_lines(path)]


def _read_lines(path: Path) -> list[dict[str, str]]:
    lines, torn = [], []
    try:
        for number, line in read_steps(path):
            if line is None:
                torn.append(number)
            else:
                lines.append(line)
    except Unreadable as error:
        if not path.is_file():
            raise
        rank_zero_warn(f"{error}; the file begins anew")
        return []
    if torn:
        rank_zero_warn(f"{path}: {skipped(torn)}")
    return lines

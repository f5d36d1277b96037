"""Where the metrics of a run are kept: metrics.csv, and files for TensorBoard."""

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from app import pip_install
from app.errors import Unreadable
from app.process.files import read_steps, skipped, write_atomically
from app.process.ranks import ranks


def tensorboard_where_installed(*, save_dir: str, name: str, version: str) -> Logger | None:
    """Lightning's TensorBoardLogger; None, said in a line, where TensorBoard is missing."""
    try:
        return TensorBoardLogger(save_dir, name=name, version=version)
    except ModuleNotFoundError:
        if ranks().is_first:
            install = pip_install("tensorboard")
            print(f"no TensorBoard is installed: metrics are in metrics.csv; to have it {install}")
        return None


class MetricsCsv(Logger):
    """One line per logged optimizer step, a column per metric, in `metrics.csv`.

    Lightning's CSVLogger deletes the file when a run is continued; here the lines before the first
    step that is logged again stay.

    Args:
        save_dir: folder of the file.
    """

    def __init__(self, *, save_dir: str) -> None:
        super().__init__()
        self.path = Path(save_dir) / "metrics.csv"
        self._columns: list[str] = []
        self._line: dict[str, Any] = {}
        self._line_start = 0

    @property
    def name(self) -> str:
        """Of the kind of logger."""
        return "metrics"

    @property
    def version(self) -> str:
        """Empty: a run has one file."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any) -> None:
        """Nothing: the configuration stands beside the file."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add to the line of an optimizer step, counted from 0."""
        assert step is not None
        if self._line.get("step") != step:
            self._line = {"step": step}
            self._line_start = self.path.stat().st_size if self._columns else 0
        self._line.update(metrics)

    @rank_zero_only
    def save(self) -> None:
        """Bring the file up to date."""
        if not self._line:
            return
        if not self._columns or not self._line.keys() <= set(self._columns):
            self._rewrite()
            return
        with self.path.open("r+", newline="", encoding="utf-8") as file:
            file.seek(self._line_start)
            csv.DictWriter(file, self._columns).writerow(self._line)
            file.truncate()

    @rank_zero_only
    def sync(self) -> None:
        """Let what was written reach the disk: before a checkpoint that goes on from there."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Bring the file up to date."""
        self.save()

    def _rewrite(self) -> None:
        step = self._line["step"]
        lines = [line for line in _read_lines(self.path) if int(line["step"]) <= step]
        if lines and int(lines[-1]["step"]) == step:
            # of a run that was continued in the midst of the line: it is measured alike again
            self._line = {**lines.pop(), **self._line}
        self._columns = list(dict.fromkeys(name for line in [*lines, self._line] for name in line))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns)
        writer.writeheader()
        writer.writerows(lines)
        self._line_start = len(text.getvalue().encode())
        writer.writerow(self._line)
        write_atomically(self.path, text.getvalue())


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

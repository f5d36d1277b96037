"""What a tracker of runs does beside Lightning's logger: it goes on with its run, and ends none."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from app.errors import Refused, Unreadable
from app.process.files import read_json, write_json
from app.process.ranks import ranks
from app.record.loggers import Nothing

MOST_FAILURES = 3
"""In a row, after which a tracker is left alone until the end: each may wait for a server."""

OF_SWEEPS = ("multirun.yaml", "journal.jsonl")
"""Files by which the folder of a sweep is known."""


class Tracker(Logger):
    """Stands before the logger of Lightning's that it adds to.

    What fails before the first step is refused; later, and in a run that is continued, it is said
    in a line. `trackers.json` in the run's folder holds what the tracker calls the run.

    Attributes:
        service: name of the tracker, as in `logger=`.
        instead: what to type where it cannot begin.
    """

    service: str
    instead: str
    _folder: Path
    _has_begun = False
    _is_lost = False
    _failures = 0

    @property
    def experiment(self) -> Any:
        """Of Lightning's logger; on other ranks, and where lost, what takes all and does nothing.

        Lightning's own for other ranks takes no item, as in `experiment.config["lr"] = 0.1`.
        """
        if not ranks().is_first:
            return Nothing()
        if not self._has_begun:
            self._has_begun = True
            self._begin()
        return Nothing() if self._is_lost else super().experiment  # type: ignore[misc]

    def begin(self) -> None:
        """Begin the run, or go on with it."""
        raise NotImplementedError

    def _begin(self) -> None:
        is_continued = bool(self.noted())
        try:
            self.begin()
        except Exception as error:
            self._is_lost = True
            if not is_continued:
                raise self.refusal(error) from error
            print(f"{self._cannot_begin(error)}; the run goes on without it", flush=True)

    def refusal(self, error: Exception) -> Refused:
        """What to say of a run that the tracker cannot begin."""
        return Refused(f"{self._cannot_begin(error)}; {self.instead}, or use logger=csv")

    def _cannot_begin(self, error: Exception) -> str:
        return f"logger.{self.service} cannot begin: {in_a_line(error)}"

    def noted(self) -> dict[str, Any]:
        """What the tracker calls the run; empty where it has not begun."""
        try:
            found = (read_json(self._notes) or {}).get(self.service)
        except Unreadable as torn:
            print(f"{torn}; {self.service} begins another run")
            return {}
        return found if isinstance(found, dict) else {}

    def note(self, **names: str) -> None:
        """Keep what the tracker calls the run."""
        others = {} if not self.noted() and not self._notes.is_file() else read_json(self._notes)
        self._notes.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._notes, {**(others or {}), self.service: names})

    @property
    def _notes(self) -> Path:
        return self._folder / "trackers.json"

    @property
    def group(self) -> str | None:
        """The last parts of the sweep's folder, where the run is a job of one."""
        sweep = self._folder.absolute().parent
        is_one = any((sweep / name).is_file() for name in OF_SWEEPS)
        return "/".join(sweep.parts[-2:]) if is_one else None

    @property
    def run_name(self) -> str:
        """The run's folder; the job's with the sweep's, where the run is a job of one."""
        return "/".join(self._folder.absolute().parts[-1 if self.group is None else -2 :])

    @contextmanager
    def spared(self) -> Iterator[None]:
        """Let nothing that fails in here end the run."""
        try:
            yield
            self._failures = 0
        except Refused:
            raise
        except Exception as error:
            self._failures += 1
            self._is_lost = self._failures >= MOST_FAILURES
            if self._failures == 1:
                said = f"logger.{self.service} has failed: {in_a_line(error)}"
                print(f"{said}; the run goes on, and metrics.csv has all of it", flush=True)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """As Lightning's."""
        with self.spared():
            super().log_metrics(metrics, step)  # type: ignore[safe-super]

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """As Lightning's."""
        with self.spared():
            super().log_hyperparams(params, *args, **kwargs)  # type: ignore[safe-super]

    def finalize(self, status: str = "") -> None:
        """Nothing: Lightning says this after the fit and after the test, and does not know how the
        run ends."""

    def try_again(self) -> bool:
        """Use a tracker that was lost once more, it may be there again; False where there is no run
        that it knows."""
        self._is_lost, self._failures = False, 0
        return bool(self.noted())


def in_a_line(error: Exception) -> str:
    """What an error says, cut short."""
    return f"{' '.join(str(error).split()) or type(error).__name__:.200}".rstrip(".;: ")

"""A logger that keeps nothing: for a run of which nothing is to stay."""

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import DummyLogger


class Ignores:
    """Takes every call, attribute, item and block, and gives itself: of whatever service it is."""

    def __call__(self, *args: Any, **settings: Any) -> "Ignores":
        return self

    def __getattr__(self, name: str) -> "Ignores":
        if name.startswith("__"):  # what Python asks for, to copy or to pickle it
            raise AttributeError(name)
        return self

    def __getitem__(self, key: Any) -> "Ignores":
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        """Nothing is kept."""

    def __enter__(self) -> "Ignores":
        return self

    def __exit__(self, *error: object) -> None:
        """An error of the block goes on."""


class Silent(DummyLogger):
    """Lightning's logger that keeps nothing, whose `experiment` takes whatever a model asks of it.

    Args:
        folder: `log_dir` and `save_dir`, where a model may write files of its own.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    @property
    def experiment(self) -> Any:
        """Ignores everything."""
        return Ignores()

    @property
    def save_dir(self) -> str:
        return str(self._folder)

    @property
    def log_dir(self) -> str:
        """The same folder."""
        return str(self._folder)

    @property
    def root_dir(self) -> str:
        """The same folder."""
        return str(self._folder)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_folder":
            raise AttributeError(name)
        return Ignores()

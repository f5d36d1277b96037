"""The study that a run may be a trial of: an Optuna study in a file of SQLite. Needs no torch."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from app.errors import Unreadable
from app.process.files import opened
from app.record.names import stage_of

STORAGE = "study.db"
STUDY = "study"
SQLITE = b"SQLite format 3\0"
"""How each of its files begins."""
TIMEOUT_S = 60
PRUNED = "pruned"
"""The user attribute of a trial whose run was to end early."""


def may_be_reported(objective: str) -> bool:
    """Whether a validation may measure it; the test comes after the fit."""
    return stage_of(objective) != "test"


def open_study(path: Path) -> Any:
    """The study in a storage.

    Raises KeyError where there is none, and Unreadable where the file is torn, or no database.
    """
    import optuna

    _refuse_torn(path)
    return optuna.load_study(study_name=STUDY, storage=url(path))


def _refuse_torn(path: Path) -> None:
    file = opened(path)
    if file is None:
        return
    with file:
        head = file.read(len(SQLITE))
    try:
        if head != SQLITE:
            raise sqlite3.DatabaseError("it is no database")
        with closing(sqlite3.connect(path, timeout=TIMEOUT_S)) as database:
            ((said, *_), *_) = database.execute("PRAGMA quick_check")
        if said != "ok":
            raise sqlite3.DatabaseError(said)
    except sqlite3.DatabaseError as error:
        raise Unreadable(path, f"{error}; type another name=, which begins a new study") from None


def url(path: Path) -> str:
    """Of a storage, as SQLAlchemy names it; a writer waits a minute for the others."""
    return f"sqlite:///{path}?timeout={TIMEOUT_S}"

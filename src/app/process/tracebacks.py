"""Errors as they are shown: a traceback begins where the user's code, or Lightning's, does."""

import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

PACKAGE = str(Path(__file__).parents[1]) + "/"
MACHINERY = (*sys.stdlib_module_names, "hydra", "hydra_plugins", "submitit")
"""Modules through which the call of a run goes, beside ours."""


def in_a_line(error: BaseException) -> str:
    """The kind of an error and its text."""
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def shorten(error: BaseException) -> None:
    """Cut off a traceback what leads from the command to the code of somebody else.

    All of it stays where that is torch's: then the fault may be ours.
    """
    for part in _parts(error.__traceback__):
        name = str(part.tb_frame.f_globals.get("__name__")).partition(".")[0]
        if part.tb_frame.f_code.co_filename.startswith(PACKAGE) or name in MACHINERY:
            continue
        if name != "torch":
            error.with_traceback(part)
        return


def trace(error: BaseException) -> str:
    """What Python would print of an error."""
    shorten(error)
    return "".join(traceback.format_exception(error))


def _parts(part: TracebackType | None) -> Iterator[TracebackType]:
    while part is not None:
        yield part
        part = part.tb_next

"""What the name of a metric says: on which data it is measured, and what. Needs no torch.

`val_loss`, `val/loss`, `valid.loss`, `loss-val` and `raw_val/loss` are one loss.
"""

import re
from collections.abc import Iterable

STAGES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "eval"),
    "test": ("test", "testing"),
}
"""The words for each kind of data."""

WORDS = {word: stage for stage, words in STAGES.items() for word in words}
STAGE = re.compile(rf"(?<![^/_.\- ])({'|'.join(WORDS)})(?![^/_.\- ])", re.IGNORECASE)
RAW = "raw_"
"""How the names begin that are measured of raw weights beside an average."""


def stage_of(name: str) -> str | None:
    """train, val or test; None where the name says nothing of it."""
    found = STAGE.search(name)
    return WORDS[found[0].lower()] if found else None


def stem(name: str) -> str:
    """What is measured, without the data that it is measured on, and the weights: `loss`."""
    name = name.removeprefix(RAW)
    found = STAGE.search(name)
    if found is None:
        return name
    before, after = name[: found.start()], name[found.end() :]
    # of `val/loss` the first separator goes with the word, of `loss/val` the last
    return before + after[1:] if after else before[:-1] or name


def counterpart(name: str, stage: str, known: Iterable[str]) -> str | None:
    """The metric of other data that measures the same; None where none does."""
    found = [one for one in known if stage_of(one) == stage and stem(one) == stem(name)]
    found = [one for one in found if not one.startswith(RAW)]
    return min(found, key=lambda one: (_form(one) != _form(name), one), default=None)


def logged_as(name: str, known: Iterable[str]) -> str:
    """The metric of a name as a model logs it: `val/loss` for `val_loss`; the name where none is,
    or several are."""
    known = list(known)
    same = [one for one in known if stage_of(one) == stage_of(name) and stem(one) == stem(name)]
    same = [one for one in same if one.startswith(RAW) == name.startswith(RAW)]
    return same[0] if name not in known and len(same) == 1 else name


def _form(name: str) -> str:
    """The name with a gap in place of the word for the data."""
    return STAGE.sub("\0", name, count=1)

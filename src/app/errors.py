"""What is told to a user in place of a traceback."""

from pathlib import Path


class Refused(ValueError):  # noqa: N818  # reads as the sentence it is
    """What the user typed cannot be done; the text says what to type instead."""


class NoBatch(Refused):
    """There is nothing to train on."""


class Unreadable(Refused):
    """A file is torn, or holds something else than its name says.

    Attributes:
        path: the file.
        reason: what is wrong with it, in one line.
    """

    def __init__(self, path: Path, reason: object) -> None:
        self.path = path
        self.reason = " ".join(str(reason).split()) or type(reason).__name__
        super().__init__(f"{path} cannot be read: {self.reason}")


class RankFailed(RuntimeError):  # noqa: N818  # reads as the sentence it is
    """One of several processes has failed, and the others were ended; the text holds its traceback.

    Attributes:
        rank: the one that failed first.
        error: its error in one line.
    """

    def __init__(self, *, rank: int, error: str, details: str) -> None:
        super().__init__(details)
        self.rank = rank
        self.error = error


def ended_from_outside(rank: int) -> RankFailed:
    """What to say of a rank that has said nothing."""
    error = f"rank {rank} was ended from outside"
    details = (
        f"{error}; was memory short? The other ranks were ended. To go on from the last checkpoint "
        "type the same command with the same name="
    )
    return RankFailed(rank=rank, error=error, details=details)


class JobsFailed(RuntimeError):  # noqa: N818  # reads as the sentence it is
    """Some jobs of a sweep came to nothing; the text lists them."""

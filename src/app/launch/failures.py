"""How ranks fail, and which of them failed first. Needs no torch."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from app.cli.explained import explain, is_told_in_a_line
from app.process.tracebacks import in_a_line, trace

LOST_PEER = ("by peer", "broken pipe", "connection refused", "connection was closed", "nccl",
             "gloo", "remote process", "ended from outside")  # fmt: skip
"""What torch says, in lower case, on a rank that fails because another one is gone."""

HEAD_START_S = 1.0
"""How long such a rank waits before it exits, so that the one that failed first is found first."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """How a rank ended that raised."""

    rank: int
    at: float
    error: str
    trace: str
    exit_code: int | None  # of a SystemExit
    refusal: str | None
    is_of_a_lost_peer: bool


def failure_of(error: BaseException, rank: int) -> Failure:
    """What is told of an exception."""
    text = in_a_line(error)
    return Failure(
        rank=rank,
        at=time.time(),
        error=text,
        trace=trace(error),
        exit_code=int(error.code or 0) if isinstance(error, SystemExit) else None,
        refusal=explain(error) if is_told_in_a_line(error) else None,
        is_of_a_lost_peer=isinstance(error, RuntimeError)
        and any(words in text.lower() for words in LOST_PEER),
    )


def first_of(failures: Sequence[Failure]) -> Failure:
    """The one that came first, not those of ranks that left or lost their peer because of it."""
    return min(failures, key=lambda f: (f.is_of_a_lost_peer, (f.exit_code or 0) > 128, f.at))

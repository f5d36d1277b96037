"""What a line of a sweep's journal may hold. Needs no torch.

`{"event": "sweep", command, cwd, definition, hash, jobs, time}` says which sweep it is,
`{"event": "job", job, overrides, folder, state, attempt, device, seconds, error, value, time}` what
has changed of a job, and `{"event": "end", time}` that the launcher has told what it came to.
"""

import re
from collections.abc import Callable
from typing import Any

from app.process.files import parsed_json
from app.record.states import State

STATES = [state for state in State if not state.has_no_result]


def _is_word(value: Any) -> bool:
    """Whether it can be in a command, or name a file: without NUL and half characters."""
    return isinstance(value, str) and not re.search("[\0\ud800-\udc7f\udd00-\udfff]", value)


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_word, value))


def _is_word_or_none(value: Any) -> bool:
    return value is None or _is_word(value)


def _is_number_or_none(value: Any) -> bool:
    return isinstance(value, int | float | None)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_definition(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _is_word_or_none(value.get("config", 0))
        and all(_is_words(value.get(name)) for name in ("config_dirs", "overrides"))
    )


EVENTS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "sweep": {
        "command": lambda value: _is_words(value) and len(value) > 0,
        "cwd": _is_word,
        "definition": _is_definition,
        "hash": _is_word,
        "jobs": lambda value: isinstance(value, list) and all(map(_is_words, value)),
    },
    "job": {
        "job": _is_count,
        "overrides": _is_words,
        "folder": _is_word_or_none,
        "state": lambda value: value in STATES,
        "attempt": _is_count,
        "device": _is_word_or_none,
        "seconds": _is_number_or_none,
        "error": lambda value: isinstance(value, str | None),
        "value": _is_number_or_none,
    },
    "end": {},
}
"""What each key of an event holds. A job's has those that have changed, the others have all."""


def event_in(line: bytes) -> dict[str, Any] | None:
    """The event of a line; None where it is torn, or none that we write."""
    try:
        event = parsed_json(line)
        shape = EVENTS[event["event"]]
    except (ValueError, KeyError, TypeError):
        return None
    needed = {"job"} if event["event"] == "job" else shape.keys()
    is_ours = needed <= event.keys() and all(
        holds(event[name]) for name, holds in shape.items() if name in event
    )
    return dict(event) if is_ours else None

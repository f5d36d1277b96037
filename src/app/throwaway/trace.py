"""What a throwaway run leaves in the process, beside its own objects, and how it goes away."""

import logging
import os
import sys
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from app.process.targets import located, named_in
from app.sharing.key import INSTALLED, sources

PLAIN = (bool, int, float, complex, str, bytes, type(None), tuple)
HOLDS = (dict, list, set, deque)


@contextmanager
def left_as_found(config: Any) -> Iterator[None]:
    """Run a block, after which the environment, and what the user's modules and classes keep in
    themselves, are as before: counts, caches and lists. Not what is deeper in these. Of what our
    own log says of it, warnings alone are heard.

    Args:
        config: plain; the modules are those of its classes, and what they import.
    """
    found = (located("", name) for name in named_in(config))
    modules, _ = sources({str(getattr(one, "__module__", None)) for one in found})
    owners = list(_owners(modules))
    before = [(owner, _plain(owner)) for owner in owners]
    copies = {
        id(value): (value, value.copy())
        for _, values in before
        for value in values.values()
        if isinstance(value, HOLDS)
    }
    environment = dict(os.environ)
    ours = logging.getLogger("app")
    level = ours.level
    ours.setLevel(logging.WARNING)
    try:
        yield
    finally:
        ours.setLevel(level)
        for owner, values in before:
            now = _plain(owner)
            for name in now.keys() - values.keys():
                delattr(owner, name)
            for name, value in values.items():
                if name not in now or now[name] is not value:
                    setattr(owner, name, value)
        for value, copy in copies.values():
            value.clear()
            getattr(value, "extend" if isinstance(value, list | deque) else "update")(copy)
        if environment != dict(os.environ):
            os.environ.clear()
            os.environ.update(environment)


def _owners(modules: Collection[str]) -> Iterator[Any]:
    """Modules, and the classes that they define."""
    for name in modules:
        is_of_user = not INSTALLED.search(str(sys.modules[name].__file__))
        if is_of_user and not name.startswith("app."):
            yield sys.modules[name]
            yield from (
                value
                for value in list(vars(sys.modules[name]).values())
                if isinstance(value, type) and value.__module__ == name
            )


def _plain(owner: Any) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(owner).items()
        if not name.startswith("__") and (type(value) in PLAIN or isinstance(value, HOLDS))
    }

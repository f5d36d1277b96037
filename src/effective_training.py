"""Names what hides this package from `python -m app.train`, which Python itself does not say.

Python looks for `app` in the working directory first. `effective_training.pth` imports this before
it looks, wherever `-m` is typed.
"""

import os
import sys


def hiding(module: str) -> str | None:
    """The file or folder `app` of the user's that hides `module`; None where it has one itself."""
    path = module.replace(".", os.sep)
    has_it = os.path.exists(f"{path}.py") or os.path.exists(path)
    found = [name for name in ("app/__init__.py", "app.py") if os.path.exists(name)]
    return os.path.abspath(found[0].removesuffix("/__init__.py")) if found and not has_it else None


def refuse_hidden(words: list[str]) -> None:
    """End the process with 2 where these start a module of ours that cannot be found."""
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    path = hiding(module) if module.startswith("app.") and not sys.flags.safe_path else None
    if path is not None:
        said = f"{path} hides the package app, of which {module} is a module; rename it, or type"
        print(f"{said} python -P -m {module}", file=sys.stderr)
        os._exit(2)  # an exception would be told as one of Python's own start


refuse_hidden(sys.orig_argv)

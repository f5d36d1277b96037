"""Makes a project of your own, with model, data, presets and a test: `python -m app.new PATH`.

A folder that this package is used from: it runs as it is, and all of it is yours.
"""

import keyword
import re
import shlex
import shutil
import sys
from collections.abc import Set
from fnmatch import fnmatch
from importlib.machinery import PathFinder
from pathlib import Path

from app.cli import Parser
from app.cli.presets import project_files
from app.errors import Refused

PLACEHOLDER = "myproject"
"""The name of the package in the files that are copied."""

NAME = re.compile(r"[A-Za-z]([A-Za-z0-9_]*[A-Za-z0-9])?")
"""What Python imports, and pip takes as a name too."""


def main(arguments: list[str]) -> None:
    """What was typed after `python -m app.new`."""
    parser = Parser(prog="python -m app.new", description=__doc__)
    parser.add_argument("path", type=Path, metavar="PATH", help="of the project; new or empty")
    parser.add_argument("--package", metavar="NAME", help="else it is the last part of PATH")
    try:
        typed = parser.parse_args(arguments)
        made = make(typed.path, typed.package or typed.path.resolve().name)
    except Refused as refusal:
        print(f"new: {refusal}", file=sys.stderr)
        sys.exit(2)
    print(*(f"  {path}" for path in made), sep="\n")
    is_this = Path(shutil.which("python") or "").parent == Path(sys.executable).parent
    python, with_it = ("python", "") if is_this else (sys.executable, f" PYTHON={sys.executable}")
    print(f"\ncd {shlex.quote(str(typed.path))}")
    print(f"{python} -m app.train experiment=first\nmake test{with_it}")


def make(path: Path, package: str) -> list[Path]:
    """Write the files of a project; return their paths. Raises Refused where it cannot be made."""
    contents = files()
    taken = {name.partition("/")[0] for name in contents} - {PLACEHOLDER} | {"runs", "multirun"}
    rule = _refusal(package, taken)
    if rule is not None:
        name = re.sub(r"[^a-z0-9]+", "_", package.lower()).strip("_")
        name = name if _refusal(name, taken) is None else f"my_{name or 'project'}"
        place = shlex.quote(str(path))
        raise Refused(f"{rule}, got {package}; type python -m app.new {place} --package {name}")
    made = [path / name.replace(PLACEHOLDER, package) for name in contents]
    try:
        held = {item.name for item in path.iterdir()} - {".git"} if path.exists() else set()
        if held:
            raise Refused(f"PATH must be new or empty, got {path}, which holds {min(held)}")
        for file, text in zip(made, contents.values(), strict=True):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text.replace(PLACEHOLDER, package))
    except OSError as error:
        where = f"{error.filename or path}: {(error.strerror or str(error)).lower()}"
        raise Refused(f"PATH must be a folder that can be written to, got {where}") from None
    return made


def files() -> dict[str, str]:
    """What is copied: paths in the project, and texts, without what its `.gitignore` names."""
    folder = project_files()
    ignored = [line.strip("/") for line in (folder / ".gitignore").read_text().split()]
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path): (folder / path).read_text()
        for path in paths
        if not any(fnmatch(part, name) for part in path.parts for name in ignored)
    }


def _refusal(package: str, taken: Set[str]) -> str | None:
    """The rule that the name of a package breaks."""
    if not NAME.fullmatch(package) or keyword.iskeyword(package):
        return "the package must have a name that Python imports"
    elsewhere = [place for place in sys.path if Path(place).resolve() != Path.cwd()]
    if package in sys.stdlib_module_names | taken or PathFinder.find_spec(package, elsewhere):
        return "the package must have a name that no other has"
    return None


if __name__ == "__main__":
    main(sys.argv[1:])

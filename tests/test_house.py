"""Every file imports only what stands below its room, and the rooms stay small."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
HOUSE = SRC / "app"

FLOORS = (
    {"errors", "process"},
    {"blocks", "cli", "config", "matrix", "monitored"},
    {"parallel"},
    {"accumulate", "averaging", "clip", "compile", "data", "memory", "models", "optim",
     "precision", "sharing", "strategy"},
    {"logger", "record", "resume", "screen"},
    {"begin"},
    {"pictures", "run"},
    {"stop", "throwaway"},
    {"tuner"},
    {"launch"},
    {"fit"},
    {"slurm"},
    {"sweep"},
    {"check", "evaluate", "library", "new", "report", "train", "tune"},
)  # fmt: skip
"""The rooms, from the lowest floor to the entry points."""

ENTRY_POINTS = ("check", "evaluate", "new", "train", "tune")
FLAT_FILES = 20
FILE_LINES = 350
ROOM_LINES = 1500
ENTRY_LINES = 80


def module_of(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in sorted(HOUSE.rglob("*.py"))}


def imported(path: Path) -> Iterator[str]:
    """The modules of ours that a file imports, wherever in it: also where it is asked for late."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports by a relative name"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if (found := name if name in FILES else node.module) in FILES:
                    yield found


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def floor_of(module: str) -> int:
    if module == "app.sweep.__main__":  # an entry point
        return len(FLOORS) - 1
    return next(i for i, rooms in enumerate(FLOORS) if room_of(module) in rooms)


def code_lines(path: Path) -> int:
    """Lines that hold code: neither blank, nor comments, nor docstrings."""
    text = path.read_text()
    lines = {n for n, line in enumerate(text.splitlines(), 1) if line.split("#")[0].strip()}
    for node in ast.walk(ast.parse(text)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


GRAPH = {name: {*imported(path)} - {"app"} for name, path in FILES.items() if name != "app"}


def test_every_file_has_a_room() -> None:
    rooms = {room_of(name) for name in FILES} - {""}
    assert rooms == set().union(*FLOORS)


@pytest.mark.parametrize("module", GRAPH)
def test_a_file_imports_nothing_above_its_room(module: str) -> None:
    above = [found for found in GRAPH[module] if floor_of(found) > floor_of(module)]
    assert not above


@pytest.mark.parametrize("of_rooms", [False, True])
def test_there_is_no_circle(of_rooms: bool) -> None:
    graph: dict[str, set[str]] = {}
    for module, found in GRAPH.items():
        if of_rooms:
            room = "an entry point" if floor_of(module) == len(FLOORS) - 1 else room_of(module)
            graph.setdefault(room, set()).update({*map(room_of, found)} - {room_of(module)})
        else:
            graph[module] = found
    done: set[str] = set()

    def walk(node: str, path: tuple[str, ...]) -> None:
        assert node not in path, " -> ".join((*path[path.index(node) :], node))
        if node not in done:
            for found in graph.get(node, ()):
                walk(found, (*path, node))
            done.add(node)

    for node in graph:
        walk(node, ())


def test_rooms_and_files_are_small() -> None:
    lines = {name: code_lines(path) for name, path in FILES.items()}
    assert {name: n for name, n in lines.items() if n > FILE_LINES} == {}
    rooms: dict[str, int] = {}
    for name, number in lines.items():
        rooms[room_of(name)] = rooms.get(room_of(name), 0) + number
    assert {room: n for room, n in rooms.items() if n > ROOM_LINES} == {}
    assert all(lines[f"app.{name}"] <= ENTRY_LINES for name in ENTRY_POINTS)


def test_the_architecture_names_every_flat_file_and_room() -> None:
    flat = sorted(path.name for path in HOUSE.glob("*.py"))
    assert len(flat) <= FLAT_FILES
    said = (SRC.parent / "ARCHITECTURE.md").read_text()
    rooms = sorted(path.parent.name for path in HOUSE.glob("*/__init__.py"))
    assert [
        name for name in (*flat, *(f"{room}/" for room in rooms)) if f"`{name}`" not in said
    ] == []

"""Files that are whole after a power cut, and what is told of those that are not. No torch."""

import csv
import errno
import fcntl
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

from app.errors import Unreadable

LARGEST_BYTES = 1 << 22
"""The most that a file may have which is read as a whole: what we write has some thousand."""

MOST_LEVELS = 100
MOST_KEYS = 10_000
"""What a file may hold: ours hold some ten levels and some hundred keys."""
DEEP = f"it has more than {MOST_LEVELS} levels, as none of ours has"

Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` at the end of the block.

    It is written beside, then renamed: a reader finds the old content or the new one, whole, also
    after a power cut. Where the block raises, the old one stays.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # none is known of a write
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace the content of a file; see `replacing`."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace the content of a file by indented JSON."""
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def sync_folder(folder: Path) -> None:
    """Let names that were made or renamed in a folder reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(descriptor)


def write_to(path: Path) -> None:
    """Append what this process and its own print to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.close(log)


def opened(path: Path) -> IO[bytes] | None:
    """A file to be read; None where there is none. Waits for nobody, as opening a pipe would.

    Raises Unreadable.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        if path.is_symlink():
            raise Unreadable(path, "it is a link to what is not there") from None
        return None
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise Unreadable(path, why(error)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Unreadable(path, "it is no file, but a folder or a device")
    return os.fdopen(descriptor, "rb")


def why(error: Exception) -> str:
    """What an error of the operating system says, in words."""
    return (getattr(error, "strerror", None) or str(error)).lower()


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a file; False where there is none. Raises Unreadable."""
    file = opened(path)
    if file is None:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError as error:
            raise Unreadable(path, why(error)) from None
    return False


def read_bytes(path: Path) -> bytes | None:
    """The content of a file; None where there is none. Raises Unreadable."""
    file = opened(path)
    if file is None:
        return None
    with file:
        try:
            content = file.read(LARGEST_BYTES + 1)
        except OSError as error:
            raise Unreadable(path, why(error)) from None
    if len(content) > LARGEST_BYTES:
        raise Unreadable(path, f"it has more than {LARGEST_BYTES} bytes, as none of ours has")
    return content


def read_json(path: Path) -> dict[str, Any] | None:
    """The mapping in a JSON file; None where there is no file. Raises Unreadable."""
    return _mapping(path, parsed_json)


def read_yaml(path: Path) -> dict[str, Any] | None:
    """The mapping in a YAML file; None where there is no file. Raises Unreadable."""
    return _mapping(path, _parsed_yaml)


def read_yaml_list(path: Path) -> list[str] | None:
    """The texts listed in a YAML file; None where there is no file. Raises Unreadable."""
    content = _parsed(path, _parsed_yaml, list, "a list")
    return None if content is None else [str(item) for item in content]


def read_steps(path: Path) -> Iterator[tuple[int, dict[str, str] | None]]:
    """Number and cells of each line of a CSV file of numbers with a column `step`, if it is there.

    Cells without a value are left out. In place of the cells of a line that is torn stands None.

    Raises Unreadable where it is no such file.
    """
    file = opened(path)
    if file is None:
        return
    with file:
        lines = csv.reader(_texts(path, file))
        heads: list[str] | None = None
        while True:
            try:
                cells = next(lines)
            except StopIteration:
                break
            except csv.Error:
                cells = []
            if heads is not None:
                yield lines.line_num, _numbers(heads, cells)
            elif "step" in cells:
                heads = cells
            else:
                raise Unreadable(path, "its first line names no column step")
    if heads is None:
        raise Unreadable(path, "it holds nothing")


def skipped(numbers: list[int]) -> str:
    """Which lines of a file are left out, in words."""
    lines = "1 line is" if len(numbers) == 1 else f"{len(numbers)} lines are"
    listed = ", ".join(map(str, numbers[:20])) + (", ..." if len(numbers) > 20 else "")
    return f"{lines} torn, or none of ours, and skipped: {listed or 'none'}"


def _texts(path: Path, file: IO[bytes]) -> Iterator[str]:
    """The lines of a text, with what stands for what is none of it."""
    try:
        while line := file.readline(LARGEST_BYTES):
            if len(line) == LARGEST_BYTES:
                raise Unreadable(path, f"a line has more than {LARGEST_BYTES} bytes")
            yield line.decode("utf-8-sig", "replace").replace("\0", "\ufffd")
    except OSError as error:
        raise Unreadable(path, why(error)) from None


def _numbers(heads: list[str], cells: list[str]) -> dict[str, str] | None:
    found = {head: cell for head, cell in zip(heads, cells, strict=False) if cell}
    step = found.get("step", "")
    is_whole = len(cells) == len(heads) and step.isdecimal() and len(step) < 19
    return found if is_whole and all(map(_is_number, found.values())) else None


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def parsed_json(text: str | bytes) -> Any:
    """The content of a JSON text. Raises ValueError where it is none, or none that we write."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(DEEP) from None
    _refuse_foreign(content)
    return content


def _parsed_yaml(text: str) -> Any:
    if "&" in text or sum(map(text.count, "[{?-")) > MOST_LEVELS:
        _refuse_shared_or_deep(text)
    content = yaml.load(text, Loader=Loader)
    _refuse_foreign(content)
    return content


def _refuse_shared_or_deep(text: str) -> None:
    """Raise ValueError before it is loaded: of aliases a few lines can stand for more than a memory
    holds, and of many levels libyaml ends the process."""
    depth = 0
    for event in yaml.parse(text, Loader=Loader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_LEVELS:
            raise ValueError(DEEP)
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it refers to parts of itself, as none of ours does")


def _refuse_foreign(content: Any) -> None:
    """Raise ValueError where parsed content holds other kinds than ours, or far more of them."""
    level, num_keys = [content], 0
    for _ in range(MOST_LEVELS):
        mappings = [one for one in level if isinstance(one, dict)]
        lists = [one for one in level if isinstance(one, list)]
        values = [one for one in level if not isinstance(one, dict | list | None)]
        keys = [key for one in mappings for key in one]
        for scalar in (*keys, *values):
            if not isinstance(scalar, str | int | float):
                raise ValueError(f"it holds a {type(scalar).__name__}, as none of ours does")
            if isinstance(scalar, int) and scalar.bit_length() > 64:
                raise ValueError("it holds a number of more than 64 bits, as none of ours does")
        num_keys += len(keys)
        if num_keys > MOST_KEYS:
            raise ValueError(f"it has more than {MOST_KEYS} keys, as none of ours has")
        level = [one for inside in (*(m.values() for m in mappings), *lists) for one in inside]
        if not level:
            return
    raise ValueError(DEEP)


def _mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any] | None:
    content = _parsed(path, parse, dict, "a mapping")
    return None if content is None else {str(key): value for key, value in content.items()}


def _parsed(path: Path, parse: Callable[[str], Any], kind: type, words: str) -> Any:
    content = read_bytes(path)
    if content is None:
        return None
    if not content.strip(b"\0 \r\n\t"):
        raise Unreadable(path, "it holds nothing" if not content.strip(b"\0") else "it is blank")
    try:
        found = parse(content.decode("utf-8-sig"))
    except (ValueError, yaml.YAMLError) as error:
        raise Unreadable(path, error) from None
    except Exception as error:  # of PyYAML, whose `!!int ""` is an IndexError, and others others
        raise Unreadable(path, f"a value is not what its tag says: {error!r}") from None
    if not isinstance(found, kind):
        held = "nothing" if found is None else f"a {type(found).__name__}"
        raise Unreadable(path, f"it holds {held} where {words} belongs")
    return found

"""Files that are whole after a power cut, and what is told of those that are not. No torch."""

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

from app.errors import Unreadable

LARGEST_BYTES = 1 << 26
"""Of a file that is read as a whole: what we write has some thousand bytes."""

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


def read_json(path: Path) -> dict[str, Any] | None:
    """The mapping in a JSON file; None where there is no file. Raises Unreadable."""
    return _mapping(path, _parsed(path, json.loads))


def read_yaml(path: Path) -> dict[str, Any] | None:
    """The mapping in a YAML file; None where there is no file. Raises Unreadable."""
    return _mapping(path, _parsed(path, _plain_yaml))


def read_yaml_list(path: Path) -> list[str] | None:
    """The texts listed in a YAML file; None where there is no file. Raises Unreadable."""
    content = _parsed(path, _plain_yaml)
    if content is not None and not isinstance(content, list):
        raise Unreadable(path, f"it holds {_kind(content)} where a list belongs")
    return None if content is None else [str(item) for item in content]


def _parsed(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > LARGEST_BYTES:
                raise Unreadable(path, f"it is {size / 1e6:.0f} MB long, which none of ours is")
            content = file.read(LARGEST_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Unreadable(path, (error.strerror or str(error)).lower()) from None
    if not content.strip(b"\0 \r\n\t"):
        raise Unreadable(path, "it holds nothing" if not content.strip(b"\0") else "it is blank")
    try:
        return parse(content.decode())
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise Unreadable(path, error) from None


def _plain_yaml(text: str) -> Any:
    """Parsed without aliases, of which a few lines can stand for more than a memory holds."""
    if "&" in text:
        events = yaml.parse(text, Loader=Loader)
        if any(isinstance(event, yaml.AliasEvent) for event in events):
            raise ValueError("it refers to parts of itself, as none of ours does")
    return yaml.load(text, Loader=Loader)


def _mapping(path: Path, content: Any) -> dict[str, Any] | None:
    if content is None and not path.exists():
        return None
    if not isinstance(content, dict):
        raise Unreadable(path, f"it holds {_kind(content)} where a mapping belongs")
    return {str(key): value for key, value in content.items()}


def _kind(content: Any) -> str:
    return "nothing" if content is None else f"a {type(content).__name__}"

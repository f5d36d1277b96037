"""A folder of data that were set up before: mapped by every process that wants the same.

KEY-NEEDS.pack  an object as a pickle, what it depends on, and which memory it views
HASH.bin        such memory, named by its content: data of another seed or batch size share it
KEY.lock        held while the data are set up; files.lock while files are written
*.part          a file that is being written

Like a checkpoint, a pack may run code when it is read. So the folder and the files are the user's
alone, and those of others are not read. The folder may be removed when no run starts.
"""

import fcntl
import json
import logging
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from app.errors import Refused
from app.sharing.packing import Packed, Plan
from app.sharing.regions import InFile, NoSpace, allocate, map_region, readable

log = logging.getLogger(__name__)

HEAD = struct.Struct("<8sIQ")  # name of the format, CRC-32 of all behind it, size of the facts
FORMAT = b"app data"


class Damaged(Exception):  # noqa: N818  # reads as the sentence it is
    """A file is not what was written; the text says why."""


@dataclass
class Turn:
    """The right to set up the data of a key.

    Attributes:
        failed: whether they cannot be kept; those who wait for their turn meanwhile then set up
            their own at once, not one after the other.
    """

    failed: bool


class Store:
    """The folder; it is made when something is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, key: str, is_broken: Callable[[Mapping[str, Any]], str | None]) -> Packed | None:
        """What was kept by a key and whose needs are not broken; None where there is nothing."""
        for path in sorted(self.folder.glob(f"{key}-*.pack")):
            try:
                facts, skeleton = _read(path)
                why = is_broken(facts["needs"])
                if why is None:
                    regions = [self._region(*blob) for blob in facts["blobs"]]
                    return Packed(skeleton=skeleton, chunks=[*map(map_region, regions)])
                log.debug(f"sharing: {path} is not used: {why}")
            except Damaged as damage:
                log.warning(f"sharing: {path} is not used: {damage}; the data are set up anew")
            except FileNotFoundError:
                continue
        return None

    @contextmanager
    def turn(self, key: str) -> Iterator[Turn]:
        """Wait until no other process sets up the data of a key."""
        self.make_folder()
        with (self.folder / f"{key}.lock").open("a+") as file:
            had_to_wait = False
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                had_to_wait = True
                log.info("sharing: waiting for another process, which sets up the same data")
                fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            turn = Turn(failed=had_to_wait and bool(file.read()))
            if turn.failed:
                fcntl.flock(file, fcntl.LOCK_UN)
                yield turn
                return
            file.truncate(0)
            yield turn
            if turn.failed:
                file.write("failed")

    def keep(
        self, key: str, needs: Mapping[str, Any], plan: Plan, *, before_writing: Callable[[], None]
    ) -> Packed:
        """Write a plan, and map it. NoSpace, with nothing written, where the disk is too small.

        Args:
            before_writing: called when nothing can fail any more; may let go of the data.
        """
        names = [plan.digest(number) for number in range(len(plan.sizes))]
        with self._writing():
            chunks = {name: number for number, name in enumerate(names)}
            missing = [n for name, n in chunks.items() if not self._holds(name, plan.sizes[n])]
            needed = sum(plan.sizes[number] for number in missing) + len(plan.skeleton)
            if needed > self.free():
                raise NoSpace(needed=needed, free=self.free())
            parts = [self._new_part(names[n], plan.sizes[n]) for n in missing]
            before_writing()
            for number, part in zip(missing, parts, strict=True):
                size = plan.sizes[number]
                memory = torch.from_file(str(part), shared=True, size=size, dtype=torch.uint8)
                plan.write(number, memory.numpy())
                del memory
                _settle(part, self._blob(names[number]))
            blobs = [(name, *_stamp(self._blob(name))) for name in names]
            facts = json.dumps({"needs": needs, "blobs": blobs}).encode()
            suffix = sha256(json.dumps(needs, sort_keys=True).encode()).hexdigest()[:8]
            path = self.folder / f"{key}-{suffix}.pack"
            content = facts + plan.skeleton
            part = self.folder / f"{path.name}.part"
            with open(part, "wb", opener=_private) as file:
                file.write(HEAD.pack(FORMAT, zlib.crc32(content), len(facts)) + content)
            _settle(part, path)
            regions = [self._region(*blob) for blob in blobs]
            log.info(f"sharing: {readable(plan.num_bytes)} of data are in {path}")
            return Packed(skeleton=plan.skeleton, chunks=[*map(map_region, regions)])

    def free(self) -> int:
        """Bytes free on the disk."""
        return shutil.disk_usage(self.folder).free

    def make_folder(self) -> None:
        """Make sure of it. ValueError where it cannot be written to."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            is_usable = os.access(self.folder, os.W_OK | os.X_OK)
        except (PermissionError, FileExistsError, NotADirectoryError):
            is_usable = False
        if not is_usable:
            raise Refused(
                f"sharing.cache must be a folder that you may write to, got {self.folder}; type "
                "sharing.cache=PATH, or use sharing=none"
            )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with (self.folder / "files.lock").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._remove_parts()  # of processes that were killed: we alone write
            try:
                yield
            finally:
                self._remove_parts()

    def _remove_parts(self) -> None:
        for part in self.folder.glob("*.part"):
            with suppress(FileNotFoundError):
                part.unlink()

    def _blob(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def _holds(self, name: str, size: int) -> bool:
        """Whether the folder holds these bytes, which are read to be sure."""
        path = self._blob(name)
        if not path.exists() or path.stat().st_size != size or not _is_ours(path):
            return False
        found: Any = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        return sha256(found.numpy()).hexdigest() == name

    def _new_part(self, name: str, size: int) -> Path:
        part = self.folder / f"{name}.bin.part"
        with open(part, "wb", opener=_private) as file:
            allocate(file.fileno(), size, free=self.free)
        return part

    def _region(self, name: str, size: int, changed_ns: int) -> InFile:
        path = self._blob(name)
        if not path.exists():
            raise Damaged(f"{path.name} is missing")
        if not _is_ours(path):
            raise Damaged(f"{path.name} belongs to another user")
        if _stamp(path) != (size, changed_ns):
            raise Damaged(f"{path.name} has changed since it was written")
        return InFile(name=name, path=str(path.absolute()), size=size)


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    """The facts and the pickle of a pack that this user wrote."""
    if not _is_ours(path):
        raise Damaged("it belongs to another user")
    with path.open("rb") as file:
        head, content = file.read(HEAD.size), file.read()
    if len(head) < HEAD.size:
        raise Damaged("it is damaged: cut off")
    name, checksum, size = HEAD.unpack(head)
    if name != FORMAT or zlib.crc32(content) != checksum:
        raise Damaged("it is damaged: its checksum is wrong")
    return json.loads(content[:size]), content[size:]


def _is_ours(path: Path) -> bool:
    return path.stat().st_uid == os.geteuid()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)


def _settle(part: Path, path: Path) -> None:
    """Give a file that is written its name: whoever finds the name finds all of it."""
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(path)


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns

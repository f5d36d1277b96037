"""A folder of data that were set up before: mapped by every process that wants the same.

KEY.pack   an object as a pickle, and which memory it views; KEY-STATE.pack where it was drawn
HASH.bin   such memory, named by its content: data of another seed or batch size share it
KEY.lock   held while the data are set up; files.lock while files are written
*.part     a file that is being written

Like a checkpoint, a pack may run code when it is read. So the folder and the files are the user's
alone, and those of others are not read. The folder may be removed when no run starts.
"""

import fcntl
import logging
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import torch

from app.errors import Refused
from app.sharing.memory import Array, NoSpace, Private, readable
from app.sharing.packing import Packed, Plan, Use

log = logging.getLogger(__name__)


class Damaged(Exception):  # noqa: N818  # reads as the sentence it is
    """A file is not what was written; the text says why."""


class Store:
    """The folder; it is made when something is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def take(self, name: str, use: Use) -> bool:
        """Use what was kept by a name; False where there is nothing, or it cannot be used."""
        path = self.folder / f"{name}.pack"
        try:
            use(self._read(path))
        except FileNotFoundError:
            return False
        except Exception as error:  # whatever the objects of a pack raise
            log.warning(f"sharing: {path} is not used: {error}; the data are set up anew")
            return False
        return True

    @contextmanager
    def turn(self, key: str) -> Iterator[bool]:
        """Wait until no other process sets up the data of a key; whether that has failed to keep
        them. Those who have waited for it then set up at once, not one after the other."""
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
            if had_to_wait and file.read():
                fcntl.flock(file, fcntl.LOCK_UN)
                yield True
                return
            file.truncate(0)
            try:
                yield False
            except Private:
                file.write("failed")
                raise

    def keep(self, name: str, plan: Plan, use: Use) -> None:
        """Write a plan, map it, and use it. NoSpace, with nothing written, on too small a disk."""
        names = [plan.digest(number) for number in range(len(plan.sizes))]
        with self._writing():
            sizes = dict(zip(names, plan.sizes, strict=True))
            missing = [blob for blob, size in sizes.items() if not self._holds(blob, size)]
            needed, free = sum(sizes[blob] for blob in missing), shutil.disk_usage(self.folder).free
            if needed + len(plan.skeleton) > free:
                needs = f"{readable(needed)} are needed in {self.folder}"
                instead = "type sharing.cache=PATH for another disk"
                raise NoSpace(f"{needs}, and its disk has {readable(free)} free", instead)
            for blob in missing:
                with self._new(f"{blob}.bin") as file:
                    os.posix_fallocate(file.fileno(), 0, sizes[blob])  # or a write ends in SIGBUS
                    memory = _mapped(Path(file.name), sizes[blob], shared=True)
                    plan.write(names.index(blob), memory)
            blobs = [(blob, *_stamp(self.folder / f"{blob}.bin")) for blob in names]
            use(Packed(plan.skeleton, [self._chunk(*blob) for blob in blobs]))
            content = pickle.dumps((blobs, plan.skeleton))
            with self._new(f"{name}.pack") as file:
                file.write(sha256(content).digest() + content)
            log.info(f"sharing: {readable(sum(plan.sizes))} of data are in {self.folder}")

    def make_folder(self) -> None:
        """Make sure of it. Refused where it cannot be written to."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            is_usable = os.access(self.folder, os.R_OK | os.W_OK | os.X_OK)
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
            for part in self.folder.glob("*.part"):
                part.unlink()  # of a process that was killed: we alone write
            yield

    @contextmanager
    def _new(self, name: str) -> Iterator[BinaryIO]:
        """A file that gets its name when it is written: whoever finds the name finds all of it."""
        part = self.folder / f"{name}.part"
        try:
            with open(part, "xb", opener=_private) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.folder / name)
        finally:
            part.unlink(missing_ok=True)

    def _holds(self, name: str, size: int) -> bool:
        """Whether the folder holds these bytes, which are read to be sure."""
        path = self.folder / f"{name}.bin"
        if not path.exists() or not _is_ours(path) or _stamp(path)[0] != size:
            return False
        return sha256(_mapped(path, size, shared=False).data).hexdigest() == name

    def _chunk(self, name: str, size: int, changed_ns: int) -> Array:
        path = self.folder / f"{name}.bin"
        if not path.exists() or not _is_ours(path) or _stamp(path) != (size, changed_ns):
            raise Damaged(f"{path.name} is not as it was written")
        return _mapped(path, size, shared=False)

    def _read(self, path: Path) -> Packed:
        """What a pack that this user wrote holds."""
        content = path.read_bytes()
        if not _is_ours(path):
            raise Damaged("it belongs to another user")
        if sha256(content[32:]).digest() != content[:32]:
            raise Damaged("it is damaged: its checksum is wrong")
        blobs, skeleton = pickle.loads(content[32:])
        return Packed(skeleton, [self._chunk(*blob) for blob in blobs])


def _mapped(path: Path, size: int, *, shared: bool) -> Array:
    # keeps no file descriptor, which mmap.mmap does
    found: Array = torch.from_file(str(path), shared, size, dtype=torch.uint8).numpy()
    return found


def _is_ours(path: Path) -> bool:
    return path.stat().st_uid == os.geteuid()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns

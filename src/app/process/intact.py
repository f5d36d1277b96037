"""Whether an archive is, byte for byte, what was written. Needs no torch.

A zip archive holds a CRC of each of its members, and none of its directory, headers and padding, of
which a changed bit can rename a tensor. Ours end in a CRC-32 of the whole file, in the place of the
archive's comment, where every reader of zip files passes over it.
"""

import zipfile
import zlib
from functools import lru_cache
from pathlib import Path
from typing import IO

from app.errors import Refused, Unreadable
from app.process.files import opened, why

MARK = b"app-crc32:"
COMMENT_BYTES = len(MARK) + 8
LENGTH_BYTES = 2
"""Of the length of a comment, with which an archive ends that has none."""
CHUNK_BYTES = 1 << 20


class Checked:
    """A file that an archive is written to from its start to its end, for one who only appends."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._crc = 0

    def write(self, content: bytes) -> int:
        """Append."""
        self._crc = zlib.crc32(content, self._crc)
        return self._file.write(content)

    def flush(self) -> None:
        """Hand on what is buffered."""
        self._file.flush()

    def close_archive(self) -> None:
        """Append the CRC as the comment of the archive, which has to have none."""
        self._file.seek(-LENGTH_BYTES, 2)
        self._file.write(COMMENT_BYTES.to_bytes(LENGTH_BYTES, "little"))
        self._file.write(MARK + f"{self._crc:08x}".encode())


def refuse_damaged(path: Path) -> None:
    """Raise Refused where a checkpoint is not, byte for byte, what was written.

    One that another program wrote has the CRCs of its members only. DeepSpeed's are folders, in
    which it writes `latest` last.
    """
    if path.is_dir():
        reason = None if (path / "latest").exists() else "it has no `latest`"
    else:
        try:
            status = path.stat()
            reason = _damage(path, status.st_ino, status.st_size, status.st_mtime_ns)
        except OSError as error:
            raise Unreadable(path, why(error)) from None
    if reason is not None:
        raise Refused(f"{path} is damaged: {reason}")


@lru_cache(maxsize=16)  # a run that goes on looks for the newest whole one, then loads it
def _damage(path: Path, inode: int, size: int, changed_ns: int) -> str | None:
    """What is wrong with an archive; None where nothing is."""
    tail = COMMENT_BYTES + LENGTH_BYTES
    file = opened(path)
    if file is None:
        raise Unreadable(path, "no such file")
    with file:
        file.seek(max(0, size - 2 * tail))
        end = file.read()
        if MARK in end:
            crc = zlib.crc32(bytes(LENGTH_BYTES), _crc_of(file, size - tail))
            length = COMMENT_BYTES.to_bytes(LENGTH_BYTES, "little")
            is_whole = end.endswith(length + MARK + f"{crc:08x}".encode())
            return None if is_whole else "its bytes are not those that were written"
        try:
            member = zipfile.ZipFile(file).testzip()
        except Exception as error:  # of a damaged archive zipfile raises almost anything
            return f"it is not a whole archive ({' '.join(str(error).split())})"
    return None if member is None else f"the bytes of {member} are not those that were written"


def _crc_of(file: IO[bytes], num_bytes: int) -> int:
    crc = 0
    file.seek(0)
    while num_bytes > 0:
        content = file.read(min(CHUNK_BYTES, num_bytes))
        if not content:
            break
        crc = zlib.crc32(content, crc)
        num_bytes -= len(content)
    return crc

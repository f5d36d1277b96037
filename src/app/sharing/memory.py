"""Memory: that which an array or a tensor views, and that which several processes map.

Every mapping is private (MAP_PRIVATE): pages that nobody writes are one copy for the machine, a
written page becomes the writer's own. So a process sees its data as if it were alone with them.
"""

import ctypes
import gc
import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from app.errors import Refused

Array = npt.NDArray[Any]
VIEWED = (np.ndarray, Tensor)


class Private(Exception):  # noqa: N818  # reads as the sentence it is
    """Data stay each process's own; holds why, and what to type instead."""


class NoSpace(Private):
    """There is not enough room for data."""


class Piece(NamedTuple):
    """Memory from an address on, which is there as long as its owner is."""

    owner: Any
    address: int
    size: int


class Memory:
    """Pieces to be copied one behind the other; each as aligned, there, as it is here.

    Attributes:
        places: where each piece begins, the first one at 0.
        size: bytes from the first to the end of the last.
    """

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self.pieces, self.places, end = list(pieces), list[int](), 0
        for _, address, size in self.pieces:
            self.places.append(up_to(end, 64 if size >= 1024 else 16) + address % 16)
            end = self.places[-1] + size
        first = self.pieces[0].address % 16
        self.places = [place - first for place in self.places]
        self.size = end - first

    def parts(self) -> Iterator[tuple[int, int, int]]:
        """The address, the size and the place of each piece."""
        for (_, address, size), place in zip(self.pieces, self.places, strict=True):
            yield address, size, place


def memory_of(value: Any) -> Piece:
    """All the memory that a tensor's storage, or the array that an array is a view of, has."""
    value = root_of(value)
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        return Piece(storage, storage.data_ptr(), storage.nbytes())
    start = address_of(value)
    if value.flags.c_contiguous or not value.size:
        return Piece(value, start, value.nbytes)
    steps = [(n - 1) * step for n, step in zip(value.shape, value.strides, strict=True)]
    size = sum(map(abs, steps)) + value.itemsize
    return Piece(value, start + sum(step for step in steps if step < 0), size)


def root_of(value: Any) -> Any:
    """The tensor or the array whose memory an array or a tensor views."""
    while isinstance(value, np.ndarray) and isinstance(value.base, VIEWED):
        value = value.base
    return value


def address_of(value: Any) -> int:
    """Where the first element lies."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    return int(value.__array_interface__["data"][0])


def up_to(number: int, step: int) -> int:
    """The next multiple of a step."""
    return -(-number // step) * step


@dataclass(eq=False)
class InMemory:
    """Shared memory without a name: it ends with the last process that knows it."""

    descriptor: int
    size: int

    def map(self, access: int) -> Array:
        """The bytes, uint8 (size,)."""
        return np.frombuffer(mmap.mmap(self.descriptor, self.size, access=access), np.uint8)

    def __reduce__(self) -> Any:
        return _handed_on, (DupFd(self.descriptor), self.size)

    def __del__(self) -> None:
        os.close(self.descriptor)


def _handed_on(descriptor: Any, size: int) -> InMemory:
    return InMemory(descriptor.detach(), size)


def new_shared_memory(num_bytes: int) -> InMemory:
    """Shared memory filled with zeros. NoSpace where this machine has too little."""
    if not hasattr(os, "memfd_create"):
        raise Refused("sharing=shared needs Linux; type sharing=mmap, or sharing=none")
    free = free_memory()
    if num_bytes > free:
        needs = f"sharing=shared needs {readable(num_bytes)} of memory"
        raise NoSpace(f"{needs}, and {readable(free)} are free", "type sharing=mmap")
    found = InMemory(os.memfd_create("data"), num_bytes)
    os.ftruncate(found.descriptor, num_bytes)
    return found


def free_memory() -> int:
    """Bytes that processes could have, also instead of files that were read."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def readable(num_bytes: int) -> str:
    """As `1.5 GB`, in powers of 1024."""
    amount = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if round(amount) < 1000:
            return f"{amount:.0f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GB"


def release_memory() -> None:
    """Free what only cycles hold, and give back to the system what was freed."""
    gc.collect()
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if malloc_trim is not None:
        malloc_trim(0)  # malloc keeps small pieces, such as a list's

"""Memory that several processes map: where it lies here, and how another process gets at it.

Every mapping is private (MAP_PRIVATE): pages that nobody writes are one copy for the machine, a
written page becomes the writer's own. So a process sees its data as if it were alone with them.
"""

import ctypes
import errno
import gc
import mmap
import os
import weakref
from bisect import bisect_right, insort
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

Array = npt.NDArray[Any]
DEV_SHM = "/dev/shm"


class NoSpace(Exception):  # noqa: N818  # reads as the sentence it is
    """There is not enough room for data; holds what they need and what is free, in bytes."""

    def __init__(self, *, needed: int, free: int) -> None:
        super().__init__(needed, free)
        self.needed = needed
        self.free = free


class Handle(Protocol):
    """What a process needs to map a region; travels between processes."""

    @property
    def name(self) -> str:
        """The same for the same bytes, in all processes."""

    def map(self) -> Array:
        """The bytes of the region, uint8 (size,)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class InMemory:
    """A region in torch's shared memory; it ends with the last process that knows it."""

    name: str
    memory: Tensor

    def map(self) -> Array:
        descriptor, size = self.memory.untyped_storage()._share_fd_cpu_()
        return np.frombuffer(mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY), np.uint8)


@dataclass(frozen=True, kw_only=True, eq=False)
class InFile:
    """A region that is a whole file, not empty."""

    name: str
    path: str
    size: int

    def map(self) -> Array:
        # keeps no file descriptor, which mmap.mmap does
        return torch.from_file(self.path, shared=False, size=self.size, dtype=torch.uint8).numpy()


def new_shared_memory(num_bytes: int) -> Tensor:
    """Shared memory filled with zeros, uint8 (num_bytes,). NoSpace where it does not fit."""
    if not fits_in_shared_memory(num_bytes):
        raise NoSpace(needed=num_bytes, free=free_shared_memory())
    storage = torch.UntypedStorage._new_shared(num_bytes)  # type: ignore[no-untyped-call]
    descriptor, _ = storage._share_fd_cpu_()
    allocate(descriptor, num_bytes, free=free_shared_memory)  # or a write may end in SIGBUS
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def fits_in_shared_memory(num_bytes: int) -> bool:
    """Whether the shared memory of the machine, or of the container, has so much room."""
    return num_bytes <= free_shared_memory()


def free_shared_memory() -> int:
    """Bytes."""
    try:
        found = os.statvfs(DEV_SHM)
    except FileNotFoundError:
        return 0
    return found.f_bavail * found.f_frsize


def allocate(descriptor: int, num_bytes: int, *, free: Callable[[], int]) -> None:
    """Reserve room for a file before it is written. NoSpace where there is too little."""
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(needed=num_bytes, free=free()) from error
        os.ftruncate(descriptor, num_bytes)  # a file system that reserves nothing


def readable(num_bytes: int) -> str:
    """As `1.5 GB`, in powers of 1024."""
    amount = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if round(amount) < 1000:
            return f"{amount:.0f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GB"


class Mapping(NamedTuple):
    """Where a region is mapped in this process; a region may be, several times."""

    start: int
    end: int
    handle: Handle
    memory: "weakref.ref[Array]"


_mappings: list[Mapping] = []
"""In the order of addresses."""


def map_region(handle: Handle) -> Array:
    """The bytes of a region; apart from all other mappings of it, as far as they are written."""
    array = handle.map()
    start, end = extent(array)
    mapping = Mapping(start, end, handle, weakref.ref(array, _forget))
    insort(_mappings, mapping, key=lambda known: known.start)
    ForkingPickler.register(np.ndarray, _reduce_array)
    ForkingPickler.register(Tensor, _reduce_tensor)
    return array


def region(handle: Handle, start: int, end: int) -> Array:
    """The bytes of a region, mapped before if these of them are as they were, or else anew."""
    for mapping in _mappings:
        memory = mapping.memory()
        if mapping.handle.name == handle.name and memory is not None:
            first = mapping.start
            if is_untouched(first + start, first + end):
                return memory
    return map_region(handle)


def known_region(name: str) -> Handle:
    """The handle of a region that is mapped in this process."""
    return next(mapping.handle for mapping in _mappings if mapping.handle.name == name)


def place_of(start: int, end: int) -> tuple[Handle, int] | None:
    """The region and the offset in it, where memory is that of a region, and unchanged."""
    at = bisect_right(_mappings, start, key=lambda mapping: mapping.start) - 1
    if at < 0 or end > _mappings[at].end or not is_untouched(start, end):
        return None
    return _mappings[at].handle, start - _mappings[at].start


def is_untouched(start: int, end: int) -> bool:
    """Whether no page of a private mapping was written here; False where that cannot be told."""
    page = mmap.PAGESIZE
    first, last = start // page, -(-end // page)
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            file.seek(8 * first)
            entries = np.frombuffer(file.read(8 * (last - first)), np.uint64)
    except OSError:
        return False
    present, swapped, of_file = ((entries >> np.uint64(bit)) & np.uint64(1) for bit in (63, 62, 61))
    return len(entries) == last - first and not (swapped | (present & ~of_file)).any()


def extent(array: Array) -> tuple[int, int]:
    """First address and end of what an array that is not empty views."""
    start = end = array.__array_interface__["data"][0]
    for size, stride in zip(array.shape, array.strides, strict=True):
        if stride < 0:
            start += (size - 1) * stride
        else:
            end += (size - 1) * stride
    return start, end + array.itemsize


def tensor_extent(tensor: Tensor) -> tuple[int, int]:
    """First address and end of what a tensor that is not empty views."""
    start = tensor.data_ptr()
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is nothing but numbers in the memory of this machine."""
    return (
        type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not (tensor.requires_grad or tensor.is_quantized or tensor.is_nested)
        and not (tensor.is_conj() or tensor.is_neg())
        and tensor.numel() > 0
        and tensor.data_ptr() % tensor.element_size() == 0
    )


def storage_of(memory: Array) -> torch.UntypedStorage:
    """Bytes as a storage of just these: a tensor saved from it is not the whole region."""
    return torch.from_numpy(memory).untyped_storage()


def release_memory() -> None:
    """Free what only cycles hold, and give it back to the system."""
    gc.collect()
    trim()


def trim() -> None:
    """Give back to the system what was freed: malloc keeps small pieces, such as a list's."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if malloc_trim is not None:
        malloc_trim(0)


def _forget(memory: "weakref.ref[Array]") -> None:
    _mappings[:] = [mapping for mapping in _mappings if mapping.memory is not memory]


def _reduce_array(array: Array) -> Any:
    """Between processes: the place in a region, where another process finds the same bytes."""
    if array.size and not array.dtype.hasobject:
        start, end = extent(array)
        place = place_of(start, end)
        if place is not None:
            handle, at = place
            offset = array.__array_interface__["data"][0] - start
            about = (offset, array.dtype, array.shape, array.strides)
            return _array_at, (handle, at, at + end - start, *about)
    return array.__reduce_ex__(4)


def _array_at(
    handle: Handle, start: int, end: int, offset: int, dtype: Any, shape: Any, strides: Any
) -> Array:
    memory = region(handle, start, end)[start:end]
    array: Array = np.ndarray(shape, dtype, buffer=memory, offset=offset, strides=strides)
    return array


def _reduce_tensor(tensor: Tensor) -> Any:
    if is_plain(tensor):
        start, end = tensor_extent(tensor)
        place = place_of(start, end)
        if place is not None:
            handle, at = place
            about = (tensor.dtype, tuple(tensor.shape), tensor.stride())
            return _tensor_at, (handle, at, at + end - start, *about)
    return reduce_tensor(tensor)  # type: ignore[no-untyped-call]


def _tensor_at(
    handle: Handle, start: int, end: int, dtype: torch.dtype, size: Any, stride: Any
) -> Tensor:
    storage = storage_of(region(handle, start, end)[start:end])
    return torch.empty(0, dtype=dtype).set_(storage, 0, size, stride)

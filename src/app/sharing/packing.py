"""An object as a pickle of protocol 5, and the memory of its arrays, tensors and long lists beside.

`Plan` pickles without copying that memory, and lays it out in a few chunks; who has made room for
these lets it write them. `unpack` puts the object together over chunks, wherever they are.
"""

import ctypes
import hashlib
import io
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from app.sharing.memory import Array, Memory, Piece, address_of, memory_of, root_of, up_to
from app.sharing.packed_list import PackedList, column_of, is_plain

SEPARATE = 2**22
"""Memory of at least so many bytes has a chunk of its own: then it is the same chunk, whatever else
an object holds."""


class Limits(NamedTuple):
    """What is not packed: memory below `min_bytes`, lists shorter than `min_items`; None = all."""

    min_bytes: int
    min_items: int | None


class Packed(NamedTuple):
    """An object as a pickle and the memory it lacks: chunks of uint8, to be kept as they are."""

    skeleton: bytes
    chunks: Sequence[Array]


def unpack(packed: Packed, outside: Mapping[str, Any]) -> Any:
    """The object, its arrays and tensors views of the chunks.

    Args:
        outside: what stands for the objects that the plan's `outside` names.
    """
    content, places, small = pickle.loads(packed.skeleton)
    chunks = [np.frombuffer(bytearray(small), np.uint8), *packed.chunks]
    buffers = (pickle.PickleBuffer(chunks[chunk][start:end]) for chunk, start, end in places)
    unpickler = _Unpickler(io.BytesIO(content), buffers=buffers)
    unpickler.outside = outside
    return unpickler.load()


Use = Callable[[Packed], None]
"""What puts an object to use, while nobody else knows of its memory yet."""


class Plan:
    """How to pack an object: a pickle without its memory, and where that goes.

    Beside the pickle go the memory of tensors and arrays on the CPU, long lists of such, of texts,
    of numbers and of tuples of these, which come back as `PackedList`, and what else hands out its
    memory by protocol 5. What views the same tensor's or array's memory, does so again. Less than
    `min_bytes` of it in one place is copied for each process. A tensor in shared memory gets its
    own again; a numpy.memmap is opened again.

    Args:
        outside: objects that are named instead of packed, by their names.

    Raises what pickling raises where part of the object makes sense in this process only.
    """

    def __init__(self, value: Any, limits: Limits, outside: Mapping[str, Any]) -> None:
        stream = io.BytesIO()
        pickler = Pickler(stream, limits.min_items, outside)
        pickler.dump(value)
        self._memories: list[list[tuple[int, Memory]]] = [[], []]  # small, gathered, separate ones
        ends, places = [0, 1], []
        for memory in pickler.memories:
            number = int(memory.size >= limits.min_bytes)
            if memory.size >= max(limits.min_bytes, SEPARATE):
                number = len(ends)
                ends.append(0)
                self._memories.append([])
            start = up_to(ends[number], 64) + memory.pieces[0].address % 16
            ends[number] = start + memory.size
            places.append((number, start, ends[number]))
            self._memories[number].append((start, memory))
        small = np.zeros(ends[0], np.uint8)
        self._write(0, small)
        self.sizes = [up_to(end, 64) for end in ends[1:]]
        self.skeleton = pickle.dumps((stream.getvalue(), places, small.tobytes()), 5)

    def write(self, chunk: int, content: Array) -> None:
        """Write a chunk into memory of its size that is all zeros."""
        self._write(chunk + 1, content)

    def digest(self, chunk: int) -> str:
        """A hash of what `write` would write."""
        found, reached = hashlib.sha256(), 0
        for start, memory in self._memories[chunk + 1]:
            for address, size, place in memory.parts():
                found.update(bytes(start + place - reached))
                found.update((ctypes.c_char * size).from_address(address))
                reached = start + place + size
        found.update(bytes(self.sizes[chunk] - reached))
        return found.hexdigest()

    def _write(self, number: int, content: Array) -> None:
        first = address_of(content)
        for start, memory in self._memories[number]:
            for address, size, place in memory.parts():
                ctypes.memmove(first + start + place, address, size)


class Pickler(pickle.Pickler):
    """Pickles without memory, which it keeps.

    Attributes:
        memories: one for each out-of-band buffer, in their order.
    """

    def __init__(self, stream: Any, min_items: int | None, outside: Mapping[str, Any]) -> None:
        super().__init__(stream, protocol=5, buffer_callback=self._take)
        self.memories: list[Memory] = []
        self._min_items = math.inf if min_items is None else min_items
        self._outside = {id(value): name for name, value in outside.items()}
        self._lists: dict[int, tuple[Any, Any]] = {}  # with what keeps an id valid
        self._same: dict[tuple[int, int], Memory] = {}
        self._of_buffers: dict[int, Memory] = {}

    def persistent_id(self, value: Any) -> Any:
        if type(value) is list and len(value) >= self._min_items:
            if id(value) not in self._lists:
                column = column_of(value)
                packed = None if column is None else PackedList(column, range(len(value)))
                self._lists[id(value)] = value, packed
            return self._lists[id(value)][1]
        return self._outside.get(id(value))

    def reducer_override(self, value: Any) -> Any:
        reduce = _REDUCED.get(type(value))
        return NotImplemented if reduce is None else reduce(self, value)

    def _array(self, array: Array) -> Any:
        if array.dtype == object:  # whose own state has to be a list
            return _object_array, (array.shape, array.ravel().tolist())
        if array.dtype.hasobject or array.size == 0:
            return NotImplemented
        root = root_of(array)
        piece = memory_of(array)
        memory = root if type(root) is np.memmap and _is_reopened(root) else Memory([piece])
        place = address_of(array) - piece.address
        about = (array.dtype, array.shape, array.strides, array.flags.writeable)
        return _view, (type(array), memory, place, *about)

    def _memmap(self, array: Any) -> Any:
        """A file that the user maps is mapped again, unless it may be changed in private."""
        if root_of(array) is not array or not _is_reopened(array):
            return self._array(array)
        order = "C" if array.flags.c_contiguous else "F"
        mode = "r" if array.mode == "r" else "r+"
        return np.memmap, (array.filename, array.dtype, mode, array.offset, array.shape, order)

    def _tensor(self, tensor: Tensor) -> Any:
        if tensor.grad_fn is not None:
            raise pickle.PicklingError("a tensor was computed from one that requires gradients")
        if not is_plain(tensor):
            return NotImplemented
        about = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        return _tensor, (tensor.untyped_storage(), tensor.dtype, *about, tensor.requires_grad)

    def _storage(self, storage: torch.UntypedStorage) -> Any:
        if storage.nbytes() == 0 or storage.device.type != "cpu":
            return torch.UntypedStorage, (list(storage),)
        piece = Piece(storage, storage.data_ptr(), storage.nbytes())
        return _storage, (Memory([piece]), storage.is_shared())

    def _memory(self, memory: Memory) -> Any:
        if len(memory.pieces) == 1:
            same = self._same.setdefault(memory.pieces[0][1:], memory)
            if same is not memory:
                return _itself, (same,)
        buffer = pickle.PickleBuffer(bytearray())
        self._of_buffers[id(buffer)] = memory
        return _bytes, (buffer,)

    def _take(self, buffer: pickle.PickleBuffer) -> bool:
        memory = self._of_buffers.pop(id(buffer), None)
        if memory is None:  # of an object that knows of protocol 5 itself
            content = buffer.raw()
            if not content.nbytes:
                return True
            memory = Memory([memory_of(np.frombuffer(content, np.uint8))])
        self.memories.append(memory)
        return False


_REDUCED: dict[type, Any] = {
    np.ndarray: Pickler._array,
    np.memmap: Pickler._memmap,
    Tensor: Pickler._tensor,
    torch.UntypedStorage: Pickler._storage,
    Memory: Pickler._memory,
}


class _Unpickler(pickle.Unpickler):
    outside: Mapping[str, Any]

    def persistent_load(self, known: Any) -> Any:
        return self.outside[known] if isinstance(known, str) else known


def _is_reopened(array: Any) -> bool:
    return array.filename is not None and array.mode != "c" and array.size > 0


def _bytes(buffer: Any) -> Array:
    return np.frombuffer(buffer, np.uint8)


def _itself(value: Any) -> Any:
    return value


def _view(
    kind: Any, memory: Any, place: int, dtype: Any, shape: Any, strides: Any, is_writeable: bool
) -> Array:
    array: Array = np.ndarray(shape, dtype, memory, place, strides)
    array.flags.writeable = is_writeable
    return array.view(kind)


def _object_array(shape: tuple[int, ...], items: Sequence[Any]) -> Array:
    array = np.empty(len(items), object)
    for index, item in enumerate(items):
        array[index] = item
    return array.reshape(shape)


def _storage(memory: Array, is_shared: bool) -> Any:
    storage: Any = torch.from_numpy(memory).untyped_storage()
    return storage.clone().share_memory_() if is_shared else storage


def _tensor(
    storage: Any, dtype: torch.dtype, place: int, shape: Any, strides: Any, requires_grad: bool
) -> Tensor:
    tensor = torch.empty(0, dtype=dtype).set_(storage, place, shape, strides)
    return tensor.requires_grad_(requires_grad)

"""An object apart: what holds numbers as flat memory to share, the rest as a pickle.

`Plan` takes an object apart without a copy and lays its memory out in a few chunks; who has made
room for these lets it write them. `unpack` puts the object together over chunks, wherever they are.
"""

import ctypes
import functools
import hashlib
import importlib
import io
import marshal
import math
import pickle
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from app.sharing.packed_list import Arrays, Numbers, PackedList, Scattered, column_of
from app.sharing.regions import (
    Array,
    extent,
    is_plain,
    known_region,
    place_of,
    region,
    storage_of,
    tensor_extent,
    trim,
)

SEPARATE = 2**22
"""Memory of at least so many bytes has a chunk of its own: then it is the same chunk, whatever else
an object holds."""
TRIM_EVERY = 2**27
"""Bytes copied from one time to the next that what they were copied from goes to the system."""
UNPICKLABLE = (pickle.PicklingError, AttributeError, TypeError, ValueError, RuntimeError)
"""What pickling raises for objects that only make sense in their process."""


@dataclass(kw_only=True)
class Packed:
    """An object as a pickle and the memory it lacks: chunks of uint8, to be kept as they are."""

    skeleton: bytes
    chunks: Sequence[Array]


def pack(value: Any, *, min_bytes: int, min_items: int | None) -> Packed:
    """Pack into memory of this process; see `Plan`."""
    plan = Plan(value, min_bytes=min_bytes, min_items=min_items, outside={})
    chunks = [np.zeros(size, np.uint8) for size in plan.sizes]
    for number, chunk in enumerate(chunks):
        plan.write(number, chunk)
    return Packed(skeleton=plan.skeleton, chunks=chunks)


def unpack(packed: Packed, *, outside: Mapping[str, Any] | None = None) -> Any:
    """The object, its arrays and tensors views of the chunks.

    Args:
        outside: what stands for the objects that the plan's `outside` names.
    """
    content, entries, small = pickle.loads(packed.skeleton)
    chunks = [*packed.chunks, np.frombuffer(bytearray(small), np.uint8)]  # small is chunk -1
    return _Unpickler(content, entries, chunks, outside or {}).load()


class Plan:
    """How to pack an object: a pickle without its memory, and where that goes.

    Taken out are all CPU tensors that neither need gradients nor are of a subclass, all arrays of
    numpy without objects, and long lists of such, of texts, of numbers and of tuples of these,
    which come back as `PackedList`. What shares memory, shares it again, strides as they were; a
    tensor in shared memory gets its own again. Less than `min_bytes` of memory in one place is
    copied for each process. Arrays that view a region mapped in this process, and that nobody has
    changed, are not packed but referred to. A numpy.memmap is opened again. Lambdas and local
    functions are taken by value.

    Args:
        min_bytes: memory below this size stays with each process.
        min_items: length from which lists are packed; None = none is.
        outside: objects that are named instead of packed, by their names.

    Raises one of UNPICKLABLE where part of the object makes sense in this process only.
    """

    def __init__(
        self, value: Any, *, min_bytes: int, min_items: int | None, outside: Mapping[str, Any]
    ) -> None:
        stream = io.BytesIO()
        taken = _Pickler(stream, min_items=min_items, outside=outside)
        taken.dump(value)
        self._holders = taken.holders
        self._regions = taken.regions
        self._lay_out(taken, min_bytes)
        entries = self._entries(taken.records)
        small = np.zeros(self._small_size, np.uint8)
        self.write(-1, small)
        self.skeleton = pickle.dumps((stream.getvalue(), entries, small.tobytes()), 5)

    @property
    def num_bytes(self) -> int:
        """Bytes to share."""
        return sum(self.sizes)

    def write(self, chunk: int, memory: Array) -> None:
        """Write a chunk into memory of its size that is all zeros; once.

        Lets go of what is written, so that memory that only the plan holds is free at once.
        """
        if not memory.size:
            return
        start, copied = memory.__array_interface__["data"][0], 0
        for piece in self._pieces(chunk):
            ctypes.memmove(start + piece.to, piece.at, piece.size)
            self._holders[piece.extent] = None
            copied += piece.size
            if copied >= TRIM_EVERY:
                trim()
                copied = 0

    def digest(self, chunk: int) -> str:
        """A hash of what `write` would write."""
        found, reached = hashlib.sha256(), 0
        for piece in self._pieces(chunk):
            found.update(bytes(piece.to - reached))
            found.update((ctypes.c_char * piece.size).from_address(piece.at))
            reached = piece.to + piece.size
        found.update(bytes(self.sizes[chunk] - reached))
        return found.hexdigest()

    def _pieces(self, chunk: int) -> Iterator["_Piece"]:
        own = self._order[self._chunk[self._order] == chunk]
        return map(_Piece, *(values[own].tolist() for values in self._piece_values))

    def _lay_out(self, taken: "_Pickler", min_bytes: int) -> None:
        """Find memory that is taken once or more, and give each piece of it a place."""
        starts, ends, owners = taken.all_extents()
        piece, lows, highs, firsts = _merged(starts, ends)
        owner = _linked(owners, piece, firsts)[owners[firsts]]
        pads = lows % 16  # of malloc's alignment: a place is as aligned as it was
        padded = highs - lows + pads
        totals = np.bincount(owner, padded, minlength=1)
        group = np.where(totals >= SEPARATE, np.arange(len(totals)) + 1, 0)
        group[totals < min_bytes] = -1
        names, chunk = np.unique(group[owner], return_inverse=True)
        has_small = int(-1 in names)
        chunk -= has_small
        aligned = np.where(padded >= 1024, 64, 16)
        sizes = -(-padded // aligned) * aligned
        order = np.lexsort((firsts, aligned == 16, chunk))
        reached = np.cumsum(sizes[order])
        _, heads, counts = np.unique(chunk[order], return_index=True, return_counts=True)
        before = reached[heads] - sizes[order][heads]
        begin = np.empty_like(sizes)
        begin[order] = reached - sizes[order] - np.repeat(before, counts)
        totals = reached[heads + counts - 1] - before
        self._small_size = int(totals[0]) if has_small else 0
        self.sizes: list[int] = (-(-totals[has_small:] // 64) * 64).tolist()
        self._order, self._chunk = order, chunk
        self._piece_values = (lows, highs - lows, begin + pads, firsts)
        self._extent_chunk = chunk[piece]
        self._extent_place = (begin + pads - lows)[piece] + starts
        self._extent_bounds = np.stack((begin, begin + sizes), 1)[piece]

    def _entries(self, records: Sequence[Any]) -> list[Any]:
        """What unpacking needs to know of each record."""
        chunks, places = self._extent_chunk.tolist(), self._extent_place.tolist()
        bounds = self._extent_bounds.tolist()
        entries: list[Any] = []
        for record in records:
            if isinstance(record, _One):
                at = record.extent
                place = places[at] + record.offset
                entries.append((record.kind, chunks[at], place, tuple(bounds[at]), record.about))
            elif isinstance(record, _Many):
                entries.append(self._entry_of_list(record))
            else:
                entries.append(record)
        return entries

    def _entry_of_list(self, record: "_Many") -> Any:
        inside = slice(record.first_extent, record.first_extent + record.num_extents)
        places = self._extent_place[inside]
        if not len(places):
            return ("list", -1, (0, 0), record.about)
        bounds = (int(places.min()), int(self._extent_bounds[inside, 1].max()))
        record.positions[record.is_full] = places - bounds[0]
        return ("list", int(self._extent_chunk[record.first_extent]), bounds, record.about)


class _Piece(NamedTuple):
    """Memory to copy: from an address, so many bytes, to a place in a chunk."""

    at: int
    size: int
    to: int
    extent: int


class _One(NamedTuple):
    """An array or a tensor that was taken out."""

    kind: str
    extent: int
    offset: int  # of its first element from the start of its extent
    about: tuple[Any, ...]


class _Many(NamedTuple):
    """A list of arrays or tensors that was taken out."""

    first_extent: int
    num_extents: int
    positions: Array
    is_full: Array
    about: tuple[Any, ...]


def _merged(starts: Array, ends: Array) -> tuple[Array, Array, Array, Array]:
    """Overlapping extents as one piece: the piece of each extent; of each piece, its bounds and its
    first extent."""
    order = np.argsort(starts, kind="stable")
    reach = np.maximum.accumulate(ends[order])
    is_new = np.ones(len(order), bool)
    is_new[1:] = starts[order][1:] >= reach[:-1]
    piece = np.empty(len(order), np.int64)
    piece[order] = np.cumsum(is_new) - 1
    at = np.flatnonzero(is_new)
    if not len(at):
        return piece, starts, ends, at
    highs = np.maximum.reduceat(ends[order], at)
    return piece, starts[order][at], highs, np.minimum.reduceat(order, at)


def _linked(owners: Array, piece: Array, firsts: Array) -> Array:
    """For each owner of extents, the first of those that pieces link it with."""
    link = np.arange(owners.max(initial=-1) + 1)
    if len(firsts) == len(owners):
        return link
    while True:
        lowest = np.full(len(firsts), len(link))
        np.minimum.at(lowest, piece, link[owners])
        new = link.copy()
        np.minimum.at(new, owners, lowest[piece])
        new = new[new]
        if (new == link).all():
            return link
        link = new


class _Pickler(pickle.Pickler):
    """Pickles without memory; notes what was taken out, and where it lies."""

    def __init__(
        self, stream: io.BytesIO, *, min_items: int | None, outside: Mapping[str, Any]
    ) -> None:
        super().__init__(stream, protocol=5)
        self.records: list[Any] = []
        self.holders: list[Any] = []  # one for each extent: keeps its memory alive
        self.regions: dict[str, Array] = {}  # those that are referred to, mapped
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._owners: list[int] = []
        self._min_items = math.inf if min_items is None else min_items
        self._known: dict[int, Any] = {id(value): name for name, value in outside.items()}
        self._kept: list[Any] = []  # an id is that of one object as long as this is alive

    def persistent_id(self, value: Any) -> Any:
        known = self._known.get(id(value))
        if known is not None:
            return known
        take = _TAKEN.get(type(value))
        found = None if take is None else take(self, value)
        if found is not None:
            self._known[id(value)] = found
            self._kept.append(value)
        return found

    def reducer_override(self, value: Any) -> Any:
        if type(value) is np.ndarray and value.dtype is _OBJECTS:  # its state has to be a list
            return _object_array, (value.shape, value.ravel().tolist())
        return by_value(value)

    def all_extents(self) -> tuple[Array, Array, Array]:
        """First addresses, ends, and numbers of the records, of all memory taken out."""
        parts = (self._starts, self._ends, self._owners)
        starts, ends, owners = (np.array(part, np.int64) for part in parts)
        return starts, ends, owners

    def _list(self, items: Any) -> Any:
        if len(items) < self._min_items:
            return None
        column = column_of(items)
        if column is None or (type(items) is tuple and isinstance(column, Numbers)):
            return None  # such a tuple may be an object's state, as that of random.Random
        self.records.append(None)
        return ("list", len(self.records) - 1, column)

    def _scattered(self, found: Scattered) -> int:
        items, num = found.items, len(found.items)
        sizes = np.fromiter((item.nbytes for item in items), np.int64, num)
        full = [item for item in items if item.nbytes]
        starts = np.fromiter(map(_address, full), np.int64, len(full))
        shapes: Any = {tuple(item.shape) for item in items}
        if len(shapes) == 1:
            shapes = shapes.pop()
        else:
            shapes = self._array(np.array([tuple(item.shape) for item in items], np.int64))
        positions = np.zeros(num, np.int64)  # written when it is known where the items go
        about = (self._array(positions), shapes, found.dtype, found.axes, found.of_torch)
        self.records.append(_Many(len(self.holders), len(full), positions, sizes > 0, about))
        self._take(starts.tolist(), (starts + sizes[sizes > 0]).tolist(), full)
        return len(self.records) - 1

    def _array(self, array: Array) -> int | None:
        if array.dtype.hasobject or array.size == 0:
            return None
        start, end = extent(array)
        about = (array.dtype, array.shape, array.strides, array.flags.writeable)
        return self._one("array", array, start, end, _address(array) - start, about)

    def _memmap(self, array: Any) -> int | None:
        """A file that the user maps is mapped again, unless it may be changed in private."""
        root = array
        while isinstance(root.base, np.memmap):
            root = root.base
        if root.filename is None or root.mode == "c" or not array.flags.c_contiguous:
            return self._array(array)
        at = root.offset + _address(array) - _address(root)
        mode = "r" if root.mode == "r" else "r+"
        where = (str(root.filename), array.dtype, mode, at, array.shape)
        self.records.append(("memmap", where))
        return len(self.records) - 1

    def _tensor(self, tensor: Tensor) -> int | None:
        if not is_plain(tensor) or vars(tensor):
            return None
        start, end = tensor_extent(tensor)
        kind = "own tensor" if tensor.untyped_storage().is_shared() else "tensor"
        about = (tensor.dtype, tuple(tensor.shape), tensor.stride())
        return self._one(kind, tensor, start, end, 0, about)

    def _one(
        self, kind: str, value: Any, start: int, end: int, offset: int, about: tuple[Any, ...]
    ) -> int:
        place = place_of(start, end)
        if place is not None:
            handle, at = place
            bounds = (at, at + end - start)
            self.regions[handle.name] = region(handle, *bounds)
            self.records.append((kind, handle.name, at + offset, bounds, about))
        else:
            self.records.append(_One(kind, len(self.holders), offset, about))
            self._take([start], [end], [value])
        return len(self.records) - 1

    def _take(self, starts: list[int], ends: list[int], holders: list[Any]) -> None:
        self._starts += starts
        self._ends += ends
        self._owners += [len(self.records) - 1] * len(starts)
        self.holders += holders


_OBJECTS = np.dtype(object)
_TAKEN: dict[type, Callable[[Any, Any], Any]] = {
    list: _Pickler._list,
    tuple: _Pickler._list,
    np.ndarray: _Pickler._array,
    np.memmap: _Pickler._memmap,
    Tensor: _Pickler._tensor,
    Scattered: _Pickler._scattered,
}


class _Unpickler(pickle.Unpickler):
    def __init__(
        self,
        content: bytes,
        entries: Sequence[Any],
        chunks: Sequence[Array],
        outside: Mapping[str, Any],
    ) -> None:
        super().__init__(io.BytesIO(content))
        self._entries = entries
        self._chunks = chunks
        self._outside = outside
        self._made: dict[int, Any] = {}
        self._storages: dict[Any, torch.UntypedStorage] = {}

    def persistent_load(self, known: Any) -> Any:
        if isinstance(known, str):
            return self._outside[known]
        number = known if isinstance(known, int) else known[1]
        if number not in self._made:
            made = self._make(number) if isinstance(known, int) else PackedList(known[2])
            self._made[number] = made
        return self._made[number]

    def _make(self, number: int) -> Any:
        kind, *rest = self._entries[number]
        if kind == "memmap":
            path, dtype, mode, offset, shape = rest[0]
            return np.memmap(path, dtype, mode, offset, shape)
        if kind == "list":
            chunk, (start, end), (positions, shapes, dtype, axes, of_torch) = rest
            positions = self.persistent_load(positions)
            shapes = self.persistent_load(shapes) if isinstance(shapes, int) else shapes
            memory = self._chunks[chunk][start:end]
            return Arrays(memory, positions, shapes, dtype, axes, of_torch)
        chunk, place, bounds, about = rest
        if kind == "array":
            dtype, shape, strides, is_writeable = about
            memory = self._chunk(chunk, bounds)
            array = np.ndarray(shape, dtype, buffer=memory, offset=place, strides=strides)
            array.flags.writeable = is_writeable
            return array
        dtype, size, stride = about
        key = (chunk, bounds)
        if key not in self._storages:
            self._storages[key] = storage_of(self._chunk(chunk, bounds)[slice(*bounds)])
        offset = (place - bounds[0]) // dtype.itemsize
        tensor = torch.empty(0, dtype=dtype).set_(self._storages[key], offset, size, stride)
        if kind == "own tensor":
            tensor = tensor.clone()
            tensor.untyped_storage().share_memory_()
        return tensor

    def _chunk(self, chunk: int | str, bounds: tuple[int, int]) -> Array:
        """The memory that a record is in: a chunk, or a region that is mapped here."""
        if isinstance(chunk, int):
            return self._chunks[chunk]
        return region(known_region(chunk), *bounds)


def _address(item: Any) -> int:
    """Of the first element."""
    if isinstance(item, Tensor):
        return item.data_ptr()
    return int(item.__array_interface__["data"][0])


def _object_array(shape: tuple[int, ...], items: Sequence[Any]) -> Array:
    array = np.empty(len(items), object)
    for index, item in enumerate(items):
        array[index] = item
    return array.reshape(shape)


def by_value(value: Any) -> Any:
    """How to pickle a lambda or a local function, and what the main script defines, which has
    another name in a process that it starts; NotImplemented for all else."""
    if not isinstance(value, type | types.FunctionType):
        return NotImplemented
    if isinstance(value, types.FunctionType) and "<" in value.__qualname__:
        module = "__main__" if value.__module__ in _MAIN else value.__module__
        about = (module, value.__qualname__, value.__defaults__, value.__kwdefaults__)
        cells = tuple(cell.cell_contents for cell in value.__closure__ or ())
        return function_of, (marshal.dumps(value.__code__), *about, cells)
    if value.__module__ in _MAIN and "<" not in value.__qualname__:
        return _of_main, (value.__qualname__,)
    return NotImplemented


_MAIN = ("__main__", "__mp_main__")


def _of_main(name: str) -> Any:
    return functools.reduce(getattr, name.split("."), sys.modules["__main__"])


def function_of(
    code: bytes, module: str, name: str, defaults: Any, kwdefaults: Any, cells: tuple[Any, ...]
) -> types.FunctionType:
    """A function from its parts."""
    place = vars(importlib.import_module(module))
    closure = tuple(types.CellType(content) for content in cells)
    function = types.FunctionType(marshal.loads(code), place, None, defaults, closure)
    function.__kwdefaults__ = kwdefaults
    function.__qualname__ = name
    return function

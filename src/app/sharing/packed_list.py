"""Long lists as a few flat arrays: no object an item, so nothing that counting references writes.

A list of a million strings costs each process 60 MB of objects, and forked workers a copy of all of
it, page by page, as they count references. Packed, it is bytes and offsets.
"""

import operator
from collections.abc import Iterable, Iterator, MutableSequence, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from app.sharing.memory import Array, Memory, Piece, address_of, memory_of

SHORT = 1000
"""A slice of fewer items is a list: what it is for, as `torch.stack`, may ask for one."""
CARRIERS = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64, 16: np.complex128}
"""Dtypes of numpy by their size, for those of torch that numpy does not know."""


@dataclass
class Numbers:
    """Python numbers, or numpy's scalars."""

    values: Array
    of_numpy: bool

    def item(self, index: int) -> Any:
        return self.values[index] if self.of_numpy else self.values.item(index)


@dataclass
class Texts:
    """Strings, or bytes; `bounds` has one more than there are items."""

    data: Array
    bounds: Array
    of_bytes: bool

    def item(self, index: int) -> str | bytes:
        found = self.data[self.bounds[index] : self.bounds[index + 1]].tobytes()
        return found if self.of_bytes else found.decode("utf-8", "surrogatepass")


@dataclass
class Arrays:
    """Arrays of numpy, or tensors, of one dtype; an item is a view.

    `layouts` is shape and strides of all, or int64 (n, 2, dimensions). `data` is a Memory until it
    is pickled.
    """

    data: Any
    positions: Array
    layouts: tuple[Any, Any] | Array
    dtype: Any
    of_torch: bool

    def item(self, index: int) -> Any:
        all_ = self.layouts
        shape, strides = all_ if isinstance(all_, tuple) else all_[index].tolist()
        dtype = CARRIERS[self.dtype.itemsize] if self.of_torch else self.dtype
        array = np.ndarray(shape, dtype, self.data, int(self.positions[index]), strides)
        return torch.from_numpy(array).view(self.dtype) if self.of_torch else array


@dataclass
class Rows:
    """Tuples of one length, each place of them a column."""

    columns: list[Any]

    def item(self, index: int) -> tuple[Any, ...]:
        return tuple(column.item(index) for column in self.columns)


class PackedList(MutableSequence[Any]):
    """A list whose items are made on access; it becomes a real one when it is changed.

    Items compare and index as those of the list did. It is no `list` for isinstance, nor for
    `torch.stack`; slices of fewer than 1,000 items are.
    """

    def __init__(self, column: Any, rows: range) -> None:
        self._column = column
        self._rows = rows
        self._changed: list[Any] | None = None

    def __len__(self) -> int:
        return len(self._rows if self._changed is None else self._changed)

    def __iter__(self) -> Iterator[Any]:
        if self._changed is not None:
            return iter(self._changed)
        return map(self._column.item, self._rows)

    def __getitem__(self, index: Any) -> Any:
        if self._changed is not None:
            return self._changed[index]
        if isinstance(index, slice):
            part = PackedList(self._column, self._rows[index])
            return part if len(part) >= SHORT else list(part)
        place, size = operator.index(index), len(self._rows)
        if not -size <= place < size:
            raise IndexError("list index out of range")
        return self._column.item(self._rows[place])

    def __setitem__(self, index: Any, value: Any) -> None:
        self._list()[index] = value

    def __delitem__(self, index: Any) -> None:
        del self._list()[index]

    def insert(self, index: int, value: Any) -> None:
        self._list().insert(index, value)

    def sort(self, **how: Any) -> None:
        """As list.sort."""
        self._list().sort(**how)

    def copy(self) -> Any:
        """As list.copy."""
        return self[:]

    def __add__(self, other: Iterable[Any]) -> list[Any]:
        return [*self, *other]

    def __radd__(self, other: Iterable[Any]) -> list[Any]:
        return [*other, *self]

    def __mul__(self, times: int) -> list[Any]:
        return list(self) * times

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, list | tuple | PackedList):
            return NotImplemented
        return list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<PackedList of {len(self)}>"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.array(list(self), dtype)

    def _list(self) -> list[Any]:
        if self._changed is None:
            self._changed = list(self)
            self._column = None
        return self._changed


def column_of(items: Sequence[Any]) -> Any:
    """The items as a column; None where they are not of one such kind."""
    kinds = set(map(type, items))
    if len(kinds) != 1:
        return None
    kind = kinds.pop()
    if kind is tuple:
        return _rows(items)
    if kind is np.ndarray or kind is Tensor:
        return _arrays(items, of_torch=kind is Tensor)
    if kind is str or kind is bytes:
        return _texts(items, of_bytes=kind is bytes)
    if issubclass(kind, np.number | np.bool_):
        return Numbers(np.array(items, kind), of_numpy=True)
    dtype = {bool: np.bool_, int: np.int64, float: np.float64}.get(kind)
    with suppress(OverflowError):
        return None if dtype is None else Numbers(np.fromiter(items, dtype, len(items)), False)
    return None


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is nothing but numbers in the memory of this machine."""
    return (
        tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not (tensor.is_quantized or tensor.is_nested or tensor.is_conj() or tensor.is_neg())
        and not vars(tensor)
    )


def _rows(rows: Sequence[tuple[Any, ...]]) -> Rows | None:
    lengths = set(map(len, rows))
    if len(lengths) != 1 or 0 in lengths:
        return None
    columns = [column_of(items) for items in zip(*rows, strict=True)]
    return None if None in columns else Rows(columns)


def _texts(items: Sequence[Any], *, of_bytes: bool) -> Texts | None:
    if len(set(map(id, items))) < len(items) // 2:
        return None  # few texts, many times: the list is smaller
    encoded = items if of_bytes else [text.encode("utf-8", "surrogatepass") for text in items]
    bounds = np.zeros(len(items) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, encoded), np.int64, len(items)), out=bounds[1:])
    return Texts(np.frombuffer(b"".join(encoded), np.uint8), bounds, of_bytes)


def _arrays(items: Sequence[Any], *, of_torch: bool) -> Arrays | None:
    dtype = items[0].dtype
    if len({(item.dtype, item.ndim) for item in items}) != 1 or (not of_torch and dtype.hasobject):
        return None
    if of_torch and not all(is_plain(item) and not item.requires_grad for item in items):
        return None
    pieces: dict[tuple[int, int], Piece] = {}
    owners = [memory_of(item) for item in items]
    if any(type(piece.owner) is np.memmap for piece in owners):
        return None
    for piece in owners:
        pieces.setdefault(piece[1:], piece)
    memory = Memory(pieces.values())
    if not memory.size:
        return None
    moves = {key: place - key[0] for key, place in zip(pieces, memory.places, strict=True)}
    places = np.zeros(len(items), np.int64)
    for index, (item, piece) in enumerate(zip(items, owners, strict=True)):
        is_whole = piece.owner is item and item.flags.c_contiguous
        if piece.size:
            address = piece.address if is_whole else address_of(item)
            places[index] = address + moves[piece[1:]]
    layouts: Any = [(tuple(item.shape), _strides(item)) for item in items]
    layouts = layouts[0] if len(set(layouts)) == 1 else np.array(layouts, np.int64)
    return Arrays(memory, places, layouts, dtype, of_torch)


def _strides(item: Any) -> tuple[int, ...]:
    """In bytes."""
    if isinstance(item, Tensor):
        return tuple(step * item.element_size() for step in item.stride())
    return tuple(item.strides)

"""Long lists as a few flat arrays: no object an item, so nothing that counting references writes.

A list of a million strings costs each process 60 MB of objects, and forked workers a copy of all of
it, page by page, as they count references. Packed, it is bytes and offsets.
"""

import operator
from collections.abc import Iterable, Iterator, MutableSequence, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from app.sharing.regions import Array, is_plain

SHORT = 1000
"""A slice of fewer items is a list: what it is for, as `torch.stack`, may ask for one."""
CARRIERS = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64, 16: np.complex128}
"""Dtypes of numpy by their size, for those of torch that numpy does not know."""


class Column(Protocol):
    """The items of a list, made when they are asked for."""

    def __len__(self) -> int: ...

    def item(self, index: int) -> Any:
        """Make the item at an index from 0."""

    def sliced(self, part: slice) -> "Column":
        """Those items, over the same memory."""


@dataclass
class Numbers:
    """Python numbers, or numpy's scalars."""

    values: Array
    of_numpy: bool

    def __len__(self) -> int:
        return len(self.values)

    def item(self, index: int) -> Any:
        return self.values[index] if self.of_numpy else self.values.item(index)

    def sliced(self, part: slice) -> "Numbers":
        return Numbers(self.values[part], self.of_numpy)


@dataclass
class Texts:
    """Strings, or bytes."""

    data: Array
    starts: Array
    ends: Array
    of_bytes: bool

    def __len__(self) -> int:
        return len(self.starts)

    def item(self, index: int) -> str | bytes:
        found = self.data[self.starts[index] : self.ends[index]].tobytes()
        return found if self.of_bytes else found.decode("utf-8", "surrogatepass")

    def sliced(self, part: slice) -> "Texts":
        return Texts(self.data, self.starts[part], self.ends[part], self.of_bytes)


@dataclass
class Arrays:
    """Arrays of numpy, or tensors, of one dtype; an item is a view.

    `shapes` is that of all, or int64 (n, dimensions). Items were laid out in memory in the order
    `axes` of their axes; None is the usual order.
    """

    data: Array
    positions: Array
    shapes: tuple[int, ...] | Array
    dtype: Any
    axes: tuple[int, ...] | None
    of_torch: bool

    def __len__(self) -> int:
        return len(self.positions)

    def item(self, index: int) -> Any:
        shapes = self.shapes
        shape = shapes if isinstance(shapes, tuple) else tuple(shapes[index].tolist())
        if self.axes is not None:
            shape = tuple(shape[axis] for axis in self.axes)
        dtype = CARRIERS[self.dtype.itemsize] if self.of_torch else self.dtype
        array = np.ndarray(shape, dtype, buffer=self.data, offset=int(self.positions[index]))
        if self.axes is not None:
            array = array.transpose(np.argsort(self.axes))
        return torch.from_numpy(array).view(self.dtype) if self.of_torch else array

    def sliced(self, part: slice) -> "Arrays":
        shapes = self.shapes if isinstance(self.shapes, tuple) else self.shapes[part]
        positions = self.positions[part]
        return Arrays(self.data, positions, shapes, self.dtype, self.axes, self.of_torch)


@dataclass
class Rows:
    """Tuples of one length, each place of them a column."""

    columns: list[Column]

    def __len__(self) -> int:
        return len(self.columns[0])

    def item(self, index: int) -> tuple[Any, ...]:
        return tuple(column.item(index) for column in self.columns)

    def sliced(self, part: slice) -> "Rows":
        return Rows([column.sliced(part) for column in self.columns])


class PackedList(MutableSequence[Any]):
    """A list whose items are made on access; it becomes a real one when it is changed.

    Items compare and index as those of the list did. It is no `list` for isinstance, nor for
    `torch.stack`; slices of fewer than 1,000 items are.
    """

    def __init__(self, column: Column) -> None:
        self._column: Column = column
        self._changed: list[Any] | None = None

    def __len__(self) -> int:
        return len(self._column) if self._changed is None else len(self._changed)

    def __iter__(self) -> Iterator[Any]:
        if self._changed is not None:
            return iter(self._changed)
        return map(self._column.item, range(len(self._column)))

    def __getitem__(self, index: Any) -> Any:
        if self._changed is not None:
            return self._changed[index]
        if isinstance(index, slice):
            part = self._column.sliced(index)
            return PackedList(part) if len(part) >= SHORT else list(PackedList(part))
        place, size = operator.index(index), len(self._column)
        if not -size <= place < size:
            raise IndexError("list index out of range")
        return self._column.item(place % size)

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
        if self._changed is None and isinstance(self._column, Numbers):
            return np.array(self._column.values, dtype)
        return np.array(list(self), dtype)

    def _list(self) -> list[Any]:
        if self._changed is None:
            self._changed = list(self)
            self._column = Rows([])
        return self._changed


@dataclass(eq=False)
class Scattered:
    """Arrays or tensors that lie where they were made; becomes `Arrays` when they are packed."""

    items: list[Any]
    dtype: Any
    axes: tuple[int, ...] | None
    of_torch: bool


def column_of(items: Sequence[Any]) -> Any:
    """The items as a column, arrays among them Scattered; None where they are no such list."""
    kinds = set(map(type, items))
    if len(kinds) != 1:
        return None
    kind = kinds.pop()
    if kind is tuple:
        return _rows(items)
    if kind is np.ndarray or kind is Tensor:
        return _scattered(items, of_torch=kind is Tensor)
    if kind is str or kind is bytes:
        return _texts(items, of_bytes=kind is bytes)
    if kind in (bool, int, float):
        try:
            dtype = {bool: np.bool_, int: np.int64, float: np.float64}[kind]
            return Numbers(np.fromiter(items, dtype, len(items)), of_numpy=False)
        except OverflowError:
            return None
    if issubclass(kind, np.number | np.bool_):
        return Numbers(np.array(items, kind), of_numpy=True)
    return None


def _rows(rows: Sequence[tuple[Any, ...]]) -> Rows | None:
    lengths = set(map(len, rows))
    if len(lengths) != 1 or 0 in lengths:
        return None
    columns = []
    for items in zip(*rows, strict=True):
        column = column_of(items)
        if column is None:
            return None
        columns.append(column)
    return Rows(columns)


def _texts(items: Sequence[Any], *, of_bytes: bool) -> Texts | None:
    if len(set(map(id, items))) < len(items) // 2:
        return None  # few texts, many times: the list is smaller
    encoded = items if of_bytes else [text.encode("utf-8", "surrogatepass") for text in items]
    bounds = np.zeros(len(items) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, encoded), np.int64, len(items)), out=bounds[1:])
    if bounds[-1] == 0:
        return None
    data = np.frombuffer(b"".join(encoded), np.uint8)
    return Texts(data, bounds[:-1], bounds[1:], of_bytes)


def _scattered(items: Sequence[Any], *, of_torch: bool) -> Scattered | None:
    if len({(item.dtype, item.ndim) for item in items}) != 1:
        return None
    dtype = items[0].dtype
    if of_torch:
        if not all(is_plain(item) or _is_empty(item) for item in items):
            return None
    elif dtype.hasobject:
        return None
    if all(map(_is_contiguous, items)):
        return Scattered(list(items), dtype, None, of_torch)
    first = items[0]
    steps = first.stride() if of_torch else first.strides
    axes = tuple(int(axis) for axis in np.argsort([-step for step in steps], kind="stable"))
    if all(_is_contiguous(_permuted(item, axes)) for item in items):
        return Scattered(list(items), dtype, axes, of_torch)
    return None


def _is_empty(tensor: Tensor) -> bool:
    return tensor.numel() == 0 and tensor.device.type == "cpu" and not tensor.requires_grad


def _is_contiguous(item: Any) -> bool:
    return bool(item.is_contiguous() if isinstance(item, Tensor) else item.flags.c_contiguous)


def _permuted(item: Any, axes: tuple[int, ...]) -> Any:
    return item.permute(axes) if isinstance(item, Tensor) else item.transpose(axes)

"""Thrift's compact protocol, as far as a Parquet footer needs it.

pyarrow reads footers itself, but terminates the process (std::terminate) when a damaged column
description is accessed. So the descriptions of untrusted columns are read here.
"""

from __future__ import annotations

from typing import Any

_DEEPEST = 16
_BOOLEANS, _BYTE, _INTEGERS, _DOUBLE, _BINARY = (1, 2), 3, (4, 5, 6), 7, 8
_LISTS, _STRUCT = (9, 10), 12  # a footer has no maps


def read_struct(data: bytes) -> dict[int, Any]:
    """Read a structure as a dict of values by field number; nested structures are dicts too.

    Raises:
        ValueError: The structure is damaged.
    """
    try:
        return _Reader(data).struct(_DEEPEST)
    except IndexError:
        raise ValueError("its footer is cut short") from None


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self._position = data, 0

    def struct(self, depth: int) -> dict[int, Any]:
        values: dict[int, Any] = {}
        field = 0
        while head := self._byte():
            field = field + (head >> 4) if head >> 4 else self._integer()
            kind = head & 15
            values[field] = kind == 1 if kind in _BOOLEANS else self._value(kind, depth)
        return values

    def _value(self, kind: int, depth: int) -> Any:
        if depth == 0:
            raise ValueError("its footer is nested too deeply")
        if kind in _INTEGERS:
            return self._integer()
        if kind == _BINARY:
            return self._bytes(self._varint())
        if kind == _STRUCT:
            return self.struct(depth - 1)
        if kind in _LISTS:
            head = self._byte()
            size = self._varint() if head >> 4 == 15 else head >> 4
            return [self._value(head & 15, depth - 1) for _ in range(size)]
        if kind in (*_BOOLEANS, _BYTE):  # in a list, a boolean is stored as a byte
            return self._byte()
        if kind == _DOUBLE:
            return self._bytes(8)
        raise ValueError(f"its footer has a value of kind {kind}")

    def _byte(self) -> int:
        self._position += 1
        return self._data[self._position - 1]

    def _bytes(self, size: int) -> bytes:
        self._position += size
        if self._position > len(self._data):
            raise IndexError
        return self._data[self._position - size : self._position]

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 128:
            value |= (byte & 127) << shift
            shift += 7
            if shift > 63:
                raise ValueError("its footer has a number of more than 64 bits")
        return value | byte << shift

    def _integer(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)

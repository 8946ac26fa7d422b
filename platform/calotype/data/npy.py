"""Arrays as `.npy` members: format 1.0, row-major, little-endian, without Python objects; where those of a chunk lie.

Arrays whose first axes differ are read as rows, padded with zeros to one length, and a mask.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from calotype.data.tables import Table
from calotype.data.tar import BLOCK
from calotype.errors import DataError

Forms = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]  # name -> shape and dtype of what a batch holds of a sample


@dataclass(frozen=True)
class Arrays:
    """Where the data of one `.npy` member lies in a chunk: all of one dtype and shape.

    Attributes:
        bytes: of an array of that shape.
        rows: of each sample, where first axes differ: `shape` has the length that they are padded to.
    """

    offsets: list[int]
    bytes: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    rows: list[int] | None = None

    def forms(self, name: str) -> Forms:
        made: Forms = {name: (self.shape, self.dtype)}
        return made if self.rows is None else made | {mask_of(name): (self.shape[:1], np.dtype(np.bool_))}


def to_npy(array: np.ndarray[Any, Any]) -> bytes:
    """.npy, version 1.0, row-major, little-endian."""
    buffer = io.BytesIO()
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(array.shape)
    np.lib.format.write_array(buffer, little, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def from_npy(data: bytes | memoryview) -> np.ndarray[Any, Any]:
    """A read-only view; several times faster than np.load, because headers repeat."""
    start, dtype, shape = header_of(data)
    return np.frombuffer(data, dtype, offset=start).reshape(shape)


def header_of(data: bytes | memoryview) -> tuple[int, np.dtype[Any], tuple[int, ...]]:
    """(byte at which the array begins, dtype, shape).

    Raises:
        DataError: not such a file, or not as long as its header says.
    """
    head = bytes(data[:10])
    if head[:8] != b"\x93NUMPY\x01\x00":
        raise DataError("an array of a cache is not in .npy format 1.0")
    start = 10 + int.from_bytes(head[8:], "little")
    dtype, shape = _header(bytes(data[:start]))
    if len(data) != start + dtype.itemsize * math.prod(shape):
        raise DataError(f"an array of a cache has {len(data) - start} bytes, its header says {dtype} {shape}")
    return start, dtype, shape


@functools.lru_cache(1024)
def _header(head: bytes) -> tuple[np.dtype[Any], tuple[int, ...]]:
    stream = io.BytesIO(head)
    try:
        np.lib.format.read_magic(stream)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception as error:  # numpy reads it as Python, whose parser raises anything on hostile bytes
        raise DataError(f"an array of a cache has no .npy header ({error})") from error
    if any(type(n) is not int or not 0 <= n < 2**40 for n in shape) or not dtype.itemsize:
        raise DataError(f"an array of a cache has no .npy header that can be: {dtype} {shape}")
    if fortran or dtype.hasobject:
        raise DataError(f"an array of a cache is not plain and row-major but {dtype}, fortran_order={fortran}")
    return dtype, shape


# ------------------------------------------------------------------------------------------- of many samples


def mask_of(name: str) -> str:
    """Name of the (length,) bool that says which rows of the padded array `name` are a sample's own."""
    return f"{name}.mask"


def padded(arrays: Sequence[np.ndarray[Any, Any]], length: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(n_i, ...) each, n_i at most `length` -> (B, length, ...) with zeros behind them, and (B, length) bool mask."""
    made = np.zeros((len(arrays), length, *arrays[0].shape[1:]), arrays[0].dtype)
    for row, array in zip(made, arrays):
        row[: len(array)] = array
    return made, own_rows([len(array) for array in arrays], length)


def own_rows(rows: Sequence[int], length: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """(B, length): True for the first `rows[i]` of each."""
    return np.arange(length) < np.array(rows)[:, None]


def arrays_in(view: memoryview, table: Table, name: str, where: str, length: int = 0) -> Arrays:
    """Where the arrays `name` of a chunk lie.

    Args:
        view: of the chunk's bytes.
        where: names the chunk, for errors.
        length: rows that arrays are padded to; 0: all have one shape.

    Raises:
        DataError: a sample lacks the member, or they differ in more than that.
    """
    member = f"{name}.npy"
    if member not in table.members or (table.members[member][0] < 0).any():
        have = ", ".join(sorted(table.members))
        raise DataError(f"not every sample of {where} has a member {member}: they have {have}")
    offsets, sizes = table.members[member]
    blocks = np.frombuffer(view, np.uint8).reshape(-1, BLOCK)
    begins, rows, forms, alike = offsets.copy(), np.zeros_like(offsets), set(), True
    for size in np.unique(sizes).tolist():  # arrays of one size have one header, or they are not alike
        here = np.flatnonzero(sizes == size)
        at = int(offsets[here[0]])
        start, dtype, shape = header_of(view[at : at + size])
        heads = blocks[offsets[here] // BLOCK, : min(start, BLOCK)]
        alike = alike and start <= BLOCK and bool((heads == heads[0]).all())
        forms.add((dtype, shape[1:] if length else shape))
        begins[here] += start
        rows[here] = shape[0] if shape else 0
    if not alike or len(forms) > 1:
        raise DataError(f"the arrays {member} of {where} differ in dtype or shape: read them as samples")
    dtype, shape = forms.pop()
    if not length:
        return Arrays(begins.tolist(), dtype.itemsize * math.prod(shape), dtype, shape)
    if not 1 <= rows.min() <= rows.max() <= length:
        raise DataError(f"the arrays {member} of {where} have {rows.min()} to {rows.max()} rows, not 1 to {length}")
    return Arrays(begins.tolist(), dtype.itemsize * math.prod(shape) * length, dtype, (length, *shape), rows.tolist())

"""Arrays as `.npy` members: format 1.0, row-major, little-endian, without Python objects."""

from __future__ import annotations

import functools
import io
import math
from typing import Any

import numpy as np

from calotype.errors import DataError


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

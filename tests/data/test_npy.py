"""Headers of `.npy` members are read as numpy reads them, or refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
from calotype.data.npy import from_npy, header_of, to_npy
from calotype.errors import DataError
from hypothesis import given, settings
from hypothesis import strategies as st

GOOD = to_npy(np.arange(6, dtype=np.float16).reshape(2, 3))
SIGNS = b"\0 '\"(){}[]\\,:;#\n\r\t0189lLeE.-+*@|<>fOV\xff%"


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 95), st.sampled_from(SIGNS)), max_size=4))
def test_any_header_is_read_as_numpy_reads_it_or_refused(changes: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD)
    for at, sign in changes:
        data[at] = sign
    try:
        found = from_npy(bytes(data))
    except DataError:
        return
    expected = np.load(io.BytesIO(data), allow_pickle=False)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)


@pytest.mark.parametrize("header", [b"{'descr': ((((", b"{'descr': '<f2', 'shape': (01,)}", b"\\", b"", b"[" * 400])
def test_what_python_cannot_parse_is_no_traceback(header: bytes) -> None:
    data = GOOD[:8] + len(header).to_bytes(2, "little") + header + bytes(12)
    with pytest.raises(DataError, match=r"npy"):
        header_of(data)

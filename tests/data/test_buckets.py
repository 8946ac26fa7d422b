"""Aspect buckets: sizes within their budget, and each image to the nearest."""

from __future__ import annotations

import math

from calotype.data.buckets import nearest, sizes
from hypothesis import given
from hypothesis import strategies as st


def test_the_sizes_of_a_small_budget() -> None:
    assert sizes(32, 8, 2.0) == [(40, 24), (32, 32), (24, 40)]
    assert sizes(32, 8, 4.0) == [(64, 16), (40, 24), (32, 32), (24, 40), (16, 64)]
    assert sizes(512, 0, 2.0) == [(512, 512)]


@given(st.integers(1, 64), st.integers(1, 16), st.floats(1, 16))
def test_every_size_keeps_the_rules(step: int, many: int, aspect: float) -> None:
    resolution = step * many
    found = sizes(resolution, step, aspect)
    assert (resolution, resolution) in found
    assert len(set(found)) == len(found)
    assert {(height, width) for width, height in found} == set(found)
    assert found == sorted(found, key=lambda size: size[1] / size[0])
    for width, height in found:
        assert width % step == height % step == 0
        assert width * height <= resolution**2
        assert max(width, height) <= aspect * min(width, height)


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_an_image_goes_to_the_nearest_shape_and_turned_to_the_turned_one(width: int, height: int) -> None:
    every = sizes(256, 32, 3.0)
    found = nearest(width, height, every)
    off = [abs(math.log(width / height) - math.log(w / h)) for w, h in every]
    assert off[found] <= min(off) + 1e-12
    turned = every[nearest(height, width, every)]
    assert turned == every[found][::-1] or math.isclose(sorted(off)[0], sorted(off)[1], abs_tol=1e-9)

"""The simulation of a cache at scale is one of the job's own code, and what it says holds."""

from __future__ import annotations

import pytest
from calotype.cluster import units
from calotype.data import s3

from tests.bench import cache_scale


def test_dying_workers_and_a_dead_driver_cost_little_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((s3, "_client"), (units, "time")):  # the simulation puts others in their place
        monkeypatch.setattr(module, name, getattr(module, name))
    scale = cache_scale.Scale(shards=600, workers=60, images=1000, seconds=100.0)
    found = cache_scale.measured(scale, dying=0.02)  # asserts that the job asks for what is simulated, and one manifest
    calm, deaths, driver = found.values()
    assert calm["shards handed out again"] == 0 < deaths["workers that died"] == deaths["shards handed out again"]
    assert 0 < deaths["encoding thrown away, %"] < 3
    assert deaths["encoding thrown away, %"] < driver["encoding thrown away, %"] < 10  # that in 60 workers' hands
    assert calm["latents: writes per shard"] < 16  # tar, sidecar, made.json; a lease, its beats, its end
    assert calm["commit: requests"] < 15
    assert driver["commit: requests"] < 15 + 2 * scale.shards, "of a shard that was there: its sidecar, and made.json"

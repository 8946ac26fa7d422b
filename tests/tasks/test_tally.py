"""Figures of a cache job while it runs."""

from __future__ import annotations

import pytest
from calotype.data.manifest import Shard
from calotype.tasks.encode import Lost
from calotype.tasks.made import Made, Spent
from calotype.tasks.tally import Tally

SHARD = Shard("x.tar", 1000, 10, 5, "", "")


def made(worker: int, images: int = 10, lost: int = 0) -> Made:
    spent = Spent(worker, 2, whole=2.0, decode=0.8, encode=2.4, write=0.5) if images else None
    return Made(SHARD, SHARD, {}, "", [Lost(0, "k", "why")] * lost, (), images, spent, retries=2)


def test_speeds_add_up_over_workers_and_shares_are_of_their_time() -> None:
    tally = Tally([made(0), made(0), made(1), made(1, images=0, lost=2)])
    figures = tally.figures(units=6)
    assert figures["images_per_second"] == 10.0  # 20 images in 4 s, and 10 in 2 s
    assert (figures["images_per_second_worker_0"], figures["images_per_second_worker_1"]) == (5.0, 5.0)
    assert (figures["encoder_busy_percent"], figures["decode_percent"], figures["write_percent"]) == (60.0, 20.0, 25.0)
    assert (figures["shards_done"], figures["shards_left"], figures["bytes_written"]) == (4, 2, 3000)
    assert (figures["quarantined"], figures["read_retries"], figures["shards_leased"]) == (2, 8, 0)
    tally.in_hand(2)
    assert tally.figures(units=6)["shards_leased"] == 2


def test_of_many_workers_a_few_figures_are_told() -> None:
    """A thousand workers must not be a thousand curves."""
    tally = Tally([made(worker, images=10 + worker) for worker in range(1000) for _ in range(2)])
    told = {name: value for name, value in tally.speeds().items() if name.startswith("images_per_second")}
    assert told == {
        "images_per_second": sum(10 + worker for worker in range(1000)) / 2,
        "images_per_second_slowest": 5.0,
        "images_per_second_median": 255.0,
        "images_per_second_fastest": 504.5,
    }


def test_where_nothing_was_encoded_there_is_no_speed() -> None:
    assert Tally([made(0, images=0)]).speeds() == {}


def test_a_job_that_goes_on_counts_on() -> None:
    """MLflow's steps are images: they do not begin again where there are points of an earlier attempt."""
    tally = Tally(images=250)
    tally.add(made(0))
    assert (tally.seen, tally.images) == (250 + SHARD.samples, 10)


def test_the_run_is_told_now_and_then_and_of_the_last_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("calotype.tasks.tally.time.monotonic", lambda: now[0])
    tally, told = Tally(), []
    for _ in range(12):
        tally.add(made(0))
        now[0] += 1.0
        told.append(tally.due(12))
    assert [number for number, was in enumerate(told) if was] == [0, 5, 10, 11]

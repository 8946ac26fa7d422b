"""What the workers of a cache job give back, how far it is, and what their time goes to."""

from __future__ import annotations

import time
from collections.abc import Iterable

from calotype.data.manifest import Shard
from calotype.tasks.encode import Lost
from calotype.tasks.made import Made

EVERY = 5.0  # seconds between two points of a figure
NAMED = 16  # workers whose speeds are told one by one; of more, the slowest, the middle and the fastest


class Tally:
    """Of the shards that are done; one more is added in O(1), for there may be 10^5.

    Args:
        images: whose source shards were done before: a run goes on counting where its last attempt ended.

    Attributes:
        lost: source samples that have no latent.
        seen: images of all source shards that are done, by this attempt or before.
        leased: how many are in workers' hands.
        rate: images per second of all workers together, while they have a shard in hand.
        began: by `time.monotonic`, when the first worker had one; infinite before.
    """

    def __init__(self, results: Iterable[Made] = (), images: int = 0) -> None:
        self.shards = self.encoded = self.images = self.bytes = self.retries = self.leased = 0
        self.lost: list[tuple[Shard, Lost]] = []
        self._whole = self._threads = self._decode = self._encode = self._write = 0.0
        self.seen = images
        self._told, self.rate, self.began = 0.0, 0.0, float("inf")
        self._each: dict[int, tuple[int, float]] = {}  # worker -> (images, seconds)
        for made in results:
            self.add(made)

    def add(self, made: Made) -> None:
        self.shards += 1
        self.seen += made.source.samples
        self.lost += [(made.source, one) for one in made.lost]
        self.retries += made.retries
        if (spent := made.spent) is None:
            return
        self.encoded += 1
        self.images += made.images
        self.bytes += made.shard.bytes
        self._whole += spent.whole
        self._threads += spent.whole * spent.threads
        self._decode, self._encode, self._write = (
            self._decode + spent.decode, self._encode + spent.encode, self._write + spent.write
        )  # fmt: skip
        self.began = min(self.began, time.monotonic() - spent.whole)
        images, seconds = self._each.get(spent.worker, (0, 0.0))
        now = self._each[spent.worker] = images + made.images, seconds + spent.whole
        self.rate += _rate(*now) - _rate(images, seconds)

    def in_hand(self, shards: int) -> None:
        self.leased = shards

    def speeds(self) -> dict[str, float]:
        """Images per second, over all workers and of each, and shares of their time; {} where nothing was encoded."""
        if not self._each:
            return {}
        rates = {f"worker_{worker}": _rate(*done) for worker, done in sorted(self._each.items())}
        if len(rates) > NAMED:
            ordered = sorted(rates.values())
            rates = {"slowest": ordered[0], "median": ordered[len(ordered) // 2], "fastest": ordered[-1]}
        return {
            "images_per_second": round(self.rate, 1),
            "encoder_busy_percent": round(100 * self._encode / self._threads, 1),
            "decode_percent": round(100 * self._decode / self._threads, 1),
            "write_percent": round(100 * self._write / self._whole, 1),
            **{f"images_per_second_{which}": round(rate, 1) for which, rate in rates.items()},
        }

    def due(self, units: int) -> bool:
        """Whether the run is told now: every few seconds, and of the last shard."""
        now = time.monotonic()
        if self.shards < units and now - self._told < EVERY:
            return False
        self._told = now
        return True

    def figures(self, units: int) -> dict[str, float]:
        """For the run, while it goes on.  `units`: shards that it began with."""
        counts = {"shards_done": self.shards, "shards_leased": self.leased, "shards_left": units - self.shards}
        counts |= {"bytes_written": self.bytes, "quarantined": len(self.lost), "read_retries": self.retries}
        return {**self.speeds(), **counts}


def _rate(images: int, seconds: float) -> float:
    return images / max(seconds, 1e-9)

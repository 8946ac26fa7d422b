"""A latent cache at internet scale, by simulation with the real code: 10^5 source shards, 1,000 workers that die.

    python tests/bench/cache_scale.py [--shards 1e5] [--workers 1000] [--images 10000] [--seconds 100] [--deaths 0.01]

calm        nobody dies
deaths      1 % of the workers die per minute, each replaced after a minute; its shard is handed out again
driver too  half way the driver dies as well, and its workers with it; the job is started again a minute later

Time is virtual and nothing is encoded: of a shard only the seconds are spent.  All else is the job's own code (`plan`,
what a worker reads and publishes, `commit`) above the real `S3Store`, whose client is a store in this process that
counts requests.  What driver and workers do in their own processes is measured: CPU seconds and memory are real, of
this machine.  Before, the job itself runs on three small shards, and must ask for exactly what is simulated.
"""

from __future__ import annotations

import argparse
import heapq
import json
import pickle
import random
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT), str(ROOT / "platform")]

from calotype.cluster import units as queue  # noqa: E402
from calotype.cluster.units import Waiting  # noqa: E402
from calotype.config import Autoencoder, CacheLatents, Data, Encoding  # noqa: E402
from calotype.data import cache, lease, manifest, s3, shards, takedowns  # noqa: E402
from calotype.data.manifest import Shard  # noqa: E402
from calotype.data.store import open_store  # noqa: E402
from calotype.environment import Held, Worker  # noqa: E402
from calotype.tasks import cache as task  # noqa: E402
from calotype.tasks.made import Made, recognised, remember  # noqa: E402
from calotype.tasks.tally import Tally  # noqa: E402

from tests.bench import invented  # noqa: E402
from tests.bench.memory import BANDWIDTH, LATENCY, LIMITS, READS, WRITES, Bucket  # noqa: E402

T = TypeVar("T")

START = 60.0  # seconds until a new worker encodes: its process, its imports, its model
JUDGED = 1.0  # seconds that decoding the first samples takes


@dataclass(frozen=True)
class Scale:
    shards: int
    workers: int
    images: int  # of a shard
    seconds: float  # that a worker encodes a shard

    @property
    def ideal(self) -> float:
        return self.shards * self.seconds / self.workers


# ------------------------------------------------------------------------------------------------------- a worker


@dataclass
class Simulation:
    """One situation: its store, its virtual clock, and what was seen."""

    scale: Scale
    name: str
    deaths: float = 0.0
    driver_dies: bool = False
    bucket: Bucket = field(default_factory=Bucket)
    died: int = 0
    again: int = 0  # shards handed out once more
    lost: float = 0.0  # seconds of encoding thrown away
    cpu: Counter[str] = field(default_factory=Counter)  # real seconds
    figures: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        s3._client = lambda attempts=8: self.bucket
        queue.time = SimpleNamespace(monotonic=lambda: self.bucket.now)
        self.dice = random.Random(1)
        self.open(invented.dataset(self.name.replace(" ", "-"), self.scale.shards, self.scale.images))

    def open(self, config: CacheLatents) -> None:
        self.config = config
        self.source = open_store(config.root).at("datasets", config.data.name)
        self.latents = cache.latents_of(open_store(config.root), cache.encoding_of(config))
        self.folder = self.latents.uri.removeprefix("s3://simulated/")
        self.shards = f"{self.source.uri.removeprefix('s3://simulated/')}/shards"
        self.bucket.begin()

    def start(self) -> Generator[float, None, None]:
        """What `task.make_leased` does before the first unit; yields seconds that pass."""
        task._dataset_store(self.config)
        cache.latents_of(open_store(self.config.root), cache.encoding_of(self.config))
        yield self.bucket.took()

    def make(self, worker: str, unit: Shard, dead: bytes | None = None) -> Generator[float, None, Made | Held]:
        """What `task.make_leased` does with a unit, but for the encoding."""
        takedowns.of_shard(open_store(self.config.root), unit.sha256)
        key, name = cache.latent_key(unit), lease.lease_key(cache.latent_key(unit))
        theirs = lease._take(self.latents, name, worker, worker.rpartition("/")[0], dead)
        yield self.bucket.took()
        if theirs is not None and shards.existing_shard(self.latents, key) is None:
            yield self.bucket.took()
            return Held(theirs, lease.STALE)
        began = self.bucket.now
        made = yield from self.encode(unit, int(worker.rpartition("/")[2]))
        beats = int((self.bucket.now - began) / lease.BEAT)
        self.bucket.spread("put", self.folder, beats, began + lease.BEAT, self.bucket.now)
        self.latents.delete(name)
        yield self.bucket.took()
        return made

    def encode(self, unit: Shard, worker: int) -> Generator[float, None, Made]:
        key, bucket = cache.latent_key(unit), self.bucket
        there = shards.existing_shard(self.latents, key)
        yield bucket.took()
        if there is not None:
            if bucket.holds(f"{self.folder}/{cache.made_key(there.key)}"):
                found = recognised(self.source, self.latents, unit, there)
                yield bucket.took()
                return found
            bucket.spread("get", self.folder, 1, bucket.now, bucket.now + 1)  # its maker died before it said how it is
            seconds = there.bytes / BANDWIDTH + there.chunks * LATENCY["get"]
            bucket.spread("get", self.folder, 1 + there.chunks, bucket.now, bucket.now + seconds)
            yield seconds
            return (yield from self.judge(replace(invented.judged(unit, there, worker, 0.0), images=0, spent=None)))
        began = bucket.now
        bucket.spread("get", self.shards, 1 + unit.chunks, began, began + self.scale.seconds)  # sidecar, chunks
        yield self.scale.seconds
        if not self.latents.publish(key, invented.sparse(invented.content(unit)["bytes"])):
            shards._sha256_of(self.latents, key)  # its maker died before the sidecar: the bytes are compared
        yield bucket.took()
        shard = shards.publish_sidecar(self.latents, key, invented.content(unit))
        yield bucket.took()
        return (yield from self.judge(invented.judged(unit, shard, worker, bucket.now - began)))

    def judge(self, made: Made) -> Generator[float, None, Made]:
        for folder in (self.shards, self.folder):  # `accept.decoded`: sidecar and first chunk of both
            self.bucket.spread("get", folder, 2, self.bucket.now, self.bucket.now + JUDGED)
        yield JUDGED
        remember(self.latents, made)
        yield self.bucket.took()
        return made

    # ------------------------------------------------------------------------------------------------- the driver

    def run(self) -> None:
        """The job, and once more where its driver died; then its figures."""
        results: list[Made] = []
        units = self.counted("plan", lambda: task.plan(self.config))
        if self.driver_dies:
            self.work(units, results, 0.5 * self.scale.ideal)
            self.bucket.now += START
            results.clear()
            units = self.counted("plan again", lambda: task.plan(self.config))
        self.work(units, results, float("inf"))
        encoded = self.bucket.now
        made = self.counted("commit", lambda: task.commit(self.config, results), task.READERS)
        assert made["samples"] == self.scale.shards * self.scale.images
        store = open_store(self.config.root).at("caches", made["cache"])
        self.manifest = store.read("manifest.json")
        ideal = self.scale.ideal
        self.figures = {
            "hours": self.bucket.now / 3600,
            "more than ideal, %": 100 * (self.bucket.now / ideal - 1),
            "workers that died": self.died,
            "shards handed out again": self.again,
            "encoding thrown away, %": 100 * self.lost / self.scale.shards / self.scale.seconds,
            **self.figures,
            **self.requests(encoded),
            "manifest, MB": len(self.manifest) / 1e6,
        }

    def work(self, units: Sequence[Shard], results: list[Made], stop: float) -> None:
        """Hand out units as `spread.map` does, until all are made, or second `stop`, when the driver dies."""
        waiting, group, order, bucket = Waiting(units), self.dice.randbytes(8).hex(), count(), self.bucket
        idle: list[tuple[int, float]] = []  # (worker, when it will die)
        events: list[Any] = []  # (second, its number, worker, when that dies, what it does, index of its unit, since)

        def then(seconds: float, *what: Any) -> None:
            heapq.heappush(events, (bucket.now + seconds, next(order), *what))

        def begin(rank: int) -> None:
            lives = 60 * self.dice.expovariate(self.deaths) if self.deaths else float("inf")
            then(START, rank, bucket.now + START + lives, self.start(), -1, 0.0)

        for rank in range(min(self.scale.workers, len(units))):
            begin(rank)
        looks = 0.0
        while waiting.undone:
            at, _, rank, dies, work, index, since = heapq.heappop(events)
            bucket.now = min(at, stop)
            if at >= min(stop, dies) and index >= 0:
                self.again += 1
                if not bucket.holds(f"{self.folder}/{manifest.sidecar_key(cache.latent_key(units[index]))}"):
                    self.lost += min(bucket.now - since, self.scale.seconds)
            if at >= stop:
                if not events:
                    return
                continue
            if at >= dies:
                self.died += 1
                begin(rank)
                if index >= 0:
                    waiting.died(index)
            elif work is not None:
                try:
                    then(min(next(work), dies - at), rank, dies, work, index, since)
                    continue
                except StopIteration as done:
                    idle.append((rank, dies))
                    if isinstance(done.value, Held):
                        waiting.held(index, done.value)
                    elif index >= 0:
                        waiting.done(index)
                        results.append(pickle.loads(pickle.dumps(done.value)))  # as it comes from another process
            while idle and (unit := waiting.next()) is not None:
                rank, dies = idle.pop()
                then(0, rank, dies, self.make(f"{group}/{rank}", *unit[1]), unit[0], bucket.now)
            if idle and looks <= bucket.now:
                looks = bucket.now + waiting.due()
                then(waiting.due(), -1, float("inf"), None, -1, 0.0)

    def counted(self, name: str, body: Callable[[], T], threads: int = 1) -> T:
        """What the driver does; its CPU seconds pass virtually too, and its requests, by so many threads."""
        before = self.bucket.asked().total()
        self.bucket.took()
        began = time.process_time()
        made = body()
        cpu, waited = time.process_time() - began, self.bucket.took() / threads
        self.bucket.now += cpu + waited
        self.figures |= {
            f"{name}: seconds": cpu + waited,
            f"{name}: of these CPU": cpu,
            f"{name}: requests": self.bucket.asked().total() - before,
        }
        return made

    def requests(self, until: float) -> dict[str, float]:
        """Per second: mean until the last shard, and most in a second."""
        made: dict[str, float] = {}
        for folder, name in ((self.folder, "latents"), (self.shards, "source")):
            for kinds, what in ((READS, "reads"), (WRITES, "writes")):
                found = self.bucket.rates(kinds, folder)
                if sum(found):
                    made[f"{name}: {what}/s, mean"] = sum(found[: int(until)]) / until
                    made[f"{name}: {what}/s, most"] = max(found)
                    made[f"{name}: {what} per shard"] = sum(found) / self.scale.shards
        return made


# ---------------------------------------------------------------------------------------------------- beside the job


def checked() -> None:
    """The job itself on shards of noise asks for what is simulated, request by request.

    Raises:
        AssertionError: it does not: the simulation is of another program.
    """
    from tests import caches

    asked = []
    for real in (True, False):
        here = Simulation(Scale(1, 1, 1, 1.0), "checked")
        caches.dataset(here.config.root, {"train": (10,), "held_out": (10,)})
        pixels = replace(here.config, data=Data(name="toy"), autoencoder=Autoencoder(kind="identity", f=1, channels=3))
        small = task.resolve_inputs(replace(pixels, encoding=Encoding(resolution=8, batch=4), conditions={}))
        here.open(small)
        unit = task.plan(small)[0]
        make = partial(task.make_leased(small, Worker(group="g")), unit) if real else partial(here.make, "g/0", unit)
        begin = partial(task.make_leased, small, Worker(group="g")) if real else here.start
        asked.append([here.bucket.during(partial(drained, body)) for body in (begin, make, make)])
        here.bucket.forget(f"{here.folder}/{unit.sha256}.made.json")
        asked[-1].append(here.bucket.during(partial(drained, make)))
    for job, simulated in zip(*asked, strict=True):
        assert job == simulated, f"the job asks for {job}, and {simulated} is simulated"


def drained(body: Callable[[], Any]) -> None:
    work = body()
    for _ in work if isinstance(work, Generator) else ():
        pass


def driver(scale: Scale) -> dict[str, float]:
    """What the driver does with results, in its own process: real megabytes at its end, and seconds of CPU."""
    rows = 2000
    unit = Shard(
        "shards/000000.tar",
        scale.images * invented.IMAGE,
        scale.images,
        40,
        invented.sha(0),
        invented.sha(1),
        invented.sha(2),
    )
    results = []
    for number in range(rows):
        one = replace(unit, key=f"shards/{number:06d}.tar", sha256=invented.sha(number))
        sidecar = manifest.canonical({"format": shards.SIDECAR, **invented.content(one)})
        results.append(pickle.dumps(invented.judged(one, shards.row_of(cache.latent_key(one), sidecar), 0, 100.0)))
    tracemalloc.start()
    held = [pickle.loads(one) for one in results]
    size = tracemalloc.get_traced_memory()[0] / 1e6 * scale.shards / rows
    tracemalloc.stop()
    tally = Tally()
    began = time.process_time()
    for number, made in enumerate(held):
        assert made.spent is not None
        tally.add(replace(made, spent=replace(made.spent, worker=number % scale.workers)))
        tally.speeds()
    each = (time.process_time() - began) / rows
    return {
        "driver: results held, MB": size,
        "driver: CPU ms per result": 1000 * each,
        "driver: figures per point": len(tally.figures(scale.shards)),
    }


def shown(scale: Scale, found: dict[str, dict[str, float]]) -> str:
    lines = [
        f"{scale.shards:,} shards of {scale.images:,} images, {scale.seconds:g} s each, {scale.workers:,} workers: "
        f"{scale.ideal / 3600:.2f} hours where all encode all the time",
        f"{'':<36}" + "".join(f"{name:>14}" for name in found) + "    S3 allows",
    ]
    for name in dict.fromkeys(name for figures in found.values() for name in figures):
        cells = "".join(f"{figures[name]:>14,.2f}" if name in figures else f"{'':>14}" for figures in found.values())
        limit = next((f"{most:>13,}" for kind, most in LIMITS.items() if f" {kind}/s" in name), "")
        lines.append(f"{name:<36}{cells}{limit}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=float, default=1e5)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--images", type=int, default=10_000, help="of a shard")
    parser.add_argument("--seconds", type=float, default=100.0, help="in which a worker encodes a shard")
    parser.add_argument("--deaths", type=float, default=0.01, help="of a worker, per minute")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    scale = Scale(int(args.shards), args.workers, args.images, args.seconds)
    with tempfile.TemporaryDirectory() as tempfile.tempdir:
        found = measured(scale, args.deaths)
    print(json.dumps(found) if args.json else shown(scale, found))


def measured(scale: Scale, dying: float) -> dict[str, dict[str, float]]:
    """Situation -> its figures."""
    checked()
    found: dict[str, dict[str, float]] = {}
    manifests = set()
    for name, deaths in (("calm", 0.0), ("deaths", dying), ("driver too", dying)):
        began = time.perf_counter()
        simulation = Simulation(scale, name, deaths, name == "driver too")
        simulation.run()
        manifests.add(simulation.manifest)
        found[name] = simulation.figures
        print(f"{name}: simulated in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    assert len(manifests) == 1, "the cache is not the same, whoever died"
    found["calm"] |= driver(scale)
    return found


if __name__ == "__main__":
    main()

"""The readers that the stream benchmark compares: each gives an epoch in batches of 64 stacked torch tensors.

Readers that could shuffle do not, but for calotype, whose order is global; and calotype alone verifies what it reads.
"""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from samples import KINDS, decode, decoded

BATCH = 64
MIB = 2**20
MEMORY = 256 * MIB  # calotype's budget, and as much again for every loader process
LANES = 8  # places of the epoch that its batches are drawn from


@dataclass
class Spec:
    """One run.  `resume`: the file of the state at 50% of the epoch, that a whole run writes, a resumed one reads."""

    entrant: str
    kind: str
    workers: int
    bucket: str
    tars: list[str]  # keys
    samples: int
    folder: str  # for local caches; removed after the run
    resume: str = ""
    resumed: bool = False
    connections: int = 16
    sizes: dict[str, int] = field(default_factory=dict)  # key -> bytes, of the tars


Batches = Iterator[dict[str, Any]]
State = Callable[[], Any]  # the state of the reader after the batch handed out last


@functools.cache
def s3() -> Any:
    """A client, made once; used in one process only."""
    import boto3
    from botocore.config import Config

    config = Config(
        signature_version="s3v4", response_checksum_validation="when_required", s3={"addressing_style": "path"}
    )
    return boto3.client("s3", config=config)


# ------------------------------------------------------------------------------------------- entrants


def calotype(spec: Spec, state: Any) -> tuple[Batches, State]:
    import torch
    from calotype.data import Dataset, Reading, Stream
    from calotype.data.manifest import Manifest
    from calotype.data.store import open_store

    store = open_store(f"s3://{spec.bucket}/tar")
    shards = Manifest.from_bytes(store.read("manifest.json")).shards
    reading = Reading(
        memory=MEMORY * (1 + spec.workers), workers=spec.workers, readers=spec.connections // max(1, spec.workers)
    )
    how: dict[str, Any] = {"arrays": tuple(KINDS[spec.kind].arrays)} if spec.kind != "jpeg" else {"decode": decoded}
    stream = Stream(
        Dataset(store, shards), seed=0, batch=BATCH, lanes=LANES, until=spec.samples, reading=reading, **how
    )
    if state is not None:
        stream.load_state_dict(state)

    return ({name: torch.from_numpy(array) for name, array in b.arrays.items()} for b in stream), stream.state_dict


def webdataset(spec: Spec, state: Any) -> tuple[Batches, None]:
    """Its documentation's pipeline; s3:// is opened by boto3, one GET per shard, as its own openers do."""
    import io

    import torch
    import webdataset as wds

    def opener(url: str, *_: Any, **__: Any) -> Any:
        bucket, _, key = url.removeprefix("s3://").partition("/")
        body = s3().get_object(Bucket=bucket, Key=key)["Body"]
        return io.BufferedReader(body._raw_stream, MIB)  # in pieces of 10 KB, as tarfile reads, it is slower

    def stacked(rows: list[tuple[Any, ...]]) -> dict[str, Any]:
        return {name: torch.from_numpy(np.stack(column)) for name, column in zip(names, zip(*rows))}

    wds.gopen_schemes["s3"] = opener
    urls = [f"s3://{spec.bucket}/tar/{key}" for key in spec.tars]
    data = wds.WebDataset(urls, shardshuffle=False)
    if spec.kind == "jpeg":
        names = ["image"]
        data = data.to_tuple("jpg").map(lambda row: (decode(row[0]),))
    else:
        names = list(KINDS[spec.kind].arrays)
        data = data.decode().to_tuple(*(f"{name}.npy" for name in names))
    data = data.batched(BATCH, collation_fn=stacked)
    return iter(wds.WebLoader(data, batch_size=None, num_workers=spec.workers)), None


def mosaicml(spec: Spec, state: Any) -> tuple[Batches, State]:
    from streaming import StreamingDataLoader, StreamingDataset

    data = StreamingDataset(remote=f"s3://{spec.bucket}/mds", local=spec.folder, shuffle=False, batch_size=BATCH)
    loader = StreamingDataLoader(data, batch_size=BATCH, num_workers=spec.workers)
    if state is not None:
        loader.load_state_dict(state)
    return iter(loader), loader.state_dict


def litdata(spec: Spec, state: Any) -> tuple[Batches, State]:
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import downloader

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # it has no setting for a server without TLS
    data = StreamingDataset(f"s3://{spec.bucket}/litdata", cache_dir=spec.folder, shuffle=False)
    loader = StreamingDataLoader(data, batch_size=BATCH, num_workers=spec.workers)
    if state is not None:
        loader.load_state_dict(state)
    return iter(loader), loader.state_dict


def spdl(spec: Spec, state: Any) -> tuple[Batches, None]:
    """Shards in parallel ranges by obstore, parsed by spdl's C++; for workers in a DataLoader, divided by shards."""
    from torch.utils.data import DataLoader, IterableDataset, get_worker_info

    class Shards(IterableDataset):  # type: ignore[misc, type-arg]
        def __iter__(self) -> Batches:
            info = get_worker_info()
            return spdl_batches(spec, spec.tars[info.id :: info.num_workers] if info else spec.tars)

    if not spec.workers:
        return spdl_batches(spec, spec.tars), None
    return iter(DataLoader(Shards(), batch_size=None, num_workers=spec.workers)), None


def spdl_batches(spec: Spec, tars: list[str]) -> Batches:
    """Tried and slower: whole shards in parallel, ranges joined into one buffer (new or used again), `load_npy`,
    `np.stack`; fewer or larger ranges."""
    import torch
    from spdl.io import iter_tarfile

    def empty() -> tuple[dict[str, Any], dict[str, memoryview]]:
        made = {name: np.empty((BATCH, *shape), dtype) for name, (dtype, shape) in KINDS[spec.kind].arrays.items()}
        return made, {f"{name}.npy": array.reshape(-1).view(np.uint8).data for name, array in made.items()}

    (out, flat), row = empty(), 0
    last = f"{max(out)}.npy"  # members are sorted
    for ranges in fetched(spec, tars):
        for path, data in iter_tarfile(ranges):
            name = path.partition(".")[2]
            if name in flat:
                size = len(flat[name]) // BATCH
                flat[name][row * size : (row + 1) * size] = memoryview(data)[-size:]  # behind the header
                row += name == last
            if row == BATCH:
                yield {name: torch.from_numpy(array) for name, array in out.items()}
                (out, flat), row = empty(), 0


class Ranges:
    """The parts of an object, on their way, as a file."""

    def __init__(self, parts: list[Any]) -> None:
        self.parts, self.now, self.at = deque(parts), memoryview(b""), 0

    def read(self, size: int = -1) -> bytes:
        if self.at == len(self.now):
            if not self.parts:
                return b""
            self.now, self.at = memoryview(self.parts.popleft().result()), 0
        data = bytes(self.now[self.at : self.at + size])
        self.at += len(data)
        return data if len(data) == size or not self.parts else data + self.read(size - len(data))


def fetched(spec: Spec, tars: list[str]) -> Iterator[Ranges]:
    """Objects in order, in ranges of 8 MB, of four objects at a time."""
    import obstore

    store, part = obstore_of(spec), 8 * MIB
    with ThreadPoolExecutor(max(1, spec.connections // max(1, spec.workers))) as pool:
        waiting: deque[Ranges] = deque()
        for number in range(len(tars) + 4):
            if number < len(tars):
                key, size = f"tar/{tars[number]}", spec.sizes[tars[number]]
                spans = [(start, min(start + part, size)) for start in range(0, size, part)]
                waiting.append(Ranges([pool.submit(obstore.get_range, store, key, start=a, end=b) for a, b in spans]))
            if number >= 4:
                yield waiting.popleft()


def obstore_of(spec: Spec) -> Any:
    from obstore.store import S3Store

    endpoint = os.environ["AWS_ENDPOINT_URL_S3"]
    return S3Store(spec.bucket, endpoint=endpoint, region="us-east-1", virtual_hosted_style_request=False,
                   client_options={"allow_http": True, "pool_max_idle_per_host": "64"})  # fmt: skip


def pool(spec: Spec, state: Any) -> tuple[Batches, None]:
    """Only for `jpeg`: bare processes that decode what lies in their memory, and hand nothing over."""
    import multiprocessing

    import torch

    client = s3()
    bodies = [client.get_object(Bucket=spec.bucket, Key=f"tar/{key}")["Body"].read() for key in spec.tars]
    pictures = [data for body in bodies for data in _jpegs(body)]
    shares = [pictures[index :: spec.workers] for index in range(spec.workers)]
    context = multiprocessing.get_context("fork")
    begin, done = context.Barrier(spec.workers + 1), context.SimpleQueue()

    def work(share: list[bytes]) -> None:
        out = np.empty((BATCH, *decode(share[0]).shape), np.uint8)
        begin.wait()
        for index, data in enumerate(share):
            out[index % BATCH] = decode(data)
            if (index + 1) % BATCH == 0:
                done.put(None)

    processes = [context.Process(target=work, args=(share,), daemon=True) for share in shares]
    for process in processes:
        process.start()
    begin.wait()

    def batches() -> Batches:
        for _ in range(len(pictures) // BATCH):
            done.get()
            yield {"image": torch.empty(BATCH, 1)}
        for process in processes:
            process.join()

    return batches(), None


def _jpegs(tar: bytes) -> Iterator[bytes]:
    import io
    import tarfile

    with tarfile.open(fileobj=io.BytesIO(tar)) as file:
        for item in file:
            if item.name.endswith(".jpg"):
                found = file.extractfile(item)
                assert found is not None
                yield found.read()


def _ranges(spec: Spec) -> list[tuple[str, int, int]]:
    part = 8 * MIB
    return [(key, start, min(part, size - start)) for key, size in spec.sizes.items() for start in range(0, size, part)]


def limit_obstore(spec: Spec, state: Any) -> tuple[Batches, None]:
    """All bytes of all shards in parallel ranges, and nothing else."""
    import obstore

    store = obstore_of(spec)

    def get(place: tuple[str, int, int]) -> None:
        key, start, size = place
        assert len(obstore.get_range(store, f"tar/{key}", start=start, length=size)) == size

    return _unparsed(spec, get), None


def limit_http(spec: Spec, state: Any) -> tuple[Batches, None]:
    """The same by http.client into buffers that are used again, one signed URL per shard."""
    import threading
    from http.client import HTTPConnection
    from urllib.parse import urlsplit

    client, mine = s3(), threading.local()
    places = {key: {"Bucket": spec.bucket, "Key": f"tar/{key}"} for key in spec.tars}
    urls = {key: urlsplit(client.generate_presigned_url("get_object", Params=place)) for key, place in places.items()}

    def get(place: tuple[str, int, int]) -> None:
        key, start, size = place
        url = urls[key]
        if not hasattr(mine, "connection"):
            mine.connection, mine.buffer = HTTPConnection(url.netloc, timeout=60), memoryview(bytearray(8 * MIB))
        span = {"Range": f"bytes={start}-{start + size - 1}"}
        mine.connection.request("GET", f"{url.path}?{url.query}", headers=span)
        response, have = mine.connection.getresponse(), 0
        while have < size:
            have += response.readinto(mine.buffer[have:size])
        assert response.isclosed()

    return _unparsed(spec, get), None


def _unparsed(spec: Spec, get: Callable[[tuple[str, int, int]], None]) -> Batches:
    with ThreadPoolExecutor(spec.connections) as pool:
        for _ in pool.map(get, _ranges(spec)):
            yield {}


ENTRANTS: dict[str, tuple[Callable[[Spec, Any], tuple[Batches, State | None]], list[str]]] = {
    "calotype": (calotype, ["torch", "boto3", "calotype.data"]),
    "webdataset": (webdataset, ["torch", "boto3", "webdataset"]),
    "mosaicml": (mosaicml, ["torch", "boto3", "streaming"]),
    "litdata": (litdata, ["torch", "boto3", "litdata", "obstore"]),
    "spdl": (spdl, ["torch", "obstore", "spdl.io", "torch.utils.data"]),
    "limit-obstore": (limit_obstore, ["obstore"]),
    "limit-http": (limit_http, ["boto3", "http.client"]),
    "pool": (pool, ["torch", "boto3", "PIL.Image"]),
}

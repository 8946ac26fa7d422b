"""One measured run of one entrant, in a process of its own; the stream benchmark starts it.

    PYTHON measured.py SPEC FILE-DESCRIPTOR     imports, says `ready`, waits for a line, runs, says the result in JSON
    PYTHON measured.py write FORMAT SPEC        writes the samples in mosaicml's (mds) or litdata's own format

Caches are cold.  What a reader imports is not counted; making it, its processes, its first request and the end of its
processes are.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import resource
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from entrants import BATCH, ENTRANTS, MIB, Spec
from samples import KINDS, samples


def write(format: str, spec: Spec) -> None:
    """The samples of all shards into `spec.folder`, in the format of mosaicml or litdata."""
    shapes = KINDS[spec.kind].arrays
    each = spec.samples // len(spec.tars)
    if format == "mds":
        from streaming import MDSWriter

        columns = {name: f"ndarray:{dtype}:{','.join(map(str, shape))}" for name, (dtype, shape) in shapes.items()}
        with MDSWriter(out=spec.folder, columns=columns | {"json": "str"}, size_limit=64 * MIB) as out:
            for row in rows(spec, each):
                out.write(row)
    else:
        from litdata.streaming.writer import BinaryWriter

        out = BinaryWriter(spec.folder, chunk_bytes=64 * MIB)
        for index, row in enumerate(rows(spec, each)):
            out.add_item(index, row)
        out.done()
        out.merge()


def rows(spec: Spec, each: int) -> Iterator[dict[str, Any]]:
    for shard in range(len(spec.tars)):
        for _, members in samples(spec.kind, shard, each):
            yield members | {"json": members["json"].decode()}


def stub_torchvision() -> None:
    """A torchvision made for CUDA does not import beside a torch without it, for want of two operators that no entrant
    calls; mosaicml and litdata import it all the same."""
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    stub_torchvision.library = library  # type: ignore[attr-defined]  # it ends with its last reference
    import torchvision  # noqa: F401


def load(names: Iterable[str]) -> None:
    for name in names:
        if name in ("streaming", "litdata"):
            try:
                import torchvision  # noqa: F401
            except RuntimeError:
                for half in [one for one in sys.modules if one.startswith("torchvision")]:
                    del sys.modules[half]
                stub_torchvision()
        importlib.import_module(name)


def cpu() -> float:
    """Seconds of this process and of those of its children that ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure(spec: Spec) -> dict[str, Any]:
    """Read an epoch, or from its middle to the first batch."""
    entrant, _ = ENTRANTS[spec.entrant]
    saved = pickle.loads(Path(spec.resume).read_bytes()) if spec.resumed else None
    used, began = cpu(), time.perf_counter()
    batches, state = entrant(spec, saved)
    if spec.entrant == "pool" or spec.entrant.startswith("limit"):
        used, began = cpu(), time.perf_counter()  # what these prepare is no part of what they stand for
    times: list[float] = []
    marks: list[Any] = []
    count, middle = 0, spec.samples // 2 // BATCH * BATCH
    for batch in batches:
        times.append(time.perf_counter())
        if spec.resumed:
            break
        count += _checked(spec, batch, marks)
        if count == middle and state is not None and spec.resume:
            Path(spec.resume).write_bytes(pickle.dumps(state()))
    first = times[0] - began
    if spec.resumed:
        return {"first": first}
    del batches, state
    whole = times[-1] - began
    return {
        "seconds": whole,
        "first": first,
        "gaps": np.diff(times).tolist(),
        "cpu": cpu() - used,
        "samples": count,
        "marks": np.concatenate(marks).tolist() if marks else [],
    }


def _checked(spec: Spec, batch: Any, marks: list[Any]) -> int:
    """Samples of a batch, after a look at its tensors."""
    if not batch:  # a limit's
        return 0
    import torch

    arrays = KINDS[spec.kind].arrays
    for name, (dtype, shape) in arrays.items():
        tensor = batch[name]
        assert isinstance(tensor, torch.Tensor)
        assert (tuple(tensor.shape[1:]), str(tensor.dtype)) == (shape, f"torch.{dtype}")
    tensor = batch["latent" if arrays else "image"]
    if arrays:
        marks.append(tensor.reshape(len(tensor), -1)[:, :1].contiguous().view(torch.uint16).numpy()[:, 0].copy())
    return len(tensor)


def main() -> None:
    if sys.argv[1] == "write":
        load(["streaming" if sys.argv[2] == "mds" else "litdata"])
        write(sys.argv[2], Spec(**json.loads(sys.argv[3])))
        return
    spec = Spec(**json.loads(sys.argv[1]))
    load(ENTRANTS[spec.entrant][1])
    spec.folder += "/local"  # the same every time, and empty: litdata's state holds the path
    shutil.rmtree(spec.folder, ignore_errors=True)
    Path(spec.folder).mkdir()
    with os.fdopen(int(sys.argv[2]), "w") as said:
        print("ready", file=said, flush=True)
        sys.stdin.readline()
        print(json.dumps(measure(spec)), file=said, flush=True)


if __name__ == "__main__":
    main()

"""Latents by Ray Data: `cache_ray_data.py WEIGHTS SIZE ROOT TAR...`; says its images per second.  See cache.py."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import cache
import numpy as np


class Encoder:
    def __init__(self, weights: str, size: int) -> None:
        self.model, self.size = cache.encoder(weights), size

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        began = time.time()
        latents = cache.encoded(self.model, np.stack([cache.decoded(one, self.size) for one in batch["jpg"]]))
        return {"key": batch["__key__"], "latent": latents, "began": np.full(len(latents), began)}


def main() -> None:
    weights, size, root, *tars = sys.argv[1:]
    began = time.time()
    import pyarrow.fs
    import ray

    bucket = root.removeprefix("s3://").split("/")[0]
    endpoint = os.environ["AWS_ENDPOINT_URL_S3"]
    store = pyarrow.fs.S3FileSystem(endpoint_override=endpoint, region="us-east-1")
    ray.init(os.environ["CALOTYPE_RAY_GCS"], logging_level="ERROR", runtime_env={"env_vars": {
        "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}})  # fmt: skip
    data = ray.data.read_webdataset([f"{bucket}/{key}" for key in tars], filesystem=store, decoder=None)
    made = data.map_batches(
        Encoder,
        fn_constructor_args=(weights, int(size)),
        batch_size=cache.BATCH,
        concurrency=cache.WORKERS,
        num_cpus=0.4,
    ).materialize()
    made.write_parquet(f"{root.removeprefix('s3://')}/ray", filesystem=store)
    count, first, now = made.count(), made.min("began"), time.time()
    print(f"whole {count / (now - began):.2f}")
    print(f"steady {count / (now - first):.2f}")


if __name__ == "__main__":
    main()

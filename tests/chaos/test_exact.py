"""One training at each ZeRO stage, hit by all that can happen to it: the samples and the losses of a calm one.

On the real Ray, DeepSpeed, S3 and MLflow, with the real body; `recorded.py` writes down what each rank's step was on.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from calotype import compose, runs
from calotype.compose import as_data
from calotype.data import cache
from calotype.data.store import open_store
from calotype.environment import Worker
from calotype.tasks import batches, denoiser

from tests.chaos.test_kill import TRAIN

ROOT = Path(__file__).parents[2]
RECORDED = Path(__file__).with_name("recorded.py")
SPAWNED = ROOT / "tests" / "tasks" / "spawned.py"
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

BATCH, STEPS, SAVED = 32, 80, 5  # steps between two checkpoints
SEED = int.from_bytes(os.urandom(4))  # of the steps that are hit
ONE, FIVE = [(6, 21)], [(6, 9), (10, 13), (14, 17), (18, 21), (22, 24)]  # ranges of steps, one of each is hit
BLOWS = [("stop", ONE), ("kill", ONE), ("kill", FIVE), ("kill", ONE)]  # by stage, on the first leg

Job = Callable[..., str]


@pytest.fixture(scope="module")
def root(stack: Any, ran: Job) -> str:
    """With a cache in it, of pixels, so that no autoencoder has to be trained."""
    root = f"s3://calotype/exact-{os.urandom(4).hex()}"
    here = ["cluster=local", "track=none", f"root={root}"]
    ran(ROOT / "jobs/prepare.py", *here)
    ran(ROOT / "jobs/cache_latents.py", *here, "autoencoder=identity", "encoding.resolution=8")
    return root


def words(root: str, stage: int) -> list[str]:
    more = [f"name=stage{stage}", f"engine=zero{stage}", f"ema.halflife={1000 + stage}", f"root={root}"]
    more += [f"train.images={STEPS * BATCH}", f"train.checkpoint_every={SAVED * BATCH}", "cluster.hang_seconds=5"]
    return [*TRAIN, *more]


def composed(root: str, stage: int, *changes: str) -> Any:
    return denoiser.resolve(compose.compose("train_denoiser", [*words(root, stage), *changes]))


@pytest.fixture(scope="module")
def samples(root: str) -> dict[int, list[str]]:
    """Images seen at the end of a step -> the ids of its batch, as one reader of the whole stream finds them."""
    config, store = composed(root, 0), open_store(root)
    manifest = cache.load_cache(store, config)
    latents = store.at("latents", cache.encoding_id(manifest.meta["encoding"]))
    stream = batches.stream(config, batches.source_of(config.data, root, latents, manifest)("train"), Worker())
    return {BATCH * (step + 1): list(batch.keys) for step, batch in enumerate(islice(stream.seek(0), STEPS))}


@pytest.fixture(scope="module")
def golden(root: str, started: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> list[dict[int, float]]:
    """By stage: images -> loss of an undisturbed training on two ranks, with neither Ray nor MLflow."""
    folder = tmp_path_factory.mktemp("golden")
    found = []
    for stages in ([0, 1, 2], [3]):  # ZeRO 3 starts slowly beside what other engines left
        jobs = []
        for stage in stages:
            config = composed(root, stage, "track=none", "train.checkpoint_every=1000000000")
            record = {"job": "train_denoiser", "identity": f"golden{stage}", "name": "golden", "root": root,
                      "artifact_root": str(folder / f"{stage}")}  # fmt: skip
            jobs.append({"config": as_data(config), "record": record, "out": str(folder / f"{stage}.json")})
        plan = folder / f"plan{stages[0]}"
        plan.write_text(json.dumps({"world": 2, "store": str(folder / f"store{stages[0]}"), "jobs": jobs}))
        said = [folder / f"said{rank}" for rank in range(2)]
        ranks = [started(SPAWNED, str(plan), str(rank), said=file) for rank, file in enumerate(said)]
        for rank, file in zip(ranks, said, strict=True):
            rank.join(240)
            rank.kill()
            assert rank.exitcode == 0, file.read_text()[-4000:]
        for stage in stages:
            points = json.loads((folder / f"{stage}.json").read_text())["points"]
            found.append({images: figures["loss"] for images, figures in points if "loss" in figures})
    assert all(list(losses) == [BATCH * (step + 1) for step in range(STEPS)] for losses in found)
    return found


def steps(folder: Path) -> Iterator[tuple[int, int, list[dict[str, Any]]]]:
    """(world, rank, what it wrote down) of every rank that ever trained."""
    for path in sorted(folder.glob("steps-*")):
        world, rank = path.name.split("-")[-2:]
        lines = path.read_text().split("\n")[:-1]  # a line that was cut short by a kill has no end
        yield int(world), int(rank), [json.loads(line) for line in lines]


def logged(root: str, stage: int) -> list[tuple[int, float]]:
    """(images, loss) of every point that MLflow holds, in its order."""
    from mlflow import MlflowClient

    record = runs.load(root, compose.identity("train_denoiser", composed(root, stage)))
    assert record is not None
    return [(point.step, point.value) for point in MlflowClient().get_metric_history(record.mlflow_run_id, "loss")]


@pytest.mark.parametrize("stage", range(4))
def test_ids_and_losses_of_a_calm_run(
    ran: Job, root: str, samples: dict[int, list[str]], golden: list[dict[int, float]], tmp_path: Path, stage: int
) -> None:
    """On two workers killed (stage 2: five times; stage 0: stopped), then cancelled; on one, killed with its driver;
    on two to the end.
    """
    chance = random.Random(SEED + stage)

    def hit(kind: str, first: int, last: int, world: int) -> list[Any]:
        """At a random step, on a random rank."""
        return [BATCH * chance.randrange(first, last), chance.randrange(world), kind]

    kind, when = BLOWS[stage]
    legs = [
        (2, [*(hit(kind, first, last, 2) for first, last in when), hit("cancel", 24, 29, 2)]),
        (1, [hit("orphan", 52, 61, 1)]),
        (2, []),
    ]
    for number, (workers, blows) in enumerate(legs):
        (tmp_path / "blows.json").write_text(json.dumps(blows))
        out = ran(RECORDED, str(tmp_path), *words(root, stage), f"cluster.workers={workers}", fails=number < 2)
        assert all((tmp_path / f"{kind}-at-{images}").exists() for images, _, kind in blows), (SEED, out[-4000:])

    taken: dict[int, set[int]] = {}  # images -> sizes of the worlds that took that step
    parts: dict[tuple[int, int, int], list[float]] = {}  # images, world, rank -> its part of the loss, each time
    for world, rank, lines in steps(tmp_path):
        assert [line["images"] for line in lines] == [lines[0]["images"] + BATCH * n for n in range(len(lines))]
        for line in lines:
            whole = samples[line["images"]]
            assert line["keys"] == whole[rank * BATCH // world : (rank + 1) * BATCH // world], (SEED, line["images"])
            taken.setdefault(line["images"], set()).add(world)
            parts.setdefault((line["images"], world, rank), []).append(line["loss"])
    assert sorted(taken) == list(samples)
    alone = min(images for images, worlds in taken.items() if 1 in worlds)
    assert 24 * BATCH < alone < 52 * BATCH
    again = [losses for (images, _, _), losses in parts.items() if images < alone and len(losses) > 1]
    assert again, "the blow cost no step"
    assert all(len(set(losses)) == 1 for losses in again), f"taken again, another loss (SEED={SEED})"

    mine, calm = logged(root, stage), golden[stage]
    assert [images for images, _ in mine] == list(calm), "a point is missing, doubled or out of order"
    assert all(loss == calm[images] for images, loss in mine if images < alone), f"not bit by bit (SEED={SEED})"
    assert max(abs(loss / calm[images] - 1) for images, loss in mine) < 1e-5, SEED

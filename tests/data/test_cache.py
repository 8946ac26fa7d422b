"""Encoding and identity, stored samples, statistics, raw <-> model latents."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calotype.config import Autoencoder, CacheLatents, Condition, Data, Encoding
from calotype.data import cache, differences, statistics, takedowns
from calotype.data.shards import Sample, write_shard
from calotype.data.store import open_store
from calotype.errors import ConfigError, DataError

GOLDEN, GOLDEN_CACHE = "964406bfdc5efb845e8ca5ea946ed810", "df07bf530ad8d9336fe0bbc94cc44b42"

CONFIG = CacheLatents(
    name="c",
    data=Data(name="toy", digest="d" * 64),
    autoencoder=Autoencoder(kind="pretrained", path="x", digest="a" * 64),
    encoding=Encoding(),
    conditions={"text": Condition(digest="t" * 64, encoder={"_target_": "transformers.CLIPTextModel"})},
)


def text(**changes: Any) -> dict[str, Condition]:
    return {"text": replace(CONFIG.conditions["text"], **changes)}


@pytest.mark.parametrize(
    "changed",
    [
        replace(CONFIG, autoencoder=replace(CONFIG.autoencoder, digest="b" * 64)),
        replace(CONFIG, encoding=replace(CONFIG.encoding, dtype="float32")),
        replace(CONFIG, encoding=replace(CONFIG.encoding, resolution=64)),
        replace(CONFIG, encoding=replace(CONFIG.encoding, posterior="deterministic")),
        replace(CONFIG, encoding=replace(CONFIG.encoding, batch=32)),
        replace(CONFIG, encoding=replace(CONFIG.encoding, mirrored=True)),
        replace(CONFIG, conditions=text(digest="u" * 64)),
        replace(CONFIG, conditions=text(length=16)),
        replace(CONFIG, conditions=text(mode="full")),
        replace(CONFIG, conditions=text(mode="masked")),
        replace(CONFIG, conditions={}),
        replace(CONFIG, conditions={"label": Condition(kind="class", source="label", classes=3)}),
    ],
)
def test_whatever_changes_stored_bytes_changes_the_encoding(changed: CacheLatents) -> None:
    old, new = cache.encoding_of(CONFIG), cache.encoding_of(changed)
    assert cache.encoding_id(old) != cache.encoding_id(new)
    assert differences.differences(old, new)


@pytest.mark.parametrize(
    "changed",
    [
        replace(CONFIG, autoencoder=replace(CONFIG.autoencoder, path="elsewhere")),
        replace(CONFIG, conditions=text(drop=0.5)),
        replace(CONFIG, conditions=text(encoder={"_target_": "transformers.T5EncoderModel"})),
        replace(CONFIG, data=replace(CONFIG.data, digest="e" * 64)),
        replace(CONFIG, seed=1, root="elsewhere"),
    ],
)
def test_what_does_not_change_stored_bytes_is_not_in_the_encoding(changed: CacheLatents) -> None:
    assert cache.encoding_of(CONFIG) == cache.encoding_of(changed)


def test_the_encoding_of_version_one_stays_what_it_is() -> None:
    """Golden: caches of this version must be found for ever."""
    assert cache.encoding_id(cache.encoding_of(CONFIG)) == GOLDEN
    assert cache.cache_id(GOLDEN, "d" * 64) == GOLDEN_CACHE


def test_the_key_of_a_latent_shard_that_lost_samples_stays_what_it_is() -> None:
    """Golden: with another key, what was taken down would be encoded again."""
    marks = [takedowns.mark(key) for key in ("s010", "s003")]
    assert marks[1] == "15817969c26b134b8e13ad1da04d81dcd87df1fc7fef478b2acd85d5978ccfb3"
    assert cache.latent_key_of("ab" * 32, marks) == f"{'ab' * 32}-35bf39ee8a5608cc.tar"
    assert cache.source_of(f"{'ab' * 32}-35bf39ee8a5608cc") == "ab" * 32


def test_the_differing_field_is_named_as_the_user_knows_it() -> None:
    other = replace(CONFIG, encoding=replace(CONFIG.encoding, dtype="float32"), conditions=text(length=16))
    assert differences.differences(cache.encoding_of(CONFIG), cache.encoding_of(other)) == [
        "conditions.text.length (32 in the cache, 16 here)",
        "encoding.dtype (float16 in the cache, float32 here)",
    ]


def test_pixel_space_has_no_posterior() -> None:
    config = replace(CONFIG, autoencoder=Autoencoder(kind="identity", f=1, channels=3))
    assert cache.encoding_of(config)["posterior"] == "deterministic"
    assert cache.shape_of(cache.encoding_of(config)) == (3, 32, 32)


def test_a_condition_may_not_take_the_name_of_a_member() -> None:
    with pytest.raises(ConfigError, match=r"conditions\.latent"):
        cache.encoding_of(replace(CONFIG, conditions={"latent": CONFIG.conditions["text"]}))


@pytest.mark.parametrize("array", [
    np.arange(24, dtype=np.float16).reshape(2, 3, 4), np.array(7, np.int64), np.zeros((0, 3), np.float32),
    np.arange(6, dtype=">i4").reshape(2, 3).T,
])  # fmt: skip
def test_arrays_are_plain_npy_and_come_back(array: np.ndarray[Any, Any]) -> None:
    data = cache.to_npy(array)
    assert np.array_equal(np.load(io.BytesIO(data)), array)
    assert np.array_equal(cache.from_npy(memoryview(data)), array)
    assert cache.from_npy(data).shape == array.shape


@pytest.mark.parametrize("data", [
    b"", b"\x93NUMPY", cache.to_npy(np.arange(5))[:-1], cache.to_npy(np.arange(5)) + b"x",
    cache.to_npy(np.arange(4)).replace(b"'<i8'", b"'|O' "), cache.to_npy(np.arange(4)).replace(b"False", b"True "),
])  # fmt: skip
def test_what_is_no_plain_array_is_refused(data: bytes) -> None:
    with pytest.raises((DataError, ValueError)):
        cache.from_npy(data)


def stored(latent: np.ndarray[Any, Any], **about: Any) -> Sample:
    return cache.encode_sample(Sample("k", {}), latent, {"text": np.arange(3, dtype=np.int32)}, about)


def test_a_sample_comes_back_and_a_missing_member_is_named() -> None:
    sample = stored(np.ones((2, 4, 8, 8), np.float16), label=2)
    assert set(sample.members) == {"latent.npy", "text.npy", "json"}
    made = cache.decode_sample(sample, ["text"])
    assert made["latent"].shape == (2, 4, 8, 8)
    assert made["text"].tolist() == [0, 1, 2]
    with pytest.raises(DataError, match=r"sample k has no label\.npy"):
        cache.decode_sample(sample, ["label"])


def test_statistics_are_those_of_drawn_latents() -> None:
    rng = np.random.default_rng(0)
    shift, scale = np.array([5.0, -100.0]), np.array([2.0, 0.01])
    mean = (rng.standard_normal((300, 2, 8, 8)) * scale[:, None, None] + shift[:, None, None]).astype(np.float32)
    std = np.full_like(mean, 0.5)
    samples = [stored(np.stack(pair), label=index % 7) for index, pair in enumerate(zip(mean, std))]
    parts = [statistics.of_samples(samples[:100]), statistics.of_samples(samples[100:])]
    found = statistics.merge(json.loads(json.dumps(parts)))  # as they are remembered between attempts
    drawn = mean + std * rng.standard_normal(mean.shape)
    assert np.allclose(found["channel_mean"], mean.astype(np.float64).mean((0, 2, 3)), rtol=1e-7)
    assert np.allclose(found["channel_std"], np.sqrt(mean.astype(np.float64).var((0, 2, 3)) + 0.25), rtol=1e-7)
    assert np.allclose(found["channel_std"], drawn.std((0, 2, 3)), rtol=0.03)
    assert found["labels"] == 7
    assert found["largest"] == np.abs(mean).max()


def test_statistics_are_a_function_of_the_bytes() -> None:
    samples = [stored(np.random.default_rng(i).standard_normal((2, 4, 3, 3)).astype(np.float16)) for i in range(9)]
    assert statistics.of_samples(samples) == statistics.of_samples(iter(samples))


def test_a_collapsed_channel_is_refused() -> None:
    latent = np.random.default_rng(0).standard_normal((1, 2, 4, 4))
    latent[:, 1] = 3
    with pytest.raises(DataError, match="latent channel 1 is the same everywhere"):
        statistics.merge([statistics.of_samples([stored(latent)])])


def test_model_latents_are_white_and_go_back() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(500, 2, 4, 4, generator=generator) * torch.tensor([3.0, 0.1]).view(1, 2, 1, 1) + 7
    std, noise = torch.full_like(mean, 0.2), torch.randn(mean.shape, generator=generator)
    samples = [stored(torch.stack(pair).numpy()) for pair in zip(mean, std)]
    found = statistics.merge([statistics.of_samples(samples)])
    scale = found["channel_mean"], found["channel_std"]
    model = cache.to_model(mean.half(), std.half(), noise, *scale)
    assert model.dtype == torch.float32
    assert torch.allclose(model.mean((0, 2, 3)), torch.zeros(2), atol=0.03)
    assert torch.allclose(model.std((0, 2, 3)), torch.ones(2), atol=0.03)
    assert torch.allclose(cache.from_model(model, *scale), mean + std * noise, atol=1e-2)
    assert torch.allclose(cache.from_model(cache.to_model(mean, None, None, *scale), *scale), mean, atol=1e-5)
    assert torch.allclose(cache.to_model(mean, std, None, *scale), cache.to_model(mean, None, None, *scale))


def test_rows_of_the_source_are_read_from_columns_that_say_them(tmp_path: Path) -> None:
    store, samples = open_store(str(tmp_path)), [Sample(f"s{n}", {"txt": b"x"}) for n in range(4)]

    def rows(key: str, columns: dict[str, list[Any]] | None) -> list[int]:
        return cache.source_rows(store, write_shard(store, key, samples, 4, columns=columns, buckets=[0, 0, 1, 1]), ())

    assert rows("sound.tar", {"row": [3, 0, 1, 9]}) == [3, 0, 1, 9]
    others: list[list[Any]] = [[0, 0, 1, 2], [-1, 0, 1, 2], [None, 0, 1, 2], ["a", "b", "c", "d"], [[0], [1], [2], [3]]]
    for n, columns in enumerate([None, {"rov": [0, 1, 2, 3]}, *({"row": other} for other in others)]):
        with pytest.raises(DataError, match=rf"columns of .*/{n}\.tar do not say of which row"):
            rows(f"{n}.tar", columns)

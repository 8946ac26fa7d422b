"""What is refused before anything starts: impossible choices and combinations, and code outside the allowlist."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from calotype.config import (
    EMA,
    Autoencoder,
    CacheLatents,
    Cluster,
    Condition,
    Diffusion,
    Encoding,
    Prepare,
    TrainAutoencoder,
    TrainDenoiser,
)
from calotype.errors import ConfigError

# Code that a config may name with `_target_`.  Everything else is refused before anything is imported.
TARGETS = ("diffusers.", "transformers.", "torch.optim.")
HYDRA_KEYS = ("_partial_", "_args_", "_recursive_", "_convert_")  # would change what is built; none has a use here

CHOICES: dict[str, tuple[Any, ...]] = {
    "data.kind": ("digits", "folder"),
    "data.captions": ("sidecar", "table", "folder_name", "none"),
    "autoencoder.kind": ("kl", "pretrained", "identity"),
    "encoding.dtype": ("float16", "float32"),
    "encoding.posterior": ("gaussian", "deterministic"),
    "encoding.precision": ("fp32", "bf16"),
    "conditions.*.kind": ("cross", "class"),
    "conditions.*.source": ("text", "label"),
    "conditions.*.mode": ("tokens", "full", "masked"),
    "diffusion.prediction": ("epsilon", "v_prediction", "sample", "flow_prediction"),
    "diffusion.schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "diffusion.timestep_sampling": ("uniform", "logit_normal"),
    "optim.schedule": ("constant", "cosine", "linear"),
    "stream.on_error": ("strict", "quarantine"),
    "engine.kind": ("deepspeed", "torch"),
    "engine.stage": (0, 1, 2, 3),
    "engine.precision": ("fp32", "bf16", "fp16"),
    "engine.offload": ("none", "cpu"),
    "engine.compile": ("none", "default", "reduce-overhead", "max-autotune"),
    "cluster.kind": ("ray", "local"),
    "track.kind": ("mlflow", "none"),
    "sampler.kind": ("ddim", "dpm++", "euler"),
}

RANGES: dict[str, tuple[float, float]] = {
    "data.held_out": (0, 0.9),
    "data.image_size": (8, 4096),
    "data.shard_samples": (1, 1e9),
    "data.shard_mb": (1, 1e6),
    "data.chunk_samples": (1, 1e6),
    "data.max_pixels": (1, 1e9),
    "data.max_caption": (1, 1e6),
    "autoencoder.f": (1, 64),
    "autoencoder.channels": (1, 1024),
    "encoding.resolution": (8, 16384),
    "encoding.bucket_step": (0, 16384),
    "encoding.bucket_aspect": (1, 16),
    "encoding.batch": (1, 65536),
    "accept.samples": (1, 1e4),
    "accept.psnr": (-1, 99),
    "accept.psnr_loss": (0, 99),
    "accept.collapsed": (0, 1),
    "conditions.*.drop": (0, 1),
    "conditions.*.length": (1, 4096),
    "diffusion.timesteps": (1, 1e6),
    "diffusion.logit_mean": (-10, 10),
    "diffusion.logit_std": (0.01, 10),
    "diffusion.shift": (0.01, 100),
    "diffusion.min_snr_gamma": (0, 1e6),
    "optim.lr": (0, 1e3),
    "optim.clip": (0, 1e9),
    "ema.halflife": (0, 1e12),
    "ema_halflife": (0, 1e12),
    "train.images": (1, 1e15),
    "train.batch": (1, 1e7),
    "train.window": (1, 1e7),
    "train.log_every": (1, 1e15),
    "train.checkpoint_every": (1, 1e15),
    "train.keep": (1, 1e6),
    "train.keep_every": (0, 1e15),
    "train.spike": (0, 1e9),
    "train.bad_steps": (0, 1e6),
    "stream.memory_mb": (0, 1e7),
    "stream.readers": (1, 256),
    "stream.workers": (0, 256),
    "stream.error_budget": (0, 1e12),
    "stream.cache_gb": (0.001, 1e7),
    "engine.micro_batch": (0, 1e7),
    "cluster.workers": (1, 1e6),
    "cluster.cpus": (1, 1e5),
    "cluster.gpus": (0, 64),
    "cluster.memory_gb": (0, 1e6),
    "cluster.peak_tflops": (0, 1e6),
    "cluster.price": (0, 1e6),
    "cluster.hang_seconds": (0, 1e6),
    "sampler.steps": (1, 10_000),
    "sampler.guidance": (0, 1e3),
    "sampler.batch": (1, 1e6),
}


def check(config: Any) -> None:
    """Refuse, with one `ConfigError`, a job config that could not run.

    Args:
        config: one of `config.JOBS`, or any object with some of their groups.
    """
    for setting, allowed in CHOICES.items():
        for name, value in _values(config, setting):
            if value not in allowed:
                raise ConfigError(f"{name}={value!r} is not known: choose one of {', '.join(map(str, allowed))}")
    for setting, (low, high) in RANGES.items():
        for name, value in _values(config, setting):
            if not all(low <= one <= high for one in (value if isinstance(value, list) else [value])):
                raise ConfigError(f"{name}={value} is out of range: {low:g} to {high:g}")
    if hasattr(config, "cluster"):
        _check_workers(config.cluster, isinstance(config, TrainAutoencoder | TrainDenoiser))
    for name, group in vars(config).items():
        check_targets(vars(group) if hasattr(group, "__dict__") else group, name)
    if isinstance(config, TrainAutoencoder):
        _check_autoencoder(config.autoencoder, config.resolution, "resolution")
        if config.autoencoder.kind != "kl":
            raise ConfigError(
                f"autoencoder.kind={config.autoencoder.kind} has nothing to train: "
                "choose an architecture, such as autoencoder=kl_f4"
            )
    elif hasattr(config, "encoding"):
        _check_autoencoder(config.autoencoder, config.encoding.resolution, "encoding.resolution")
        _check_buckets(config.encoding, config.autoencoder.f)
        if config.autoencoder.kind == "kl":
            raise ConfigError(
                "autoencoder.kind=kl is an architecture without weights: use autoencoder=pretrained "
                "autoencoder.path=run:NAME (your train_autoencoder run) or a diffusers folder"
            )
        for name, condition in config.conditions.items():
            _check_condition(name, condition)
    if not re.fullmatch(r"[A-Za-z0-9][\w.\-]{0,99}", config.name):
        raise ConfigError(f"name={config.name!r} becomes part of file names: use letters, digits, _ . and -, up to 100")
    if isinstance(config, Prepare | CacheLatents) and (config.data.filter or config.data.takedown):
        raise ConfigError("data.filter and data.takedown choose what is trained on: leave them out of this job")
    if isinstance(config, TrainDenoiser):
        check_denoiser(config)
        check_diffusion(config.diffusion)
        _check_averages(config.ema)
    if isinstance(config, TrainAutoencoder | TrainDenoiser):
        _check_train(config)


def check_targets(node: Any, where: str) -> None:
    """Refuse every `_target_`, however deep, that is not under an allowed prefix (resolved code is checked again)."""
    if hasattr(node, "__dataclass_fields__"):
        node = vars(node)
    if isinstance(node, Mapping):
        for key, value in node.items():
            if str(key) in HYDRA_KEYS:
                raise ConfigError(f"{where}.{key} is not used here: only _target_ and its arguments are")
            if key == "_target_" and not (isinstance(value, str) and value.startswith(TARGETS)):
                raise ConfigError(
                    f"{where}._target_={value!r} is not allowed: name something under {', '.join(TARGETS)}"
                )
            check_targets(value, f"{where}.{key}")
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            check_targets(value, f"{where}[{index}]")


def latent_shape(autoencoder: Autoencoder, resolution: int) -> tuple[int, int, int]:
    """Shape (C, h, w) of one latent of a `resolution` x `resolution` image."""
    return autoencoder.channels, resolution // autoencoder.f, resolution // autoencoder.f


def cross_width(conditions: Mapping[str, Condition]) -> int | None:
    """Width of the sequence that cross-attention reads; None without one or when only its folder knows."""
    for condition in conditions.values():
        if condition.kind == "cross":
            width = condition.encoder.get("config", {}).get("hidden_size")
            return int(width) if width is not None else None
    return None


def check_denoiser(config: TrainDenoiser) -> None:
    """Refuse a denoiser whose sizes contradict its latents or its conditions."""
    channels, height, _ = latent_shape(config.autoencoder, config.encoding.resolution)
    model = config.denoiser.model
    for key, value, why in (
        ("in_channels", channels, "autoencoder.channels"),
        ("out_channels", channels, "autoencoder.channels"),
        ("sample_size", height, "encoding.resolution / autoencoder.f"),
        ("cross_attention_dim", cross_width(config.conditions), "width of the text encoder"),
    ):
        if model.get(key) is not None and value is not None and model[key] != value:
            raise ConfigError(
                f"denoiser.model.{key}={model[key]} but {why} is {value}: "
                f"set denoiser.model.{key}={value} or leave it out"
            )
    blocks = model.get("block_out_channels", ())
    if blocks and height % 2 ** (len(blocks) - 1):
        raise ConfigError(
            f"latents of {height}x{height} cannot be halved {len(blocks) - 1} times: use fewer "
            "denoiser.model.block_out_channels or a larger encoding.resolution"
        )
    step = config.autoencoder.f * 2 ** (len(blocks) - 1) if blocks else 1
    if config.encoding.bucket_step % step:
        raise ConfigError(
            f"encoding.bucket_step={config.encoding.bucket_step} makes latents that cannot be halved {len(blocks) - 1} "
            f"times: cache with a multiple of {step}, or use fewer denoiser.model.block_out_channels"
        )


def check_diffusion(diffusion: Diffusion) -> None:
    """Refuse an objective that is undefined somewhere, and settings that the chosen one never reads."""
    prediction, bare = diffusion.prediction, Diffusion()
    flow = prediction == "flow_prediction"
    if diffusion.zero_snr and prediction == "epsilon":
        raise ConfigError(
            "diffusion.zero_snr=true with diffusion.prediction=epsilon: where no signal is left the noise says nothing "
            "of the image; set diffusion.prediction=v_prediction or sample"
        )
    if diffusion.zero_snr and diffusion.min_snr_gamma and not flow:
        raise ConfigError(
            f"diffusion.min_snr_gamma={diffusion.min_snr_gamma:g} with diffusion.zero_snr=true: the weight of the last "
            "timestep, where sampling begins, would be 0, so that it is never trained; leave one of them out"
        )
    unread = {
        "shift": not flow,
        "logit_mean": diffusion.timestep_sampling != "logit_normal",
        "logit_std": diffusion.timestep_sampling != "logit_normal",
    }
    unread |= dict.fromkeys(("zero_snr", "schedule", "beta_start", "beta_end"), flow)
    for name, never in unread.items():
        if never and (value := getattr(diffusion, name)) != getattr(bare, name):
            raise ConfigError(
                f"diffusion.{name}={value} means nothing with diffusion.prediction={prediction} and "
                f"diffusion.timestep_sampling={diffusion.timestep_sampling}: leave it out"
            )


def _check_autoencoder(autoencoder: Autoencoder, resolution: int, name: str) -> None:
    if resolution % autoencoder.f:
        raise ConfigError(f"{name}={resolution} is not a multiple of autoencoder.f={autoencoder.f}")
    model = autoencoder.model
    blocks = model.get("block_out_channels")
    if blocks and 2 ** (len(blocks) - 1) != autoencoder.f:
        raise ConfigError(
            f"autoencoder.f={autoencoder.f} but {len(blocks)} autoencoder.model.block_out_channels "
            f"downsample by {2 ** (len(blocks) - 1)}"
        )
    if model.get("latent_channels", autoencoder.channels) != autoencoder.channels:
        raise ConfigError(
            f"autoencoder.channels={autoencoder.channels} but autoencoder.model.latent_channels="
            f"{model['latent_channels']}"
        )
    if autoencoder.kind == "identity" and (autoencoder.f, autoencoder.channels) != (1, 3):
        raise ConfigError("autoencoder.kind=identity is pixel space: autoencoder.f=1 autoencoder.channels=3")
    if autoencoder.kind == "pretrained" and not autoencoder.path and not autoencoder.digest:
        raise ConfigError("autoencoder.path is missing: name a diffusers folder, a hub id or run:NAME")


def _check_buckets(encoding: Encoding, f: int) -> None:
    step, resolution = encoding.bucket_step, encoding.resolution
    if step and (resolution % step or step % f):
        raise ConfigError(
            f"encoding.bucket_step={step} must be a multiple of {f}, the autoencoder's factor, and divide "
            f"encoding.resolution={resolution}"
        )


def _check_condition(name: str, condition: Condition) -> None:
    where = f"conditions.{name}"
    if "." in name or "/" in name:
        raise ConfigError(f"{where}: the name of a condition becomes a member of each sample, without . or /")
    if condition.kind == "class" and (condition.source != "label" or condition.classes < 1):
        raise ConfigError(f"{where}.kind=class needs {where}.source=label and {where}.classes >= 1")
    if condition.kind == "cross" and condition.source == "text":
        if condition.mode == "tokens" and not condition.encoder:
            raise ConfigError(f"{where}.mode=tokens trains a text encoder: give {where}.encoder")
        if condition.mode != "tokens" and not condition.path:
            raise ConfigError(f"{where}.mode={condition.mode} caches a frozen text encoder: give {where}.path")
    elif condition.kind == "cross":
        raise ConfigError(f"{where}.kind=cross needs {where}.source=text")


def _check_averages(ema: EMA) -> None:
    every = [ema.halflife, *ema.halflives]
    if ema.halflives and (min(every) < 1 or len(set(every)) < len(every)):
        raise ConfigError(
            f"ema.halflives={ema.halflives} with ema.halflife={ema.halflife}: give halflives in images, each once, and "
            "set ema.halflife to the one that is drawn from first"
        )


def _check_workers(cluster: Cluster, training: bool) -> None:
    given = cluster.workers
    if isinstance(given, list) and (len(given) != 2 or given[0] >= given[1]):
        raise ConfigError(f"cluster.workers={given} must be one number, or [LEAST,MOST] such as [2,8]")
    if isinstance(given, list) and not training:
        raise ConfigError(
            f"cluster.workers={given} is for trainings: with cluster.workers={given[1]} this job goes on with those "
            "that there is room for"
        )
    if cluster.kind == "local" and given != 1:
        raise ConfigError(
            f"cluster.workers={given} with cluster=local, which is one process: set cluster.workers=1 or cluster=ray"
        )


def _check_train(config: TrainAutoencoder | TrainDenoiser) -> None:
    train, cluster = config.train, config.cluster
    if not 0 <= train.lanes <= train.batch:
        raise ConfigError(f"train.lanes={train.lanes} must be 0 to train.batch={train.batch}: lanes share its slots")
    if 0 < train.spike <= 1:
        raise ConfigError(f"train.spike={train.spike} would skip usual steps: use 0 (none) or more than 1, such as 5")
    if cluster.most > train.batch:
        raise ConfigError(
            f"cluster.workers={cluster.workers} is more than train.batch={train.batch}: "
            "every worker needs an image of each batch"
        )
    if config.stream.cache and not config.stream.cache.startswith(("/", "~")):
        raise ConfigError(
            f"stream.cache={config.stream.cache} is not an absolute path: workers run in folders of their own"
        )
    if config.engine.precision == "fp16" and cluster.kind == "ray" and not cluster.gpus:
        raise ConfigError("engine.precision=fp16 needs GPUs: set cluster.gpus=1, or engine.precision=bf16 or fp32")
    if config.engine.compile != "none" and config.engine.kind == "deepspeed" and config.engine.stage == 3:
        raise ConfigError(
            f"engine.compile={config.engine.compile} with engine.stage=3, whose weights come and go in every layer: "
            "set engine.compile=none or a lower engine.stage"
        )
    if config.engine.offload != "none" and (config.engine.kind == "torch" or not config.engine.stage):
        raise ConfigError(
            f"engine.offload={config.engine.offload} with an engine that partitions nothing: "
            "set engine=zero1, zero2 or zero3, or engine.offload=none"
        )
    if train.flip and isinstance(config, TrainDenoiser) and not config.encoding.mirrored:
        raise ConfigError(
            "train.flip=true needs latents of mirrored images: cache and train with encoding.mirrored=true"
        )


def _values(config: Any, setting: str) -> Iterator[tuple[str, Any]]:
    """(full name, value) of a dotted setting where the config has it; `*` runs over a mapping."""
    nodes: list[tuple[str, Any]] = [("", config)]
    for part in setting.split("."):
        if part == "*":
            nodes = [(f"{name}.{key}", value) for name, node in nodes for key, value in node.items()]
        else:
            nodes = [(f"{name}.{part}".lstrip("."), getattr(node, part)) for name, node in nodes if hasattr(node, part)]
    yield from nodes

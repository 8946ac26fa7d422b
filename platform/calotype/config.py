"""Every setting of every job: one frozen dataclass per group, one per job, with its meaning.

Layers, weakest first: these defaults < `conf/<group>/` < `conf/experiment/` < the command line.  A config is
composed once, where the user types (`compose.py`), checked (`checks.py`), and handed on as data.  No torch import here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MISSING = "???"  # OmegaConf's marker: the user must say


def setting(default: Any, meaning: str, *, identity: bool = True) -> Any:
    """One field: its default, one line of meaning, and whether it changes what a run computes (run identity)."""
    metadata = {"meaning": meaning, "identity": identity}
    if isinstance(default, dict | list):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


# ---------------------------------------------------------------------------------------------- groups


@dataclass(frozen=True)
class Data:
    """A dataset, and the source that `prepare` makes it from."""

    name: str = setting(MISSING, "dataset name: shards and manifests live under ROOT/datasets/NAME")
    digest: str = setting("", "digest of the dataset's manifest; filled in on submit, newest version if empty")
    filter: list[Any] = setting(
        [], "training: samples to keep, as pyarrow's filters: [[width,'>=',512],[label,in,[1,2]]]", identity=False
    )
    takedown: str = setting("", "training: a text file of keys, here or s3://, not to be used", identity=False)
    selection: str = setting("", "digest of filter and takedown over the dataset; filled in on submit")
    kind: str = setting("digits", "source to prepare from: digits | folder")
    path: str = setting("", "folder: where the images lie")
    captions: str = setting("sidecar", "folder: sidecar (.txt beside each image) | table | folder_name | none")
    table: str = setting("", "captions=table: a .csv, .jsonl or .parquet file")
    file_column: str = setting("file", "captions=table: column with the path of the image, relative to `path`")
    caption_column: str = setting("caption", "captions=table: column with the caption")
    image_size: int = setting(32, "digits: edge in pixels that the 8x8 originals are resized to")
    held_out: float = setting(0.1, "share of samples held out, chosen by hash of the key")
    shard_samples: int = setting(10_000, "samples per shard, at most")
    shard_mb: int = setting(1_000, "MB of image files per shard, at most; a worker holds two to three times that")
    chunk_samples: int = setting(256, "samples per chunk (unit of order, GET and hash), fewer where they exceed 4 MiB")
    max_pixels: int = setting(100_000_000, "images with more pixels are quarantined (decompression bombs)")
    max_caption: int = setting(4_096, "longer captions are quarantined, in characters")
    error_budget: int = setting(0, "quarantined samples allowed before the job fails", identity=False)


@dataclass(frozen=True)
class Autoencoder:
    """Image <-> latent.  `kl` is trained here, `pretrained` is brought, `identity` is pixel space."""

    kind: str = setting("kl", "kl | pretrained | identity")
    path: str = setting(
        "", "pretrained: diffusers folder, hub id, s3:// URI, or run:NAME of a train_autoencoder run", identity=False
    )
    digest: str = setting("", "digest of the encoder half; filled in on submit")
    f: int = setting(4, "downsampling factor H/h (Rombach et al. 2022, section 3.1)")
    channels: int = setting(4, "latent channels")
    model: dict[str, Any] = setting({}, "`_target_` and arguments of the diffusers autoencoder")


@dataclass(frozen=True)
class Encoding:
    """How images become stored latents; part of the cache's identity."""

    resolution: int = setting(32, "edge in pixels of the centred square; with bucket_step: of one of as many pixels")
    bucket_step: int = setting(
        0, "aspect buckets: sides are multiples of this, and hold at most resolution^2 pixels; 0: squares only"
    )
    bucket_aspect: float = setting(2.0, "aspect buckets: the longer side over the shorter, at most")
    dtype: str = setting("float16", "stored latents: float16 | float32 (numpy has no bfloat16)")
    posterior: str = setting("gaussian", "gaussian (mean and std are stored) | deterministic (mean only)")
    batch: int = setting(
        64, "images per encoder call: fixed, tail padded, so that bytes never depend on workers; part of E"
    )
    mirrored: bool = setting(False, "the latent of each mirrored image too, for train.flip of the denoiser")
    precision: str = setting("fp32", "fp32 | bf16: in which the encoder computes; what is stored is `dtype`")
    compile: bool = setting(False, "torch.compile the encoder: faster on a GPU, after a minute")


@dataclass(frozen=True)
class Accept:
    """The gate: a cache outside of these limits is not committed.  None of it changes a byte of a latent."""

    samples: int = setting(2, "of each shard, decoded and compared with their images", identity=False)
    psnr: float = setting(
        -1.0, "dB they must reach on average; -1: its own run's less 3, or 12 for weights of no run", identity=False
    )
    psnr_loss: float = setting(1.0, "dB that storing may cost on average, against encoding anew", identity=False)
    collapsed: float = setting(0.5, "share of latent channels that may say nothing of the image", identity=False)


@dataclass(frozen=True)
class Condition:
    """One input that steers the denoiser.  A mapping of these makes the conditioning; text is one of them."""

    kind: str = setting("cross", "cross (sequence for cross-attention) | class (label embedding)")
    source: str = setting("text", "text | label: what of a sample it is made from")
    drop: float = setting(0.1, "probability of replacing it by the empty condition (classifier-free guidance)")
    mode: str = setting(
        "tokens", "text: tokens (encoder trained jointly) | full (frozen encoder, cached, padded) | masked (not padded)"
    )
    tokenizer: str = setting(
        "small", "text: small (ships with Calotype) or a transformers folder or hub id", identity=False
    )
    length: int = setting(32, "text: tokens, padded")
    classes: int = setting(0, "label: number of classes")
    encoder: dict[str, Any] = setting({}, "text: `_target_` and config of the transformers text model (mode=tokens)")
    path: str = setting("", "text: folder or hub id of a frozen transformers text model", identity=False)
    digest: str = setting("", "digest of tokenizer and frozen encoder; filled in on submit")


@dataclass(frozen=True)
class Denoiser:
    """The network that is trained; sizes left out of `model` follow from latents and conditions."""

    model: dict[str, Any] = setting({}, "`_target_` and arguments of the diffusers denoiser")
    init_from: str = setting("", "start from weights: run:NAME, run:NAME@IMAGES or a diffusers folder", identity=False)
    init_digest: str = setting("", "digest of init_from; filled in on submit")


@dataclass(frozen=True)
class Diffusion:
    """Forward process and objective, in diffusers' words."""

    prediction: str = setting(
        "epsilon",
        "epsilon (Ho et al. 2020) | v_prediction (Salimans & Ho 2022) | sample (the latent itself) | "
        "flow_prediction (flow matching along straight lines, Liu et al. 2023)",
    )
    schedule: str = setting("scaled_linear", "betas: linear | scaled_linear | squaredcos_cap_v2")
    timesteps: int = setting(1000, "length T of the forward process")
    beta_start: float = setting(0.00085, "first beta (linear schedules)")
    beta_end: float = setting(0.012, "last beta (linear schedules)")
    zero_snr: bool = setting(
        False, "rescale the betas so that the last timestep is pure noise (Lin et al. 2024, algorithm 1)"
    )
    timestep_sampling: str = setting("uniform", "of training: uniform | logit_normal (Esser et al. 2024, eq. 19)")
    logit_mean: float = setting(0.0, "logit_normal: above 0 more noise is seen, below 0 less")
    logit_std: float = setting(1.0, "logit_normal: how wide")
    shift: float = setting(
        1.0, "flow_prediction: t => shift t / (1 + (shift - 1) t): more noise for larger images (ibid., eq. 23)"
    )
    min_snr_gamma: float = setting(
        0.0, "clip the loss weights at this signal-to-noise ratio, 5 in the paper; 0 for no weights (Hang et al. 2023)"
    )


@dataclass(frozen=True)
class Optim:
    """AdamW and its learning-rate schedule, in images seen."""

    lr: float = setting(1e-4, "peak learning rate")
    betas: tuple[float, float] = setting((0.9, 0.999), "Adam's betas")
    eps: float = setting(1e-8, "Adam's epsilon")
    weight_decay: float = setting(0.0, "decoupled weight decay")
    clip: float = setting(1.0, "global gradient norm clip; 0 for none")
    schedule: str = setting("constant", "constant | cosine | linear (both decay to 0 at train.images)")
    warmup: int = setting(0, "linear warm-up, in images")


@dataclass(frozen=True)
class EMA:
    """Exponential moving average of the weights (Karras et al. 2024, section 3)."""

    halflife: int = setting(500_000, "in images; 0 for no EMA")
    halflives: list[int] = setting([], "of further averages, in images: each is as much memory as the weights")
    rampup: float = setting(0.05, "halflife is at most this share of the images seen, early in training")


@dataclass(frozen=True)
class Train:
    """The loop, counted in images."""

    images: int = setting(1_000_000, "train until this many images were seen")
    batch: int = setting(256, "global batch: images per optimizer step, over all workers")
    lanes: int = setting(0, "lanes of the global order, each on a chunk of its own; 0 = batch (see data/order.py)")
    window: int = setting(1_024, "samples per shuffle window of a lane")
    flip: bool = setting(False, "mirror images at random; a denoiser needs a cache with encoding.mirrored")
    log_every: int = setting(2_048, "images between metric points", identity=False)
    validate_every: int = setting(100_000, "images between validation losses; 0 for never", identity=False)
    sample_every: int = setting(100_000, "images between sample grids; 0 for never", identity=False)
    checkpoint_every: int = setting(100_000, "images between checkpoints", identity=False)
    keep: int = setting(2, "newest checkpoints kept", identity=False)
    keep_every: int = setting(
        0, "images: the first checkpoint at or after each multiple is kept for ever; 0 for none", identity=False
    )
    spike: float = setting(
        0.0, "steps whose loss or gradient norm exceeds this many medians of the last 128 are skipped; 0: none are"
    )
    bad_steps: int = setting(
        0, "steps in a row that are skipped for a loss or gradient that is not finite; one more is final"
    )


@dataclass(frozen=True)
class Stream:
    """How a training job reads its shards.  None of it changes what it reads."""

    memory_mb: int = setting(
        0, "MiB that one worker's reading takes; 0: what the order needs, at least 2,048", identity=False
    )
    readers: int = setting(8, "parallel range GETs of one worker", identity=False)
    workers: int = setting(0, "loader processes of one worker; 0 reads and decodes in threads", identity=False)
    on_error: str = setting("strict", "strict | quarantine: train without damaged samples, by name", identity=False)
    error_budget: int = setting(0, "samples that quarantine may leave out before the job fails", identity=False)
    cache: str = setting("", "folder on a local disk that keeps chunks, for all workers of a node", identity=False)
    cache_gb: float = setting(50.0, "GB that stream.cache may hold; what was used longest ago goes", identity=False)


@dataclass(frozen=True)
class Engine:
    """Who takes the optimizer step.  None of it is identity but precision and tf32: the losses are the same."""

    kind: str = setting("deepspeed", "deepspeed | torch (plain PyTorch, no DeepSpeed needed)", identity=False)
    stage: int = setting(0, "ZeRO stage: 0 none | 1 optimizer | 2 + gradients | 3 + weights", identity=False)
    precision: str = setting("fp32", "fp32 | bf16 | fp16: compute; master weights are fp32")
    micro_batch: int = setting(0, "images per forward on one worker; 0 = all of its share", identity=False)
    tf32: bool = setting(False, "what computes in fp32 on a GPU does so in TF32: faster, with 10 bits of mantissa")
    channels_last: bool = setting(
        False, "latents in channels_last: for engine.compile, as PyTorch's own GroupNorm undoes it", identity=False
    )
    compile: str = setting(
        "none",
        "torch.compile: none | default | reduce-overhead (CUDA graphs) | max-autotune; kernels are kept in "
        "TORCHINDUCTOR_CACHE_DIR",
        identity=False,
    )
    checkpoint_activations: bool = setting(
        False, "compute blocks again in the backward pass: less memory, about a third more time", identity=False
    )
    offload: str = setting(
        "none",
        "none | cpu: optimizer, its states, master weights and averages in host memory, with stage 3 weights too: much "
        "less memory on the GPU, slower steps",
        identity=False,
    )


@dataclass(frozen=True)
class Cluster:
    """Where a task's body runs."""

    kind: str = setting("ray", "ray | local (in this process, one worker)", identity=False)
    workers: int | list[int] = setting(
        1, "of training, prepare and cache; training: [LEAST,MOST] takes what there is room for", identity=False
    )
    cpus: int = setting(1, "CPUs per worker, also its compute threads", identity=False)
    gpus: float = setting(0.0, "GPUs per worker; fractions share one between actors", identity=False)
    memory_gb: float = setting(0.0, "GB of a worker's GPU: what does not fit is refused; 0: not known", identity=False)
    peak_tflops: float = setting(0.0, "dense peak of a worker, for its MFU; 0: as the data sheet says", identity=False)
    price: float = setting(0.0, "of one worker for an hour: the run says its cost; 0: not known", identity=False)
    hang_seconds: float = setting(180.0, "training: start again after so long without a step; 0: never", identity=False)

    @property
    def least(self) -> int:  # without which a training waits
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most(self) -> int:  # that a job asks for
        return self.workers if isinstance(self.workers, int) else self.workers[1]


@dataclass(frozen=True)
class Track:
    """Where metrics, pictures and lineage go."""

    kind: str = setting("mlflow", "mlflow | none", identity=False)
    experiment: str = setting("calotype", "MLflow experiment", identity=False)
    parent: str = setting("", "MLflow run id of the sweep that this run belongs to; filled in by -m", identity=False)


@dataclass(frozen=True)
class Sampler:
    """Reverse process."""

    kind: str = setting("ddim", "ddim | dpm++ | euler (diffusers' schedulers)")
    steps: int = setting(25, "denoiser evaluations")
    guidance: float = setting(2.0, "classifier-free guidance scale; 1 = none (Ho & Salimans 2022)")
    batch: int = setting(100, "images per denoiser call", identity=False)


@dataclass(frozen=True)
class Job:
    """What every job has."""

    name: str = setting(MISSING, "what you call this run; `run:NAME` refers to the newest finished one", identity=False)
    root: str = setting(
        "s3://calotype", "where datasets, caches and runs live: s3://BUCKET[/PREFIX] or a folder", identity=False
    )
    seed: int = setting(0, "of everything random")
    cluster: Cluster = setting(Cluster, "", identity=False)
    track: Track = setting(Track, "", identity=False)


# ------------------------------------------------------------------------------------------------ jobs


@dataclass(frozen=True)
class Prepare(Job):
    """A source becomes WebDataset shards, sidecars and a manifest."""

    data: Data = setting(Data, "")


@dataclass(frozen=True)
class TrainAutoencoder(Job):
    """Reconstruction + KL (Rombach et al. 2022, section 3.1 and appendix G)."""

    data: Data = setting(Data, "")
    autoencoder: Autoencoder = setting(Autoencoder, "")
    resolution: int = setting(32, "edge in pixels of the training images")
    kl_weight: float = setting(1e-6, "weight of the KL term")
    l2_weight: float = setting(1.0, "weight of the squared error, which is added to the absolute error")
    optim: Optim = setting(Optim, "")
    train: Train = setting(Train, "")
    stream: Stream = setting(Stream, "", identity=False)
    engine: Engine = setting(Engine, "")


@dataclass(frozen=True)
class CacheLatents(Job):
    """Every image of a dataset, encoded once."""

    data: Data = setting(Data, "")
    autoencoder: Autoencoder = setting(Autoencoder, "")
    encoding: Encoding = setting(Encoding, "")
    conditions: dict[str, Condition] = setting({}, "name -> condition")
    accept: Accept = setting(Accept, "", identity=False)


@dataclass(frozen=True)
class TrainDenoiser(Job):
    """The latent diffusion model itself (Rombach et al. 2022, section 3.2 and 3.3)."""

    data: Data = setting(Data, "")
    autoencoder: Autoencoder = setting(Autoencoder, "")
    encoding: Encoding = setting(Encoding, "")
    conditions: dict[str, Condition] = setting({}, "name -> condition")
    cache: str = setting("", "digest of the latent cache's manifest; filled in on submit", identity=False)
    denoiser: Denoiser = setting(Denoiser, "")
    diffusion: Diffusion = setting(Diffusion, "")
    optim: Optim = setting(Optim, "")
    ema: EMA = setting(EMA, "")
    train: Train = setting(Train, "")
    stream: Stream = setting(Stream, "", identity=False)
    engine: Engine = setting(Engine, "")
    sampler: Sampler = setting(Sampler, "of the grids drawn while it trains", identity=False)
    prompts: list[Any] = setting([], "drawn in the grids while it trains; texts or labels", identity=False)


@dataclass(frozen=True)
class Sample(Job):
    """Pictures from a trained denoiser."""

    run: str = setting(MISSING, "run:NAME or run:NAME@IMAGES of a train_denoiser run, or its identity", identity=False)
    run_digest: str = setting("", "checkpoint that is sampled; filled in on submit")
    prompts: list[Any] = setting([], "texts or labels, one image each")
    prompts_file: str = setting("", "a text file, one prompt per line, instead of prompts", identity=False)
    per_prompt: int = setting(1, "images per prompt")
    sampler: Sampler = setting(Sampler, "")
    ema: bool = setting(True, "sample the averaged weights")
    ema_halflife: int = setting(0, "which average: one of the run's ema.halflives; 0 for its ema.halflife")
    out: str = setting("", "also copy the pictures into this folder, here", identity=False)


@dataclass(frozen=True)
class Evaluate(Job):
    """How good a denoiser is: recognised prompts, FID, KID, autoencoder PSNR, speed."""

    run: str = setting(MISSING, "run:NAME or run:NAME@IMAGES of a train_denoiser run, or its identity", identity=False)
    run_digest: str = setting("", "checkpoint that is evaluated; filled in on submit")
    sampler: Sampler = setting(Sampler, "")
    ema: bool = setting(True, "evaluate the averaged weights")
    ema_halflife: int = setting(0, "which average: one of the run's ema.halflives; 0 for its ema.halflife")
    images: int = setting(100, "prompted images for the recognition figures")
    fid_images: int = setting(0, "images for FID and KID; 0 for none")
    features: str = setting(
        "digits",
        "feature extractor of FID and KID: digits (a small classifier trained on the real "
        "ones) or the path of a TorchScript Inception",
    )
    pixel_run: str = setting("", "run of the same UNet in pixel space to compare speeds with")


JOBS: dict[str, type[Job]] = {
    "prepare": Prepare,
    "train_autoencoder": TrainAutoencoder,
    "cache_latents": CacheLatents,
    "train_denoiser": TrainDenoiser,
    "sample": Sample,
    "evaluate": Evaluate,
}

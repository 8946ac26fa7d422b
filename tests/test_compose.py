"""Configuration: what composes, what is refused and how it is said, what names a run."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from calotype import compose as room
from calotype.compose import as_data, build, identity
from calotype.config import JOBS, MISSING, Condition, Job
from calotype.errors import ConfigError

compose = functools.cache(lambda job, *overrides: room.compose(job, overrides))  # a third of a second each
ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "fixtures" / "identities.json"

# The least that each job must be told, and what an option adds to that.
LEAST = {
    "cache_latents": ["autoencoder.path=run:mine"],
    "train_denoiser": ["autoencoder.path=run:mine"],
    "sample": ["run=run:mine"],
    "evaluate": ["run=run:mine"],
}
MORE = {"data=folder": ["data.name=cats", "data.path=/cats"], "conditions=text_frozen": ["conditions.text.path=/clip"],
        "conditions=text_masked": ["conditions.text.path=/clip"]}  # fmt: skip
LAST = {  # options that a job refuses by design, with the setting that the sentence must name
    ("train_autoencoder", "autoencoder=pretrained"): "autoencoder",
    ("train_autoencoder", "autoencoder=identity"): "autoencoder.kind",
    ("cache_latents", "autoencoder=kl_f4"): "autoencoder.kind",
    ("cache_latents", "autoencoder=kl_f4_tiny"): "autoencoder.kind",
    ("train_denoiser", "autoencoder=kl_f4"): "autoencoder.kind",
    ("train_denoiser", "autoencoder=kl_f4_tiny"): "autoencoder.kind",
    ("prepare", "debug=tiny"): "debug=tiny sets train",
    ("cache_latents", "debug=tiny"): "debug=tiny sets train",
    ("sample", "debug=tiny"): "debug=tiny sets train",
    ("evaluate", "debug=tiny"): "debug=tiny sets train",
}
PATHLESS = {"autoencoder=identity"}


def options() -> list[tuple[str, str]]:
    """(job, group=option) for every option of every group of every job; experiments with the job in their name.

    The defaults of a job are what it composes with when told nothing: not here.
    """
    found = []
    for job, schema in JOBS.items():
        groups = {item.name for item in dataclasses.fields(schema)} | {"debug", "experiment"}
        defaults = defaults_of(job)
        for folder in sorted(path for path in (ROOT / "conf").iterdir() if path.is_dir() and path.name in groups):
            for path in sorted(folder.rglob("*.yaml")):
                option = f"{folder.name}={path.relative_to(folder).with_suffix('')}"
                if option not in defaults and (folder.name != "experiment" or path.stem == job):
                    found.append((job, option))
    return found


def defaults_of(job: str) -> set[str]:
    entries = yaml.safe_load((ROOT / "conf" / f"{job}.yaml").read_text())["defaults"]
    return {f"{group}={option}" for entry in entries if isinstance(entry, dict) for group, option in entry.items()}


def test_every_conf_file_is_reached() -> None:
    reached = {option.replace("=", "/") for _, option in options()} | set(JOBS)
    reached |= {option.replace("=", "/") for job in JOBS for option in defaults_of(job)}
    every = {str(path.relative_to(ROOT / "conf").with_suffix("")) for path in (ROOT / "conf").rglob("*.yaml")}
    assert every - reached == set()


@pytest.mark.parametrize("job", sorted(JOBS))
def test_every_job_composes_and_survives_json(job: str) -> None:
    config = compose(job, *LEAST.get(job, []))
    assert isinstance(config, JOBS[job])
    assert build(JOBS[job], json.loads(json.dumps(as_data(config)))) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.name = "other"


@pytest.mark.parametrize(("job", "option"), options())
def test_every_option_composes_or_says_why_not(job: str, option: str) -> None:
    least = [] if option in PATHLESS else LEAST.get(job, [])
    arguments = [*least, option, *MORE.get(option, [])]
    if (job, option) in LAST:
        with pytest.raises(ConfigError) as said:
            compose(job, *arguments)
        assert str(said.value).startswith(LAST[job, option])
        return
    config = compose(job, *arguments)
    group, _, name = option.partition("=")
    if group == "cluster":
        assert config.cluster.kind == name
    if group == "experiment":
        assert identity(job, config)


def test_layers_schema_group_experiment_command_line() -> None:
    least = LEAST["train_denoiser"]
    schema = JOBS["train_denoiser"](name="x").optim.lr  # type: ignore[attr-defined]
    assert compose("train_denoiser", *least).optim.lr == schema
    demo = compose("train_denoiser", "experiment=demo/train_denoiser")
    assert demo.optim.lr != schema
    assert demo.denoiser != compose("train_denoiser", *least).denoiser
    assert compose("train_denoiser", "experiment=demo/train_denoiser", "optim.lr=0.5").optim.lr == 0.5
    chosen = compose("train_denoiser", "experiment=demo/train_denoiser", "denoiser=unet")
    assert chosen.denoiser == compose("train_denoiser", *least).denoiser, "the command line wins over an experiment"


# ------------------------------------------------------------------------------------------------ refusals

REFUSED = [
    ("optim.lrr=1", "optim.lrr is not a setting: did you mean optim.lr?"),
    ("+optim.lrr=1", "optim.lrr is not a setting: did you mean optim.lr?"),
    ("+experimnt=demo/train_denoiser", "experimnt is not a setting: did you mean experiment?"),
    ("experimnt=demo/train_denoiser", "experimnt is not a setting: did you mean experiment?"),
    ("experiment=nope", "experiment=nope is not there: choose one of demo/"),
    ("denoiser=nope", "denoiser=nope is not there: choose one of unet"),
    ("conditions.text.drops=1", "conditions.text.drops is not a setting: did you mean conditions.text.drop?"),
    ("+conditions.mask.kind=cross", "conditions.mask is new: give it whole"),
    ("conditions.mask.kind=cross", "conditions.mask is new: give it whole"),
    ("denoiser.model.dropout=0.1", "denoiser.model.dropout is not given yet"),
    ("train.images=many", "train.images=many must be a whole number"),
    ("train.images=1e6", "train.images=1000000.0 must be a whole number: 1000000"),
    ("seed=true", "seed=True must be a whole number"),
    ("optim.lr=fast", "optim.lr=fast must be a number"),
    ("optim.betas=[0.9]", "optim.betas=[0.9] must have 2 values"),
    ("optim.betas=[0.9,x]", "optim.betas[1]=x must be a number"),
    ("train.flip=maybe", "train.flip=maybe must be true or false"),
    ("prompts=seven", "prompts=seven must be a list"),
    ("optim=5", "optim=5 cannot be: optim is a group of settings"),
    ("optim.clip=null", "optim.clip=null cannot be"),
    ("name=???", "name is missing"),
    ("name=${oc.env:CALOTYPE_NO_SUCH}", "name: "),
    ("so so", "'so so' cannot be read"),
    ("optim.lr=nan", "optim.lr=nan is out of range"),
    ("train.batch=0", "train.batch=0 is out of range"),
    ("train.keep_every=-1", "train.keep_every=-1 is out of range"),
    ("ema.halflives=[500000]", "ema.halflives=[500000] with ema.halflife=500000: give halflives in images, each once"),
    ("ema.halflives=[0]", "ema.halflives=[0] with"),
    ("ema.halflives=[few]", "ema.halflives[0]=few must be a whole number"),
    ("train.spike=0.9", "train.spike=0.9 would skip usual steps: use 0 (none) or more than 1"),
    ("train.bad_steps=-1", "train.bad_steps=-1 is out of range"),
    ("cluster.hang_seconds=-1", "cluster.hang_seconds=-1"),
    ("cluster.workers=[2]", "cluster.workers=[2] must be one number, or [LEAST,MOST]"),
    ("cluster.workers=[3,2]", "cluster.workers=[3, 2] must be one number, or [LEAST,MOST]"),
    ("cluster.workers=[0,2]", "cluster.workers=[0, 2] is out of range"),
    ("cluster.workers=[1,257]", "cluster.workers=[1, 257] is more than train.batch=256"),
    ("cluster.workers=many", "cluster.workers='many' must be a whole number"),
    ("cluster.workers=[1,many]", "cluster.workers='many' must be a whole number"),
    ("cluster.workers=null", "cluster.workers=None must be a whole number"),
    ("engine.precision=bf-16", "engine.precision='bf-16' is not known: choose one of fp32"),
    ("engine.stage=4", "engine.stage=4 is not known"),
    ("cluster.price=-1", "cluster.price=-1.0 is out of range"),
    ("cluster.memory_gb=-80", "cluster.memory_gb=-80.0 is out of range"),
    ("cluster.peak_tflops=inf", "cluster.peak_tflops=inf is out of range"),
    ("train.lanes=300", "train.lanes=300 must be 0 to train.batch=256: lanes share its slots"),
    ("cluster.workers=257", "cluster.workers=257 is more than train.batch=256"),
    ("engine.precision=fp16", "engine.precision=fp16 needs GPUs: set cluster.gpus=1, or engine.precision=bf16"),
    ("engine.compile=fast", "engine.compile='fast' is not known: choose one of none"),
    ("engine.offload=nvme", "engine.offload='nvme' is not known: choose one of none, cpu"),
    ("engine.offload=cpu", "engine.offload=cpu with an engine that partitions nothing: set engine=zero1"),
    ("engine=torch engine.offload=cpu", "engine.offload=cpu with an engine that partitions nothing"),
    ("engine=zero3 engine.compile=default", "engine.compile=default with engine.stage=3, whose weights come and go"),
    (
        "train.flip=true",
        "train.flip=true needs latents of mirrored images: cache and train with encoding.mirrored=true",
    ),
    (
        "+denoiser.model.cross_attention_dim=99",
        "denoiser.model.cross_attention_dim=99 but width of the text encoder is 64",
    ),
    ("+denoiser.model.in_channels=3", "denoiser.model.in_channels=3 but autoencoder.channels is 4"),
    ("+denoiser.model.sample_size=16", "denoiser.model.sample_size=16 but encoding.resolution / autoencoder.f is 8"),
    ("encoding.resolution=30", "encoding.resolution=30 is not a multiple of autoencoder.f=4"),
    ("autoencoder.path=", "autoencoder.path is missing"),
    ("autoencoder=kl_f4", "autoencoder.kind=kl is an architecture without weights"),
    ("conditions.text.encoder=null", "conditions.text.encoder"),
    ("conditions.text.mode=masked", "conditions.text.mode=masked caches a frozen text encoder: give"),
    ("+conditions={label: {kind: class, source: label}}", "conditions.label.kind=class needs"),
    ("denoiser.model._target_=os.system", "denoiser.model._target_='os.system' is not allowed"),
    ("+denoiser.model.a.b._target_=os.system", "denoiser.model.a.b._target_='os.system' is not allowed"),
    ("+denoiser.model.a=[{_target_: builtins.eval}]", "denoiser.model.a[0]._target_='builtins.eval' is not allowed"),
    ("denoiser.model._target_=diffusersx.evil", "denoiser.model._target_='diffusersx.evil' is not allowed"),
    ("+denoiser.model._partial_=true", "denoiser.model._partial_ is not used here"),
    ("+conditions.text.encoder.config._args_=[1]", "conditions.text.encoder.config._args_ is not used here"),
    (
        "diffusion.prediction=v",
        "diffusion.prediction='v' is not known: choose one of epsilon, v_prediction, sample, flow_",
    ),
    ("diffusion.timestep_sampling=cosmap", "diffusion.timestep_sampling='cosmap' is not known"),
    ("diffusion.min_snr_gamma=-1", "diffusion.min_snr_gamma=-1.0 is out of range"),
    (
        "diffusion=epsilon diffusion.zero_snr=true",
        "diffusion.zero_snr=true with diffusion.prediction=epsilon: where no",
    ),
    ("diffusion.zero_snr=true diffusion.min_snr_gamma=5", "diffusion.min_snr_gamma=5 with diffusion.zero_snr=true"),
    ("diffusion.shift=3", "diffusion.shift=3.0 means nothing with diffusion.prediction=v_prediction and"),
    ("diffusion.logit_mean=1", "diffusion.logit_mean=1.0 means nothing with"),
    (
        "diffusion=flow diffusion.schedule=linear",
        "diffusion.schedule=linear means nothing with diffusion.prediction=flow_",
    ),
    ("diffusion=flow diffusion.zero_snr=true", "diffusion.zero_snr=True means nothing with diffusion.prediction=flow_"),
    ("name=cats/v2", "name='cats/v2'"),
    ("name=..", "name='..'"),
    ("cluster=local cluster.workers=2", "cluster.workers=2 with cluster=local"),
]


@pytest.mark.parametrize(("override", "sentence"), REFUSED)
def test_refusals_are_one_sentence_that_names_the_setting(override: str, sentence: str) -> None:
    words = override.split(" ") if override.startswith(("cluster=", "diffusion", "engine=")) else [override]
    with pytest.raises(ConfigError) as said:
        compose("train_denoiser", *LEAST["train_denoiser"], *words)
    text = str(said.value)
    assert text.startswith(sentence)
    assert "\n" not in text
    assert len(text) < 400
    for jargon in ("To append", "full_key", "object_type", "struct", "Config search path", "NoneType"):
        assert jargon not in text


def test_workers_are_a_number_or_a_range_for_trainings() -> None:
    for given, least, most in (("3", 3, 3), ("[2,8]", 2, 8)):
        cluster = compose("train_denoiser", *LEAST["train_denoiser"], f"cluster.workers={given}").cluster
        assert (cluster.least, cluster.most) == (least, most)
        assert build(type(cluster), as_data(cluster)) == cluster
    with pytest.raises(ConfigError, match=r"^cluster\.workers=\[1, 4\] is for trainings: with cluster\.workers=4 this"):
        compose("prepare", "cluster.workers=[1,4]")


def test_f_must_match_the_autoencoder() -> None:
    with pytest.raises(
        ConfigError, match=r"^autoencoder\.f=8 but 3 autoencoder\.model\.block_out_channels downsample by 4"
    ):
        compose("train_autoencoder", "autoencoder.f=8")
    with pytest.raises(ConfigError, match=r"^autoencoder\.channels=8 but autoencoder\.model\.latent_channels=4"):
        compose("train_autoencoder", "autoencoder.channels=8")
    with pytest.raises(ConfigError, match="is not a job: choose one of"):
        compose("paint")


def test_no_refusal_leaves_the_next_compose_changed() -> None:
    before = room.compose("prepare")
    for override in ("data.nam=x", "seed=1", "+x=2"):
        try:
            room.compose("prepare", [override])
        except ConfigError:
            continue
    assert room.compose("prepare") == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sed": 1}, "sed is not a setting: did you mean seed?"),
        ({"optim": {"lr": "1e-4"}}, "optim.lr='1e-4' must be a number"),
        ({"optim": {"betas": [0.9]}}, "optim.betas=[0.9] must have 2 values"),
        ({"optim": 5}, "optim must be a group of settings"),
        ({"seed": True}, "seed=True must be a whole number"),
    ],
)
def test_data_from_elsewhere_is_checked_as_well(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as said:
        build(JOBS["train_denoiser"], {"name": "x", **change})
    assert str(said.value).startswith(sentence)


# ------------------------------------------------------------------------------------------------ identity


def test_quoted_numbers_are_numbers() -> None:
    least = LEAST["train_denoiser"]
    plain = compose("train_denoiser", *least, "optim.lr=2e-4")
    quoted = compose("train_denoiser", *least, "optim.lr='2e-4'")
    assert quoted.optim.lr == 2e-4
    assert isinstance(quoted.optim.lr, float)
    assert identity("train_denoiser", quoted) == identity("train_denoiser", plain)
    assert compose("train_denoiser", *least, "optim.lr=1").optim.lr == 1.0


@pytest.mark.parametrize("entry", json.loads(GOLDEN.read_text()), ids=lambda entry: entry["what"])
def test_golden_identities_hold_for_ever(entry: dict[str, Any]) -> None:
    """A config as version 1 stored it still names the same run: fields added since, at their defaults, are left out."""
    config = build(JOBS[entry["job"]], entry["config"])
    assert identity(entry["job"], config) == entry["identity"]


def test_a_new_field_with_a_default_keeps_every_identity() -> None:
    config = compose("train_denoiser", *LEAST["train_denoiser"], "optim.lr=3e-4")
    wider: Any = dataclasses.make_dataclass(
        "Optim",
        [("nesterov", bool, room.JOBS and dataclasses.field(default=False))],
        bases=(type(config.optim),),
        frozen=True,
    )
    values = {item.name: getattr(config.optim, item.name) for item in dataclasses.fields(config.optim)}
    same = dataclasses.replace(config, optim=wider(**values))
    other = dataclasses.replace(config, optim=wider(**values, nesterov=True))
    assert identity("train_denoiser", same) == identity("train_denoiser", config)
    assert identity("train_denoiser", other) != identity("train_denoiser", config)


def changed(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 + 1
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, tuple):
        return tuple(changed(item) for item in value)
    return {**value, "more": 1} if isinstance(value, dict) else [*value, 1]


def perturbed(config: Any, counts: bool = True) -> list[tuple[str, bool, Any]]:
    """(setting, whether it counts, config with it changed) for every setting, however deep."""
    found = []
    for item in dataclasses.fields(config):
        value, here = getattr(config, item.name), counts and item.metadata.get("identity", True)
        if dataclasses.is_dataclass(value):
            inner = [(name, counted, made) for name, counted, made in perturbed(value, here)]
        elif isinstance(value, dict) and any(isinstance(entry, Condition) for entry in value.values()):
            inner = [
                (f"{key}.{name}", counted, {**value, key: made})
                for key, entry in value.items()
                for name, counted, made in perturbed(entry, here)
            ]
        else:
            inner = [("", here, changed(value))]
        for name, counted, made in inner:
            found.append((f"{item.name}.{name}".rstrip("."), counted, dataclasses.replace(config, **{item.name: made})))
    return found


@pytest.mark.parametrize("job", sorted(JOBS))
def test_identity_is_what_changes_the_computation(job: str) -> None:
    config = compose(job, *LEAST.get(job, []), *(["optim.schedule=cosine"] if job.startswith("train") else []))
    base = identity(job, config)
    for setting, counts, other in perturbed(config):
        assert (identity(job, other) != base) == counts, setting


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("cluster.workers=7", True),
        ("cluster.workers=[1,7]", True),
        ("engine=zero3", True),
        ("engine=torch", True),
        ("engine.micro_batch=4", True),
        ("engine.compile=default", True),
        ("engine.channels_last=true", True),
        ("engine.tf32=true", False),
        ("track=none", True),
        ("root=/elsewhere", True),
        ("train.checkpoint_every=5", True),
        ("train.images=77", True),
        ("name=other", True),
        ("conditions.text.tokenizer=/moved/elsewhere", True),  # its digest counts
        ("optim.lr=1e-4", True),  # the default, said aloud
        ("seed=1", False),
        ("engine.precision=bf16", False),
        ("train.batch=8", False),
        ("conditions.text.drop=0.2", False),
        ("conditions.text.digest=other", False),
        ("denoiser=unet_tiny", False),
    ],
)
def test_workers_stage_and_paths_do_not_name_a_run(override: str, same: bool) -> None:
    base = compose("train_denoiser", *LEAST["train_denoiser"])
    other = compose("train_denoiser", *LEAST["train_denoiser"], override)
    assert (identity("train_denoiser", other) == identity("train_denoiser", base)) == same


def test_length_names_a_run_only_where_the_schedule_depends_on_it() -> None:
    def named(*overrides: str) -> str:
        return identity("train_denoiser", compose("train_denoiser", *LEAST["train_denoiser"], *overrides))

    assert named("train.images=100") == named("train.images=200")
    assert named("train.images=100", "optim.schedule=cosine") != named("train.images=200", "optim.schedule=cosine")


def test_digests_stand_for_names_and_paths() -> None:
    config = compose("train_denoiser", *LEAST["train_denoiser"])

    def resolved(name: str, path: str, digest: str) -> str:
        data = dataclasses.replace(config.data, name=name, digest="d" * 64)
        autoencoder = dataclasses.replace(config.autoencoder, path=path, digest=digest)
        return identity("train_denoiser", dataclasses.replace(config, data=data, autoencoder=autoencoder))

    assert resolved("a", "run:x", "e" * 64) == resolved("b", "/folder", "e" * 64)
    assert resolved("a", "run:x", "e" * 64) != resolved("a", "run:x", "f" * 64)


def test_every_setting_says_what_it_means() -> None:
    def silent(cls: Any, where: str) -> list[str]:
        found = []
        for item, hint in room._fields(cls):
            if dataclasses.is_dataclass(hint):
                found += silent(hint, f"{where}.{item.name}")
            elif not item.metadata.get("meaning") or "identity" not in item.metadata:
                found.append(f"{where}.{item.name}")
        return found

    assert [name for job, cls in JOBS.items() for name in silent(cls, job)] == []
    assert JOBS["sample"].__mro__[1] is Job
    assert JOBS["sample"](name="x").run == MISSING  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------ the real command line


def job(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs" / "train_denoiser.py"), *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "platform"), **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def test_cfg_job_prints_what_would_run_and_writes_nothing(tmp_path: Path) -> None:
    done = job("experiment=demo/train_denoiser", "optim.lr=0.25", "--cfg", "job", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = yaml.safe_load(done.stdout)
    assert printed["optim"]["lr"] == 0.25
    config = compose("train_denoiser", "experiment=demo/train_denoiser", "optim.lr=0.25")
    assert build(JOBS["train_denoiser"], printed) == config
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_on_the_command_line_is_one_line_and_fails(tmp_path: Path) -> None:
    for words in (["optim.lrr=1"], ["-m", "train.lanes=300,500"]):
        done = job("autoencoder.path=run:x", *words, cwd=tmp_path)
        assert done.returncode != 0
        last = done.stderr.strip().splitlines()[-1]
        assert "optim.lrr is not a setting" in last or "train.lanes=" in last
        assert "Traceback" not in done.stderr


def test_settings_with_dashes_are_refused_by_one_that_has_none(tmp_path: Path) -> None:
    done = job("--name", "mine", "--optim.lr=1", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "calotype: --name is not a flag: settings have no dashes, as in name=...\n"
    assert job("--no-wait", cwd=tmp_path).stderr == "calotype: --no-wait is not a flag: --help lists them\n"
    assert job("--cfg=job", "autoencoder.path=run:x", cwd=tmp_path).returncode == 0


def test_shell_completion_knows_groups_options_and_settings(tmp_path: Path) -> None:
    def completed(line: str) -> set[str]:
        done = job("-sc", "query=bash", cwd=tmp_path, COMP_LINE=f"python x.py {line}", COMP_POINT="99")
        return set(done.stdout.split())

    assert completed("denoiser=un") == {"denoiser=unet", "denoiser=unet_tiny"}
    assert "optim.lr=" in completed("optim.l")


def test_help_lists_groups_and_settings(tmp_path: Path) -> None:
    said = job("--help", cwd=tmp_path).stdout
    for word in ("denoiser: unet, unet_tiny", "optim.lr", "experiment: demo/train_denoiser", "--cfg job", "-m"):
        assert word in said

"""The engine in one process: precision, average, accumulation, states.  Several: tests/tasks/test_denoiser.py.

On a machine with a GPU all of it runs there.
"""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from calotype import config
from calotype.environment import Worker
from calotype.errors import CalotypeError, ConfigError
from calotype.train import zero
from calotype.train.ema import decay
from calotype.train.engine import FIRST_SCALE, Engine
from calotype.train.kernels import said
from calotype.train.plain import dealt
from torch import nn

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
OFFLOADED = [("deepspeed", stage, "cpu") for stage in (1, 2, 3)]
every_engine = pytest.mark.parametrize(
    ("kind", "stage", "offload"),
    [("torch", 0, "none"), *(("deepspeed", stage, "none") for stage in range(4)), *OFFLOADED],
)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 33), nn.GELU(), nn.LayerNorm(33), nn.Linear(33, 5))


def made(
    kind: str = "torch",
    stage: int = 0,
    offload: str = "none",
    accumulation: int = 1,
    precision: str = "fp32",
    halflife: int = 100,
    compile: str = "none",
) -> Engine:
    settings = config.Engine(kind=kind, stage=stage, offload=offload, precision=precision, compile=compile)
    optim = config.Optim(clip=0.5, weight_decay=0.01)
    ema = config.EMA(halflife=halflife, halflives=[5] if halflife else [])
    return Engine(net(), optim, settings, Worker(device=DEVICE), accumulation, ema)


def steps(engine: Engine, first: int, count: int) -> list[float]:
    losses = []
    for number in range(first, first + count):
        x = torch.randn(12, 7, generator=torch.Generator().manual_seed(number)).to(DEVICE)
        size = 12 // engine.accumulation
        total = 0.0
        for part in x.split(size):
            loss = (engine(part).float() - part[:, :5].cumsum(1)).square().mean(1).sum() / 12
            engine.backward(loss)
            total += loss.item()
        engine.step(1e-2, 12 * (number + 1), 12)
        losses.append(total)
    return losses


def bare(count: int) -> tuple[list[float], nn.Module, dict[str, list[torch.Tensor]]]:
    """The same in a few lines of PyTorch."""
    module = net().to(DEVICE)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, betas=(0.9, 0.999), weight_decay=0.01)
    halflives = {"ema": 100, "ema@5": 5}
    means = {kind: [p.detach().clone() for p in module.parameters()] for kind in halflives}
    losses = []
    for number in range(count):
        x = torch.randn(12, 7, generator=torch.Generator().manual_seed(number)).to(DEVICE)
        loss = (module(x) - x[:, :5].cumsum(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()
        images = 12 * (number + 1)
        for kind, halflife in halflives.items():
            beta = 0.5 ** (12 / min(halflife, 0.05 * images))
            pairs = zip(means[kind], module.parameters(), strict=True)
            means[kind] = [beta * m + (1 - beta) * p.detach() for m, p in pairs]
        losses.append(loss.item())
    return losses, module, means


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(("kind", "stage", "offload"), [("torch", 0, "none"), *OFFLOADED])
def test_it_does_what_a_bare_loop_does(kind: str, stage: int, offload: str, accumulation: int) -> None:
    pytest.importorskip("deepspeed")
    engine = made(kind, stage, offload, accumulation)
    losses, module, means = bare(20)
    assert steps(engine, 0, 20) == pytest.approx(losses, rel=1e-5)
    states, scalars = engine.states()
    for index, (name, parameter) in enumerate(module.named_parameters()):
        torch.testing.assert_close(states["weights"][name], parameter.detach().cpu(), rtol=1e-4, atol=1e-5)
        for kind, mean in means.items():
            torch.testing.assert_close(states[kind][name], mean[index].cpu(), rtol=1e-4, atol=1e-5)
    off = states["ema@5"]["0.weight"] - states["ema"]["0.weight"]
    assert off.abs().max() > 1e-3  # they do differ
    assert scalars["adam_step"] == 20


@every_engine
def test_states_go_into_any_other(kind: str, stage: int, offload: str) -> None:
    pytest.importorskip("deepspeed")
    source = made()
    steps(source, 0, 5)
    states, scalars = source.states()
    states = {key: {name: tensor.clone() for name, tensor in named.items()} for key, named in states.items()}
    target = made(kind, stage, offload)
    steps(target, 90, 2)  # it was somewhere else
    target.load(states, scalars)
    near = 1e-6 if offload == "none" or DEVICE == "cpu" else 1e-5  # a CPU's AdamW beside a GPU's
    assert steps(target, 5, 3) == pytest.approx(steps(source, 5, 3), rel=near)  # the very next loss
    mine, theirs = target.states(), source.states()
    assert mine[1] == theirs[1]
    for key, named in theirs[0].items():
        for name, tensor in named.items():
            torch.testing.assert_close(mine[0][key][name], tensor, rtol=1e-4, atol=1e-6)


@every_engine
def test_averaged_weights_inside_and_the_same_ones_after(kind: str, stage: int, offload: str) -> None:
    pytest.importorskip("deepspeed")
    engine = made(kind, stage, offload)
    steps(engine, 0, 8)
    x = torch.linspace(-1, 1, 21).view(3, 7).to(DEVICE)
    states, _ = engine.states()
    assert engine.averages == ["ema", "ema@5"]
    for which in engine.averages:
        averaged = net().to(DEVICE)
        averaged.load_state_dict(states[which])
        with torch.no_grad():
            before = engine(x).clone()
            with engine.averaged(which):
                torch.testing.assert_close(engine(x), averaged(x))
            assert torch.equal(engine(x), before)
        assert not torch.allclose(before, averaged(x), rtol=1e-4)


@every_engine
def test_a_share_is_a_copy_that_further_steps_do_not_change(kind: str, stage: int, offload: str) -> None:
    pytest.importorskip("deepspeed")
    engine = made(kind, stage, offload)
    steps(engine, 0, 3)
    states, scalars = engine.states()
    states = {key: {name: tensor.clone() for name, tensor in named.items()} for key, named in states.items()}
    share, of_share = engine.share()
    steps(engine, 3, 2)
    share.ready()
    assert of_share == scalars
    assert share.kinds.keys() == states.keys()
    for key, values in share.kinds.items():
        first = 0
        for name, begin, count in share.pieces:
            wanted = states[key][name].flatten()[begin : begin + count]
            assert torch.equal(values[first : first + count], wanted), (key, name)
            first += count
        assert first == len(values) == sum(p.numel() for p in net().parameters())


@pytest.mark.parametrize("world", [1, 3, 7])
def test_replicated_parameters_are_dealt_once(world: int) -> None:
    pieces = dealt(nn.ModuleDict({"module": net()}), world)
    held = {rank: sum(piece.count for piece in pieces if piece.rank == rank) for rank in range(world)}
    assert max(held.values()) - min(held.values()) <= 1
    for name, parameter in net().named_parameters():
        mine = [(piece.begin, piece.count) for piece in pieces if piece.name == name]
        assert sum(count for _, count in mine) == parameter.numel()
        assert [begin for begin, _ in mine] == [sum(count for _, count in mine[:n]) for n in range(len(mine))]


def test_without_an_average_states_have_none() -> None:
    engine = made(halflife=0)
    steps(engine, 0, 2)
    assert "ema" not in engine.states()[0]
    assert engine.averages == []
    with engine.averaged():
        assert not torch.is_grad_enabled()


def test_buffers_travel_with_the_weights() -> None:
    module = net()
    module.register_buffer("scale", torch.tensor([2.0]))
    module.register_buffer("scratch", torch.tensor([1.0]), persistent=False)
    engine = Engine(module, config.Optim(), config.Engine(kind="torch"), Worker(device=DEVICE))
    states, scalars = engine.states()
    assert set(states["weights"]) == set(module.state_dict())
    states = {key: {name: tensor + 1 for name, tensor in named.items()} for key, named in states.items()}
    engine.load(states, scalars)
    assert module.scale.item() == 3.0


@pytest.mark.skipif(DEVICE != "cpu", reason="there is one")
def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(ConfigError, match="bf16"):
        made(precision="fp16")


def test_bf16_computes_in_bf16_and_keeps_fp32() -> None:
    engine = made(precision="bf16")
    seen = []
    engine.module[0].register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    losses = steps(engine, 0, 10)
    assert seen[0] == torch.bfloat16
    assert losses == pytest.approx(bare(10)[0], rel=0.05)
    assert all(p.dtype == torch.float32 for p in engine.module.parameters())


@every_engine
def test_channels_last_survives_every_stage(kind: str, stage: int, offload: str) -> None:
    pytest.importorskip("deepspeed")
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    outputs = []
    for channels_last in (False, True):
        torch.manual_seed(0)
        # On a GPU PyTorch's GroupNorm answers in channels first, unless it is compiled.
        norm = nn.GroupNorm(2, 8) if DEVICE == "cpu" else nn.Identity()
        module = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.SiLU(), nn.Conv2d(8, 2, 3))
        settings = config.Engine(kind=kind, stage=stage, offload=offload, channels_last=channels_last)
        engine = Engine(module, config.Optim(), settings, Worker(device=DEVICE))
        strides = []
        module[3].register_forward_pre_hook(lambda _, args, seen=strides: seen.append(args[0].stride()))
        for step in range(3):
            out = engine(x)
            engine.backward(out.square().mean())
            engine.step(1e-2, 2 * step + 2, 2)
        assert [stride[1] == 1 for stride in strides] == [channels_last] * 3
        outputs.append(out.detach())
    torch.testing.assert_close(*outputs)


def test_stage_3_has_a_fraction_of_the_weights_whole() -> None:
    pytest.importorskip("deepspeed")
    module = nn.Sequential(*(nn.Linear(9, 9) for _ in range(32)))
    engine = Engine(module, config.Optim(), config.Engine(stage=3), Worker(device=DEVICE))
    whole: list[int] = []
    for layer in module:
        layer.register_forward_pre_hook(lambda *_: whole.append(sum(p.data.numel() for p in module.parameters())))
    for images in (2, 4, 6):  # DeepSpeed learns the order in the first two
        engine.backward(engine(torch.ones(2, 9, device=DEVICE)).sum())
        engine.step(1e-3, images, 2)
    assert 2 * 90 < max(whole[-32:]) <= (1 / zero.LIVE + 1 / zero.AHEAD) * 32 * 90 + 2 * 90
    assert not sum(p.data.numel() for p in module.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "stage"), [("torch", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2)])
def test_compiled_it_computes_the_same(kind: str, stage: int) -> None:
    pytest.importorskip("deepspeed")
    settings = config.Engine(kind=kind, stage=stage, compile="default")
    engine = Engine(
        net(), config.Optim(clip=0.5, weight_decay=0.01), settings, Worker(device=DEVICE), 1, config.EMA(halflife=100)
    )
    traced = []
    engine.module[0].register_forward_hook(lambda *_: traced.append(torch.compiler.is_compiling()))
    assert steps(engine, 0, 5) == pytest.approx(bare(5)[0], rel=1e-5)
    assert traced == [True] * 5  # nothing fell back to Python
    with engine.averaged():
        assert torch.isfinite(engine(torch.ones(1, 7, device=DEVICE))).all()


def test_it_says_how_it_computes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "calotype.train.kernels")
    Engine(
        net(), config.Optim(), config.Engine(kind="torch", precision="bf16", channels_last=True), Worker(device=DEVICE)
    )
    here = said(config.Engine(precision="bf16", channels_last=True), cuda=DEVICE != "cpu")
    assert caplog.messages == [f"computes with {here}"]
    here = said(config.Engine(precision="bf16", channels_last=True), cuda=False)
    assert here == "bf16 on fp32 weights, attention of PyTorch, channels_last, not compiled, fused AdamW"
    words = said(config.Engine(tf32=True, compile="max-autotune"), cuda=True)
    assert words.startswith("fp32, TF32 on, attention of PyTorch, which may choose flash | memory-efficient")
    assert "torch.compile max-autotune" in words
    assert said(config.Engine(stage=2, offload="cpu"), cuda=True).endswith("fused AdamW in host memory")


@on_a_gpu
@every_engine
def test_fp16_finds_its_scale_and_trains(kind: str, stage: int, offload: str) -> None:
    engine = made(kind, stage, offload, precision="fp16")
    first = steps(engine, 0, 10)  # the first few overflow, until the scale is found
    assert 1 < engine.loss_scale <= FIRST_SCALE
    assert statistics.mean(steps(engine, 10, 10)) < 0.8 * statistics.mean(first[:2])
    assert all(value.dtype == torch.float32 for value in engine.states()[0]["weights"].values())


@on_a_gpu
@pytest.mark.parametrize(("kind", "stage"), [("torch", 0), *(("deepspeed", stage) for stage in range(3))])
def test_cuda_graphs_see_new_weights_and_averages(kind: str, stage: int) -> None:
    """A graph replays what it was captured with: weights must stay where they are, through steps, swaps and loads."""
    engine = made(kind, stage, compile="reduce-overhead")
    assert steps(engine, 0, 12) == pytest.approx(bare(12)[0], rel=1e-5)
    x = torch.linspace(-1, 1, 84).view(12, 7).to(DEVICE)
    states, scalars = engine.states()
    states = {key: {name: tensor.clone() for name, tensor in named.items()} for key, named in states.items()}
    averaged = net().to(DEVICE)
    averaged.load_state_dict(states["ema@5"])
    for _ in range(4):  # recorded without gradients, then replayed
        with engine.averaged("ema@5"):
            torch.testing.assert_close(engine(x), averaged(x))
    before = steps(engine, 12, 3)
    engine.load(states, scalars)
    assert steps(engine, 12, 3) == pytest.approx(before, rel=1e-6)


@every_engine
def test_loss_scale_finds_its_place_and_gives_up_at_one(kind: str, stage: int, offload: str) -> None:
    pytest.importorskip("deepspeed")
    engine = made(kind, stage, offload)
    engine.dynamic, engine.loss_scale = True, 4.0  # what fp16 on a GPU sets

    def overflow() -> float:
        engine.backward(engine(torch.full((1, 7), math.inf, device=DEVICE)).sum())
        return float(engine.step(1e-2, 12, 12))

    before = engine.states()[0]["weights"]["0.weight"].clone()
    assert overflow() == 0.0
    assert engine.loss_scale == 2.0
    assert torch.equal(engine.states()[0]["weights"]["0.weight"], before)
    assert steps(engine, 0, 3) == pytest.approx(bare(3)[0], rel=1e-5)  # the scale is not seen in losses and steps
    overflow()
    with pytest.raises(CalotypeError, match="bf16"):
        overflow()


@every_engine
def test_a_step_that_is_not_taken_leaves_everything_as_it_was(kind: str, stage: int, offload: str) -> None:
    pytest.importorskip("deepspeed")
    engine, other = made(kind, stage, offload), made(kind, stage, offload)
    judged: list[float] = []

    def states() -> dict[str, torch.Tensor]:
        kinds, scalars = engine.states()
        flat = {f"{kind}.{name}": tensor.clone() for kind, named in kinds.items() for name, tensor in named.items()}
        return flat | {name: torch.tensor(value) for name, value in scalars.items()}

    def no(norm: torch.Tensor) -> bool:
        judged.append(float(norm))
        layers = engine.layer_norms()
        assert len(layers) == (0 if stage else 6)
        assert stage or math.isnan(judged[-1]) or math.hypot(*layers.values()) == pytest.approx(judged[-1])
        return False

    engine.brake.judge = no
    steps(engine, 0, 1)  # before Adam has any state
    engine.brake.judge = lambda norm: True
    steps(engine, 1, 3)
    before = states()
    engine.brake.judge = no
    steps(engine, 4, 1)
    engine.backward(engine(torch.full((12, 7), math.nan, device=DEVICE)).sum())
    engine.step(1e-2, 60, 12)
    assert len(judged) == 3, "each is judged once"
    assert judged[1] > 0.5, "before it is clipped"
    assert not math.isfinite(judged[2])
    after = states()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    engine.brake.judge = lambda norm: True
    steps(other, 1, 3)
    assert steps(engine, 6, 4) == steps(other, 6, 4)  # bit by bit


def test_decay_ramps_up() -> None:
    ema = config.EMA(halflife=1000, rampup=0.05)
    assert decay(ema, 2000, 100) == pytest.approx(0.5 ** (100 / 100))
    assert decay(ema, 10**6, 100) == pytest.approx(0.5 ** (100 / 1000))
    assert decay(config.EMA(halflife=1000, rampup=0.0), 100, 100) == pytest.approx(0.5**0.1)

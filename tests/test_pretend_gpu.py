"""What a GPU would be asked to do: kernels, and what the host waits for, counted on a pretend one.

The counts do not depend on sizes, so tiny models tell what the published ones would launch: a step
has so many kernels per layer below the fast weights, and so many for the rest.
"""
import pytest
import torch

import backbones.experts as experts_module
import bench
import memdlm
import train
from backbones.checkpoint import load_backbone
from backbones.families import TINY
from backbones.lora import add_lora
from memdlm import MemDLM
from pretend_gpu import Mixed, PretendGPU
from runs import load_checkpoint, save_checkpoint
from settings import Settings
from tiny_models import EACH

MOE = {"llada-moe": 16, "llada2.1-mini": 20}  # layers of the published models


def test_the_pretend_gpu_counts_kernels_and_waits_and_refuses_to_mix():
    x, w = torch.ones(3, 4), torch.ones(4, 5)
    with PretendGPU() as gpu:
        gpu.adopt(w)
        with pytest.raises(Mixed):
            x @ w
        there = memdlm.to_device(x, w)
        y = (there @ w).t()[0]  # a copy, a product, and two looks at the memory
        assert gpu.kernels == {"copy to the device": 1, "mm": 1} and not gpu.waits
        assert gpu.has(y) and not gpu.has(x) and not gpu.has(torch.zeros(2))
        assert gpu.has(torch.zeros(2, device=w.device))
        waits = [lambda: y.tolist(), lambda: float(y[0]), lambda: bool((y > 0).all()),
                 lambda: y.cpu() + x[:, 0], lambda: y[torch.tensor([0, 2])], lambda: x.to(y.device),
                 lambda: y[y > 0], lambda: y.nonzero(), lambda: y.copy_(x[:, 0])]
        for count, wait in enumerate(waits, 1):
            wait()
            assert sum(gpu.waits.values()) == count


def make_model(name, layers=4, experts=8, **options):
    """A tiny model in 4 bits with a LoRA, whose last two layers have fast weights."""
    raw = TINY[name] | {"n_layers" if "n_layers" in TINY[name] else
                        "num_hidden_layers": layers}
    if "num_experts" in raw:
        raw |= {"num_experts": experts, "num_experts_per_tok": 4}
    backbone = load_backbone(raw, random=True, dtype="bfloat16", device="cpu", load_4bit=True,
                             checkpointing=True)
    add_lora(backbone, 8, 16.0, 0.05)
    s = Settings(model=name, batch=1, rank=8, load_4bit=True, layer_fraction=2 / layers - 1e-9,
                 **options)
    return s, MemDLM(backbone, s)


def random_batch(model, s, length=160):
    return bench.random_batch(300, model.backbone.mask_id, s, length, 0, 0.25)


def count_step(name, memory, padded, layers, experts, monkeypatch):
    """Kernels and waits of a micro-batch, forward and backward."""
    monkeypatch.setattr(experts_module, "pads", lambda x: padded)
    s, model = make_model(name, layers, experts, memory=memory)
    with PretendGPU() as gpu:
        gpu.adopt(model.train())
        model(random_batch(model, s))[0].backward()
    return gpu.launches, sum(gpu.waits.values())


@pytest.mark.parametrize("name, plain, with_memory, padded", [
    ("llada-moe", 7_500, 11_100, True),
    pytest.param("llada-moe", 7_500, 11_100, False, marks=pytest.mark.slow),
    pytest.param("llada2.1-mini", 10_700, 15_800, False, marks=pytest.mark.slow),
    pytest.param("llada2.1-mini", 10_700, 15_800, True, marks=pytest.mark.slow)])
def test_a_step_launches_few_kernels_and_waits_for_few(name, plain, with_memory, padded,
                                                       monkeypatch):
    """At the published number of layers, from two small numbers. The limits are what was counted,
    and a little room. One matrix per expert took 125,000 and 200,000 for LLaDA-MoE."""
    for memory, most in ((False, plain), (True, with_memory)):
        (few, few_waits), (more, more_waits) = (
            count_step(name, memory, padded, layers, 8, monkeypatch) for layers in (4, 6))
        others = MOE[name] - 4
        launches = few + (more - few) / 2 * others
        waits = few_waits + (more_waits - few_waits) / 2 * others
        assert 0.85 * most < launches <= most, launches
        assert waits <= (40 if padded else 0), waits


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MOE)
def test_kernels_do_not_grow_with_the_number_of_experts(name, padded, monkeypatch):
    counts = [count_step(name, True, padded, 4, experts, monkeypatch) for experts in (8, 32)]
    assert counts[0] == counts[1]


@pytest.mark.slow
@pytest.mark.parametrize("name, most", [("llada-moe", 3_300), ("llada2.1-mini", 4_700)])
def test_adapting_launches_few_kernels(name, most):
    launches = []
    for layers in (4, 6):
        s, model = make_model(name, layers)
        batch = random_batch(model, s)
        with PretendGPU() as gpu:
            gpu.adopt(model)
            memdlm.adapt(model.backbone, s, batch.prompt, batch.prompt_valid, batch.seeds)
        launches.append(gpu.launches)
        assert not gpu.waits
    few, more = launches
    assert 0.85 * most < few + (more - few) / 2 * (MOE[name] - 4) <= most


# The kernels of one layer of LLaDA-MoE in 4 bits with a LoRA, counted by hand: how often, how many.
PARTS = {
    "norms: two casts, square, mean, + eps, rsqrt, two products": (4, 8),
    "q, k, v, out: the 4-bit product and its copy, A, B, scale, sum, two casts": (4, 8),
    "rotations of queries and keys: two products, negation, two cats, sum": (2, 6),
    "attention, and its heads side by side": (1, 2),
    "sums with the residual": (2, 1),
    "router: product, cast, softmax, top k": (1, 4),
    "where the tokens go (sort_tokens)": (1, 13),
    "tokens to rows and back": (2, 1),
    "stacks: three to unpack, the product, A, B, two casts, sum": (3, 9),
    "silu, times up": (1, 2),
    "the router's weights: cast, product": (1, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name, layer", [
    ("llada-moe", sum(often * kernels for often, kernels in PARTS.values())),
    ("llada2.1-mini", 156)])
def test_a_look_of_the_decoder_launches_few_kernels_per_layer(name, layer):
    launches = []
    for layers in (4, 6):
        s, model = make_model(name, layers)
        batch = random_batch(model, s)
        with PretendGPU() as gpu, torch.no_grad():
            gpu.adopt(model.eval())
            h = model.backbone.embed(batch.x0)
            model.backbone.blocks(h, batch.valid, 0, None, batch.maskable)
        launches.append(gpu.launches)
        assert not gpu.waits
    assert launches[1] - launches[0] == 2 * layer


@pytest.mark.parametrize("name", EACH)
def test_training_adapting_decoding_saving_and_resuming_mix_nothing(name, tmp_path):
    """Of every family. Per decoded look the host waits for the tokens and their probabilities."""
    s, model = make_model(name)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, batch = train.make_optimizer(s, parameters), random_batch(model, s, 40)
    with PretendGPU() as gpu:
        gpu.adopt(model.train())
        train.compute_gradients(s, model, [batch], False, train.Processes())
        torch.nn.utils.clip_grad_norm_(parameters, s.grad_clip)
        optimizer.step()
        save_checkpoint(tmp_path, model, optimizer, 1)
        step = load_checkpoint(tmp_path, model, optimizer)
        phi, _ = memdlm.adapt(model.backbone, s, batch.prompt, batch.prompt_valid, batch.seeds)
        model.eval()
        gpu.clear()
        looks = 0
        for decoder in {memdlm.denoise, model.backbone.decoder}:
            for _ in decoder(model.backbone, s, batch.x0, batch.maskable, batch.valid, batch.seeds,
                             phi, steps=4):
                looks += 1
    assert step == 1 and looks >= 4
    layers = model.backbone.num_layers
    assert gpu.launches <= looks * 190 * layers
    assert sum(gpu.waits.values()) <= 2 * looks

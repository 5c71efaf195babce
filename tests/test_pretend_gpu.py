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


# The kernels of one layer in 4 bits with a LoRA, derived operation by operation: how often a part
# is there in LLaDA-MoE and in LLaDA2.1, its kernels forward, and those of its gradient. Only the
# LoRA is trained.
PARTS = {
    # Its gradient: by the weight, a cast; two products and a sum; rsqrt 3, mean 1, square 3; both
    # added, a cast.
    "norm: two casts, square, mean, + eps, rsqrt, two products": (4, 4, 8, 14),
    # Its gradient: three to unpack, five products, scale, dropout, two casts, a sum.
    "linear layer: the 4-bit product and its copy, A, B, scale, sum, two casts": (4, 5, 8, 13),
    "rotation: two products, negation, two cats, sum": (2, 2, 6, 7),
    "attention, and its heads side by side": (1, 1, 2, 3),
    "keys and values that two queries share, repeated": (0, 2, 1, 1),
    "q, k and v: from three layers, or split": (1, 1, 0, 2),
    "sum with the residual": (2, 2, 1, 1),
    "softmax router: product, cast, softmax, top k": (1, 0, 4, 6),
    # Two casts, product, sigmoid, bias; of groups top k, sum, top k, two to close the others, fill;
    # top k, gather; to sum to one: sum, + eps, scale, division.
    "router of groups": (0, 1, 17, 13),
    "where the tokens go (sort_tokens)": (1, 1, 13, 0),
    "tokens to rows, or back": (2, 2, 1, 2),
    # Its gradient: three to unpack, five products, two pads, two dropouts, two casts, scale, sum.
    "stack: three to unpack, the product, A, B, two casts, sum": (3, 3, 9, 16),
    "silu, times up": (1, 2, 2, 4),
    "the router's weights: cast, product": (1, 1, 2, 3),
    "sum with the shared expert": (0, 1, 1, 1),
}
DROPOUTS = {"llada-moe": 4 + 3, "llada2.1-mini": 5 + 3}  # in training, one per LoRA


def floor(name):
    """By `PARTS`, kernels of one layer: forward in eval mode, forward in training, backward."""
    model = list(MOE).index(name)
    forward, backward = (sum(part[model] * part[which] for part in PARTS.values())
                         for which in (2, 3))
    return forward, forward + DROPOUTS[name], backward


@pytest.mark.parametrize("name, plain, with_memory, padded", [
    ("llada-moe", 7_500, 11_100, True),
    pytest.param("llada-moe", 7_500, 11_100, False, marks=pytest.mark.slow),
    pytest.param("llada2.1-mini", 10_700, 15_800, False, marks=pytest.mark.slow),
    pytest.param("llada2.1-mini", 10_700, 15_800, True, marks=pytest.mark.slow)])
def test_a_step_launches_few_kernels_and_waits_for_few(name, plain, with_memory, padded,
                                                       monkeypatch):
    """At the published number of layers, from two small numbers. The limits are what was counted,
    and a little room; the floor is that of the layers.

    The layers below phi run forward, once more in the backward pass, and backward. The two with phi
    run once each way. Memory adds a forward pass of those below, for the pre-anchor, and of those
    with phi one each way per stage. One matrix per expert took 125,000 and 200,000 for LLaDA-MoE.
    """
    _, forward, backward = floor(name)
    below = MOE[name] - 2
    least = below * (2 * forward + backward) + 2 * (forward + backward)
    extra = below * forward + 2 * 2 * (forward + backward)
    for memory, least, most in ((False, least, plain), (True, least + extra, with_memory)):
        (few, few_waits), (more, more_waits) = (
            count_step(name, memory, padded, layers, 8, monkeypatch) for layers in (4, 6))
        others = MOE[name] - 4
        launches = few + (more - few) / 2 * others
        waits = few_waits + (more_waits - few_waits) / 2 * others
        assert 0.95 * least < launches <= most < 1.08 * least, (launches, least)
        assert waits <= (40 if padded else 0), waits


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MOE)
def test_kernels_do_not_grow_with_the_number_of_experts(name, padded, monkeypatch):
    counts = [count_step(name, True, padded, 4, experts, monkeypatch) for experts in (8, 32)]
    assert counts[0] == counts[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", MOE)
def test_adapting_launches_few_kernels(name):
    """Both states of the prompt share a pass of the layers below phi."""
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
    forward, _, backward = floor(name)
    least = (MOE[name] - 2) * forward + 2 * 2 * (forward + backward)
    assert 0.95 * least < few + (more - few) / 2 * (MOE[name] - 4) < 1.08 * least


@pytest.mark.slow
@pytest.mark.parametrize("name", MOE)
def test_a_look_of_the_decoder_launches_few_kernels_per_layer(name):
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
    assert launches[1] - launches[0] == 2 * floor(name)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", MOE)
def test_a_layer_launches_the_kernels_of_its_parts(name):
    """A layer below phi in training: forward as derived, and again with its gradient."""
    counts = []
    for layers in (4, 6):
        s, model = make_model(name, layers, memory=False)
        with PretendGPU() as gpu:
            gpu.adopt(model.train())
            loss = model(random_batch(model, s))[0]
            forward = gpu.launches
            loss.backward()
        counts.append((forward, gpu.launches - forward))
    forward, backward = ((more - few) / 2 for few, more in zip(*counts))
    _, least, gradient = floor(name)
    assert forward == least
    assert 0.96 * gradient < backward - forward <= 1.02 * gradient, (backward, gradient)


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

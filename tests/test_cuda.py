"""What only a GPU can show: MEMDLM_CUDA=1 python -m pytest tests/test_cuda.py

The recordings of the published code hold on it too: MEMDLM_CUDA=1 python -m pytest
tests/test_parity.py computes them on the CPU; here a step on the GPU is compared with one there.
"""
import pytest
import torch

import backbones.experts as experts_module
import memdlm
import train
from backbones.backbone import Backbone
from backbones.experts import product, sort_tokens
from memdlm import MemDLM
from runs import load_checkpoint, save_checkpoint
from settings import Settings
from tiny_models import EACH, random_batch, random_lora, tiny_backbone

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
MOE = ["llada-moe", "llada2.1-mini"]


@pytest.fixture(autouse=True)
def exact_products():
    """Float32 products as on a CPU, without TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def take_step(backbone, s):
    """Loss, inner losses and the gradients of one training step, on the CPU."""
    model = MemDLM(backbone.train(), s)
    loss, record = model(random_batch([12, 7], prompt=2))
    loss.backward()
    grads = [p.grad.flatten().cpu() for p in backbone.parameters() if p.grad is not None]
    return loss.item(), record["inner"].cpu(), torch.cat(grads)


def on_gpu(backbone):
    """The same backbone with its weights on the GPU."""
    assert isinstance(backbone, Backbone)
    return backbone.to("cuda")


@pytest.mark.parametrize("name", EACH)
def test_a_step_is_that_of_the_cpu(name, monkeypatch):
    """The initial A of phi comes from the CPU in both, since each device draws its own."""
    s, draw = Settings(rank=8, layer_fraction=0.5), memdlm.uniform

    def draw_on_cpu(*arguments, device="cpu", **options):
        return draw(*arguments, **options).to(device)

    monkeypatch.setattr(memdlm, "uniform", draw_on_cpu)
    loss, inner, grads = take_step(random_lora(tiny_backbone(name)), s)
    theirs = take_step(on_gpu(random_lora(tiny_backbone(name))), s)
    assert theirs[0] == pytest.approx(loss, rel=1e-4)
    torch.testing.assert_close(theirs[1], inner, rtol=1e-4, atol=1e-5)
    assert (theirs[2] - grads).norm() < 1e-3 * grads.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_products_of_stacks_agree_with_single_matrices(dtype):
    """Experts 0 and 3 are idle."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.tensor([[1, 2], [2, 4], [4, 1], [5, 2]] * 3).cuda()
    x = torch.randn(12, 64, generator=generator).to("cuda", dtype)
    W = torch.randn(6, 32, 64, generator=generator).to("cuda", dtype)
    want = torch.einsum("ncoi,ni->nco", W[chosen].float(), x.float())
    for padded in (False, True):
        places = sort_tokens(chosen, 1, 6, padded)
        got = product(x[places.tokens], W, places)[places.rows].view(12, 2, 32).float()
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-1)


@pytest.mark.parametrize("name", MOE)
def test_4bit_weights_are_the_unpacked_ones(name, monkeypatch):
    backbone = tiny_backbone(name, load_4bit=True)
    batch, s = random_batch([12, 7]), Settings()
    on_cpu = memdlm.lower_layers(backbone.eval(), s, batch.x0, batch.valid)
    theirs = memdlm.lower_layers(on_gpu(backbone), s, batch.x0, batch.valid)
    assert (theirs.cpu() - on_cpu).norm() < 1e-2 * on_cpu.norm()
    assert not experts_module.pads(torch.zeros(1))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_resumed_run_is_the_uninterrupted_one(optimizer, tmp_path):
    s = Settings(model="x", rank=8, optimizer=optimizer)

    def make():
        model = MemDLM(on_gpu(random_lora(tiny_backbone("llada-moe"))), s)
        return model, train.make_optimizer(s, [p for p in model.parameters() if p.requires_grad])

    def step(model, made):
        made.zero_grad()
        model(random_batch([12, 7], prompt=2))[0].backward()
        made.step()

    model, made = make()
    step(model, made)
    save_checkpoint(tmp_path, model, made, 1)
    step(model, made)
    again, theirs = make()
    assert load_checkpoint(tmp_path, again, theirs) == 1
    step(again, theirs)
    for p, q in zip(model.parameters(), again.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", EACH)
def test_decoders_run_with_memory(name):
    backbone, s = on_gpu(tiny_backbone(name)).eval(), Settings(rank=8)
    batch = random_batch([40, 40], prompt=32)
    phi, record = memdlm.adapt(backbone, s, batch.prompt, batch.prompt_valid, batch.seeds)
    for canvas in backbone.decoder(backbone, s, batch.x0, batch.maskable, batch.valid, batch.seeds,
                                   phi):
        pass
    assert (canvas != backbone.mask_id).all() and record["inner"].isfinite().all()

"""The experts of a layer: one after the other, or all in one product per projection.

The router gives each token its k experts and their weights. The tokens are sorted by expert once,
each expert computes its share, and the results go back to their places.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Experts(nn.ModuleList):
    """Each token goes through its k experts; the outputs are summed with the router's weights."""
    grouped = False  # set by load_backbone: all experts in one product per projection, or a loop

    def forward(self, x, weights, chosen, rows_per_sample=None):
        """x [B, L, D], or [N, D] with how many rows belong to each sample -> the same shape.

        weights, chosen [rows, k]: how much of which expert. For example one sample, k = 2; token 0
        goes to experts 5 and 1, token 1 to experts 1 and 7:

            pairs of (token, expert)             0-5  0-1  1-1  1-7
            their number                          0    1    2    3
            numbers sorted by expert (1 1 5 7)    1    2    0    3
            the tokens that they belong to        0    1    0    1

        Differs: LLaDA2.x was published to sum the outputs in float32. Ours sums in the model's
        precision.
        """
        counts = rows_per_sample or [x.shape[1]] * len(x)
        B, k, rows = len(counts), chosen.shape[1], x.reshape(-1, x.shape[-1])
        sample = torch.arange(B).repeat_interleave(torch.tensor(counts)).to(x.device)
        pair = (chosen * B + sample[:, None]).flatten()  # the number of (expert, sample)
        # Sorted by expert, within an expert by sample, within a sample by position.
        order = pair.argsort(stable=True)
        sizes = torch.zeros(len(self) * B, dtype=torch.long, device=x.device)
        sizes = sizes.scatter_add_(0, pair, torch.ones_like(pair)).view(-1, B)
        run = self.run_grouped if self.grouped else self.run_one_by_one
        out = run(rows[order // k], sizes)
        out = out[order.argsort()].view(-1, k, x.shape[-1])  # back to [token, choice, D]
        return (weights.to(out.dtype)[:, None] @ out).view(x.shape)

    def run_one_by_one(self, rows, sizes):
        """The sorted rows through one expert after the other. sizes [experts, B]."""
        sizes, out = sizes.tolist(), []  # the one thing that the host reads in this layer
        parts = rows.split([sum(own) for own in sizes])
        for expert, part, own in zip(self, parts, sizes):
            if len(part):
                out.append(expert(part, own if len(own) > 1 else None))
        return torch.cat(out)

    def run_grouped(self, rows, sizes):
        """The sorted rows through all experts at once. sizes [experts, B]."""
        ends = sizes.flatten().cumsum(0).int()  # where the rows of each expert and sample end
        gate, up, down = ([getattr(expert, name) for expert in self]
                          for name in ("gate_proj", "up_proj", "down_proj"))
        inner = F.silu(grouped_linear(gate, rows, ends)) * grouped_linear(up, rows, ends)
        return grouped_linear(down, inner, ends)


def grouped_linear(layers, x, ends):
    """Each expert's linear layer, with LoRA and fast weights, on its rows. x [N, in] -> [N, out].

    layers: one per expert. They are not called: every kind of matrix, also a low-rank one, takes
    part in one product for all experts. ends [experts * B]: where the rows of each expert and
    sample end.
    """
    B, first = len(ends) // len(layers), layers[0]
    base = [getattr(layer, "base_layer", layer) for layer in layers]
    of_expert = ends[B - 1::B].contiguous()
    if base[0].weight.requires_grad:
        y = F.grouped_mm(x, torch.stack([layer.weight for layer in base]).mT, offs=of_expert)
    else:
        y = FrozenProduct.apply(x, of_expert, base)
    if hasattr(first, "lora_A"):
        name = first.active_adapters[0]
        A = torch.stack([layer.lora_A[name].weight for layer in layers])
        B_out = torch.stack([layer.lora_B[name].weight for layer in layers])
        low = F.grouped_mm(first.lora_dropout[name](x.to(A.dtype)), A.mT, offs=of_expert)
        y = y + first.scaling[name] * F.grouped_mm(low, B_out.mT, offs=of_expert)
        y = y.to(x.dtype)
    if hasattr(first, "fast"):
        pair, scale = first.fast
        z = x
        for i, w in enumerate(pair):  # A, then B; or the full-rank delta
            own = torch.stack([layer.fast[0][i] for layer in layers])  # [experts, G, out, in]
            own = own.flatten(0, 1).to(x.dtype)
            z = F.grouped_mm(z, own.mT, offs=ends if len(w) > 1 else of_expert)
        y = y + scale * z
    return y


class FrozenProduct(torch.autograd.Function):
    """The product with frozen weights.

    They are put side by side, and their 4 bits unpacked, in the forward pass and again in the
    backward pass. So nobody keeps them in between.
    """

    @staticmethod
    def forward(ctx, x, ends, layers):
        ctx.save_for_backward(ends)
        ctx.layers = layers
        return F.grouped_mm(x, stack_weights(layers, x.dtype).mT, offs=ends)

    @staticmethod
    def backward(ctx, grad):
        weights = stack_weights(ctx.layers, grad.dtype)
        return F.grouped_mm(grad.contiguous(), weights, offs=ctx.saved_tensors[0]), None, None


def stack_weights(layers, dtype):
    """The weights of linear layers of one shape, unpacked -> [layers, out, in]."""
    state = getattr(layers[0].weight, "quant_state", None)
    if state is None:
        return torch.stack([layer.weight for layer in layers])
    from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
    states = [layer.weight.quant_state for layer in layers]
    # A scale belongs to a block of 64 weights. A matrix is a whole number of blocks, so many
    # matrices are unpacked like one.
    scales = torch.cat([dequantize_blockwise(own.absmax, own.state2) + own.offset
                        for own in states])
    packed = torch.cat([layer.weight.data.flatten() for layer in layers])
    shape = torch.Size((len(layers) * state.shape[0], state.shape[1]))
    whole = QuantState(absmax=scales, shape=shape, code=state.code, blocksize=state.blocksize,
                       quant_type=state.quant_type, dtype=dtype)
    return dequantize_4bit(packed[:, None], whole).view(len(layers), *state.shape)

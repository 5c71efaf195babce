"""The experts of a layer: one after the other, or all in one product per projection."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Experts(nn.ModuleList):
    """Each token goes through its k experts; the outputs are summed with the router's weights."""
    grouped = False  # set by `load`: all experts in one product per projection, or one expert after the other

    def forward(self, x, weights, chosen, rows_per_sample=None):
        """x [B, L, D], or [N, D] with the number of rows of each sample; weights, chosen [rows, k]: how much of which expert.

        One sample, k = 2, token 0 to experts 5 and 1, token 1 to 1 and 7: pairs 5 1 1 7, in order of their experts the pairs
        1 2 0 3, which are tokens 0 1 0 1. (LLaDA2.x was published to sum in float32; here in the model's precision.)
        """
        counts_of = rows_per_sample or [x.shape[1]] * len(x)
        B, k, rows = len(counts_of), chosen.shape[1], x.reshape(-1, x.shape[-1])
        sample = torch.arange(B).repeat_interleave(torch.tensor(counts_of)).to(x.device)
        pair = (chosen * B + sample[:, None]).flatten()  # (expert, sample)
        order = pair.argsort(stable=True)  # sorted once: by expert, within an expert by sample, within that by position
        counts = torch.zeros(len(self) * B, dtype=torch.long, device=x.device).scatter_add_(0, pair, torch.ones_like(pair))
        out = (self.at_once if self.grouped else self.one_by_one)(rows[order // k], counts.view(-1, B))
        out = out[order.argsort()].view(-1, k, x.shape[-1])  # back to [token, choice, D]
        return (weights.to(out.dtype)[:, None] @ out).view(x.shape)

    def one_by_one(self, rows, counts):
        counts = counts.tolist()  # the one number that the host reads from the device in this layer
        rows = rows.split([sum(own) for own in counts])
        return torch.cat([expert(part, own if len(own) > 1 else None) for expert, part, own in zip(self, rows, counts) if len(part)])

    def at_once(self, rows, counts):
        ends = counts.flatten().cumsum(0).int()  # [experts * B] where the rows of each expert and sample end
        gate, up, down = ([getattr(expert, name) for expert in self] for name in ("gate_proj", "up_proj", "down_proj"))
        inner = F.silu(grouped_linear(gate, rows, ends)) * grouped_linear(up, rows, ends)
        return grouped_linear(down, inner, ends)


def grouped_linear(layers, x, ends):
    """What the experts' linear layers, one each, with their LoRA and fast weights, make of their rows. x [N, in] -> [N, out].

    The layers themselves are not called. Every matrix, also the low-rank ones, takes part in one product for all experts.
    """
    B, first, base = len(ends) // len(layers), layers[0], [getattr(layer, "base_layer", layer) for layer in layers]
    of_expert = ends[B - 1::B].contiguous()
    if base[0].weight.requires_grad:
        y = F.grouped_mm(x, torch.stack([layer.weight for layer in base]).mT, offs=of_expert)
    else:
        y = Frozen.apply(x, of_expert, base)
    if base is not layers and hasattr(first, "lora_A"):
        name = first.active_adapters[0]
        A, B_ = (torch.stack([getattr(layer, part)[name].weight for layer in layers]) for part in ("lora_A", "lora_B"))
        low = F.grouped_mm(first.lora_dropout[name](x.to(A.dtype)), A.mT, offs=of_expert)
        y = (y + first.scaling[name] * F.grouped_mm(low, B_.mT, offs=of_expert)).to(y.dtype)
    if fast := getattr(first, "fast", None):
        (pair, scale), z = fast, x
        for i in range(len(pair)):  # A, then B; or the full-rank delta
            own = torch.stack([layer.fast[0][i] for layer in layers]).flatten(0, 1).to(x.dtype)  # [experts * G, ...]
            z = F.grouped_mm(z, own.mT, offs=ends if len(pair[0]) > 1 else of_expert)
        y = y + scale * z
    return y


class Frozen(torch.autograd.Function):
    """The product with frozen weights. They are put side by side, and their 4 bits unpacked, in the forward pass and again in
    the backward pass, so that nobody keeps them in between."""

    @staticmethod
    def forward(ctx, x, ends, layers):
        ctx.save_for_backward(ends)
        ctx.layers = layers
        return F.grouped_mm(x, side_by_side(layers, x.dtype).mT, offs=ends)

    @staticmethod
    def backward(ctx, grad):
        return F.grouped_mm(grad.contiguous(), side_by_side(ctx.layers, grad.dtype), offs=ctx.saved_tensors[0]), None, None


def side_by_side(layers, dtype):
    """Weights of linear layers of one shape -> [layers, out, in]."""
    state = getattr(layers[0].weight, "quant_state", None)
    if state is None:
        return torch.stack([layer.weight for layer in layers])
    from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
    states = [layer.weight.quant_state for layer in layers]
    # A byte or a float per block of 64 weights; a matrix is a whole number of blocks, so many are unpacked like one.
    scales = torch.cat([dequantize_blockwise(own.absmax, own.state2) + own.offset for own in states])
    packed = torch.cat([layer.weight.data.flatten() for layer in layers])
    shape = (len(layers) * state.shape[0], state.shape[1])
    whole = QuantState(absmax=scales, shape=torch.Size(shape), code=state.code, blocksize=state.blocksize, quant_type=state.quant_type, dtype=dtype)
    return dequantize_4bit(packed[:, None], whole).view(len(layers), *state.shape)

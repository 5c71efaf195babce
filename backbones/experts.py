"""The experts of a layer: one stack of matrices per projection, and one product per stack.

The router gives each token its k experts and their weights. The tokens are sorted by expert once,
all experts compute their shares at the same time, and the results go back to their tokens. So the
number of kernels that a GPU has to start does not grow with the number of experts.

A checkpoint has three matrices for each expert, and so has an adapter that PEFT wrote. Their names
are known at the door only: loading and saving ask `Stack.names`.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

FEW_ROWS = 1 << 14  # so many rows may be padded, however uneven the router is
CPU_ROWS = 32       # in bfloat16, a CPU wants the rows of an expert in multiples of this


# ---- Where the tokens go ------------------------------------------------------------------------

class Places(NamedTuple):
    """Which row of the stacks' input holds which token, and where each expert's rows end."""
    tokens: torch.Tensor             # [rows] the token that each row holds
    rows: torch.Tensor               # [tokens * k] the row of each (token, choice)
    ends: torch.Tensor | None        # [E] int32, where the rows of each expert end; None: padded
    sample_ends: torch.Tensor | None  # [E * B] int32, where those of each expert and sample end
    samples: int                     # B
    most: int | None                 # rows of each expert and sample, if padded


def sort_tokens(chosen, samples, experts, padded, most=None, unit=1):
    """chosen [tokens, k]: the experts of each token; the same number of tokens for each sample.

    For example one sample, k = 2; token 0 goes to experts 5 and 1, token 1 to experts 1 and 7:

        pairs of (token, expert)             0-5  0-1  1-1  1-7
        their number                          0    1    2    3
        numbers sorted by expert (1 1 5 7)    1    2    0    3
        the tokens that they belong to        0    1    0    1

    padded: every expert gets as many rows of each sample as the one with the most, [E, B, most].
    Rows that are left hold token 0 and are never read. The host waits for the device to read
    `most`, unless it is given. Where padding would more than double many rows there is none: memory
    has a bound, however uneven the router is.
    unit: otherwise the rows of each expert and sample are a multiple of this, the last ones unread.
    """
    n, k = chosen.shape
    sample = torch.arange(samples, device=chosen.device).repeat_interleave(n // samples)
    # Sorted by expert, within an expert by sample, within a sample by position.
    group = (chosen * samples + sample[:, None]).flatten()
    order = group.argsort(stable=True)
    sizes = group.new_zeros(experts * samples).scatter_add_(0, group, torch.ones_like(group))
    ends = sizes.cumsum(0)
    numbers = torch.arange(n * k, device=chosen.device)
    if padded:
        most = int(sizes.max()) if most is None else most
        padded = experts * samples * most <= most_rows(n * k)
    if not padded and unit == 1:
        rows = torch.empty_like(order).scatter_(0, order, numbers)
        return Places(order // k, rows, *ends_of(ends, samples), samples, None)
    begins, group = ends - sizes, group[order]
    if padded:
        starts, count = torch.arange(len(sizes), device=chosen.device) * most, len(sizes) * most
    else:
        sizes = -(-sizes // unit) * unit
        ends = sizes.cumsum(0)
        starts, count = ends - sizes, int(ends[-1])
    row = numbers + (starts - begins)[group]
    rows = torch.empty_like(order).scatter_(0, order, row)
    tokens = order.new_zeros(count).scatter_(0, row, order // k)
    if padded:
        return Places(tokens, rows, None, None, samples, most)
    return Places(tokens, rows, *ends_of(ends, samples), samples, None)


def ends_of(ends, samples):
    """Where the rows end, of each expert and of each expert and sample. ends [E * B] -> int32."""
    ends = ends.int()
    return ends[samples - 1::samples].contiguous(), ends


def most_rows(rows):
    """How many rows a padded stack may have in place of `rows`."""
    return max(2 * rows, FEW_ROWS)


def product(x, W, places):
    """Each row of x [rows, in] times the matrix of its group -> [rows, out].

    W: one matrix per expert [E, out, in], or per expert and sample [E * B, out, in].
    """
    if places.ends is None:
        return torch.bmm(x.view(len(W), -1, x.shape[-1]), W.mT).flatten(0, 1)
    out, width = W.shape[1:]
    if out % 8 or width % 8:  # the fast kernels want rows of whole 16 bytes
        x, W = F.pad(x, (0, -width % 8)), F.pad(W, (0, -width % 8, 0, -out % 8))
    ends = places.ends if len(W) == len(places.ends) else places.sample_ends
    y = F.grouped_mm(x, W.mT, offs=ends)
    return y[:, :out] if out % 8 else y


def outer_products(y, x, places, experts):
    """The sum over each expert's rows of y x^T: y [rows, out], x [rows, in] -> [E, out, in]."""
    if places.ends is None:
        return torch.bmm(y.view(experts, -1, y.shape[-1]).mT, x.view(experts, -1, x.shape[-1]))
    wide = F.grouped_mm(F.pad(y, (0, -y.shape[-1] % 8)).mT, F.pad(x, (0, -x.shape[-1] % 8)),
                        offs=places.ends)
    return wide[:, :y.shape[-1], :x.shape[-1]]


def pads(x):
    """Is a padded product the fast one for x on its device?

    `grouped_mm` has its fast kernel in bfloat16 on GPUs from sm_90 on. On others it falls back to
    one product per expert and waits for the device. On a CPU one product per expert is the fast
    way, but there is none in float64.
    """
    if not x.is_cuda:
        return x.dtype == torch.float64
    return x.dtype != torch.bfloat16 or torch.cuda.get_device_capability(x.device) < (9, 0)


def row_unit(x, chosen, experts):
    """What the rows of an expert and a sample should be a multiple of; see `sort_tokens`.

    In bfloat16 a CPU prepares a product anew for each number of rows, which takes longer than the
    product itself.
    """
    on_cpu = x.is_cpu and x.dtype == torch.bfloat16
    return CPU_ROWS if on_cpu and fill_rows(chosen.numel(), experts, len(x)) else 1


def fill_rows(rows, experts, samples):
    """Have the experts many rows each? With few, filling them up would cost more than it saves."""
    return rows >= 4 * CPU_ROWS * experts * samples


# ---- The stacks ---------------------------------------------------------------------------------

class Stack(nn.Module):
    """One linear layer of every expert, without bias, with the LoRA that the outer loop trains."""

    def __init__(self, experts, width, out):
        super().__init__()
        self.experts, self.in_features, self.out_features = experts, width, out
        self.weight = nn.Parameter(torch.empty(experts, out, width))
        self.in_4bit, self.quant_state = False, None  # what it is to be, and bitsandbytes' scales
        self.lora_A = self.lora_B = None

    def forward(self, x, places):
        """x [rows, in] -> [rows, out]"""
        if self.weight.requires_grad:
            y = product(x, self.weight, places)
        else:
            y = FrozenProduct.apply(x, self, places)
        if self.lora_A is not None:
            # The masters stay in float32. The product is in the model's precision.
            A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
            if self.training and self.dropout:
                low = DroppedProduct.apply(x, A, self.dropout, places)
            else:
                low = product(x, A, places)
            y = y.add(product(low, B, places), alpha=self.scaling)
        return y

    def fast_product(self, x, W, places):
        """The product of fast weights. W [G, E, out, in], one for each sample or one for all."""
        if len(W) not in (1, places.samples):
            raise ValueError(f"phi is for {len(W)} samples, the input has {places.samples}")
        return product(x, W.transpose(0, 1).flatten(0, 1), places)

    def add_lora(self, rank, alpha, dropout):
        """A LoRA for each expert, as PEFT begins it: B is zero, A Kaiming-uniform."""
        device, bound = self.weight.device, self.in_features ** -0.5
        A = torch.empty(self.experts, rank, self.in_features, device=device)
        B = torch.zeros(self.experts, self.out_features, rank, device=device)
        self.lora_A, self.lora_B = nn.Parameter(A.uniform_(-bound, bound)), nn.Parameter(B)
        self.scaling, self.dropout = alpha / rank, dropout

    def quantise(self, weight):
        """Keep `weight` [E, out, in] in bitsandbytes' nf4, with double quantisation."""
        from bitsandbytes.functional import quantize_4bit
        packed, self.quant_state = quantize_4bit(
            weight.flatten(0, 1), compress_statistics=True, quant_type="nf4")
        return packed

    def unpacked(self, dtype):
        """The frozen weights [E, out, in]."""
        if self.quant_state is None:
            return self.weight
        from bitsandbytes.functional import dequantize_4bit
        weight = dequantize_4bit(self.weight.data, self.quant_state)
        return weight.to(dtype).view(self.experts, self.out_features, self.in_features)

    def names(self, path):
        """What a checkpoint calls the parts of the stack at `path`: mlp.experts.up_proj holds
        mlp.experts.0.up_proj, mlp.experts.1.up_proj, ..."""
        outer, _, name = path.rpartition(".")
        return [f"{outer}.{expert}.{name}" for expert in range(self.experts)]

    def extra_repr(self):
        return f"{self.experts} x {self.in_features} -> {self.out_features}"


class FrozenProduct(torch.autograd.Function):
    """The product with frozen weights.

    Their 4 bits are unpacked in the forward pass and again in the backward pass. So nobody keeps
    the large copy in between.
    """

    @staticmethod
    def forward(ctx, x, stack, places):
        ctx.stack, ctx.places = stack, places
        return product(x, stack.unpacked(x.dtype), places)

    @staticmethod
    def backward(ctx, grad):
        W = ctx.stack.unpacked(grad.dtype)
        return product(grad.contiguous(), W.mT, ctx.places), None, None


def draw_kept(x, dropout):
    """Which numbers of x dropout keeps, bool, on a CPU. 16 random bits decide about each.

    A number is dropped with a probability of `dropout`, in steps of 1 / 65536 and at least one. It
    takes less than half of the time of drawing a float for each.
    """
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2**63, 2**63 - 1)
    last = max(1, round(dropout * 2**16)) - 2**15 - 1  # the highest that is dropped
    return (bits.view(torch.int16)[:x.numel()] > last).view(x.shape)


def drop(x, kept, dropout):
    """x / (1 - dropout) where it was kept, zero elsewhere."""
    scale = 1 / (1 - dropout) if dropout < 1 else 0.0
    if x.is_cpu:
        return (x * kept.view(torch.uint8)).mul_(scale)  # half the time of `where`
    return torch.ops.aten.native_dropout_backward(x, kept, scale)


class DroppedProduct(torch.autograd.Function):
    """The product of dropout(x) with A.

    Autograd would keep what dropout left of x. This keeps x, which gate_proj and up_proj share, and
    of dropout the mask alone, a byte for a number.
    """

    @staticmethod
    def forward(ctx, x, A, dropout, places):
        ctx.places, ctx.dropout = places, dropout
        if x.is_cpu:  # its own way takes longer
            kept = draw_kept(x, dropout)
            some = drop(x, kept, dropout)
        else:
            some, kept = torch.native_dropout(x, dropout, True)
        ctx.save_for_backward(x, kept, A)
        return product(some, A, places)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, kept, A = ctx.saved_tensors
        grad, grad_x, grad_A = grad.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            grad_x = drop(product(grad, A.mT, ctx.places), kept, ctx.dropout)
        if ctx.needs_input_grad[1]:
            grad_A = outer_products(grad, drop(x, kept, ctx.dropout), ctx.places, len(A))
        return grad_x, grad_A, None, None


class Experts(nn.Module):
    """Each token goes through its k experts; the outputs are summed with the router's weights."""

    def __init__(self, experts, width, inner):
        super().__init__()
        self.gate_proj, self.up_proj = Stack(experts, width, inner), Stack(experts, width, inner)
        self.down_proj = Stack(experts, inner, width)

    def forward(self, x, weights, chosen, fullest):
        """x [B, L, D] -> the same shape. weights, chosen [B * L, k]: how much of which expert.

        fullest: {experts of a layer: rows of the fullest}, known where a layer is computed again.
        Differs: LLaDA2.x was published to sum the outputs in float32. Ours sums in the model's
        precision.
        """
        count, known = self.gate_proj.experts, fullest.get(self)
        places = sort_tokens(chosen, len(x), count, pads(x), known, row_unit(x, chosen, count))
        fullest[self] = places.most
        rows = x.flatten(0, 1).index_select(0, places.tokens)
        inner = F.silu(self.gate_proj(rows, places)) * self.up_proj(rows, places)
        out = self.down_proj(inner, places).index_select(0, places.rows)
        out = out.view(*chosen.shape, -1)  # [B * L, k, D]
        return (weights.to(out.dtype)[:, None] @ out).view(x.shape)

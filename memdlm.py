"""MemDLM: memory-enhanced training of masked diffusion language models, in one file.

The paper: Pei et al., "MemDLM: Memory-Enhanced DLM Training", arXiv 2603.22241. Equation and section
numbers below are its own. The idea in ten lines:

    1  A masked diffusion LM learns to fill in tokens hidden at random (Eq. 1-2), in ONE step from true text.
    2  It generates in MANY steps, from its own guesses. That gap is called exposure bias (Eq. 3-4).
    3  MemDLM puts a piece of that many-step path into training, as an inner loop (Eq. 5-8):
    4      take the noised sample x_t ("anchor"); hide some more of it -> x_pre ("pre-anchor");
    5      stage 1  predict from x_pre, one SGD step on the fast weights      phi_0 -> phi_1
    6      stage 2  predict from x_t,   one SGD step                          phi_1 -> phi_2
    7  phi is a small LoRA on the last layers. It lives for one batch and is thrown away.
    8  The outer step trains the model theta at the same x_t *given* phi_2; phi_2 counts as a constant
    9  there (first order, Eq. 9-10).
   10  At inference the same loop can be run on the prompt, so that phi holds it while decoding (4.5).

Glossary
    symbol     name here         shape       where
    x_0        x0                [B, L]      clean tokens                                     Eq. 1
    x_t        xt                [B, L]      the anchor: x0 with masks                        Eq. 1
    x_t_pre    masks[0]          [B, L]      the pre-anchor: xt with more masks               3.2
    M_t        masked            [B, L]      bool, where xt holds the mask token              Eq. 2
    -          maskable          [B, L]      bool, tokens that may be noised (the response)   4.1
    -          valid             [B, L]      bool, False on padding
    t          t                 [B]         noise level: each maskable token is masked       Eq. 1
                                             with probability t
    rho        ratio             [B]         the realised share, |masked| / |maskable|
    theta      backbone          -           the model, or its trainable LoRA                 Eq. 5
    phi        phi               {name: (A [G, r, in], B [G, out, r])}  fast weights          Eq. 5-8
                                             G = B: one phi per sample; G = 1: the batch shares one
    eta        inner_lr          -           inner learning rate                              Eq. 6
    K          inner_steps       -           number of inner steps                            Eq. 6
    s_pre      pre_scale         -           masks at the pre-anchor / masks at the anchor    4.4

The backbone. Any masked diffusion LM with these can be trained here (toy/model.py is one):
    embed(ids)                       [B, L] -> [B, L, D]
    blocks(h, valid, start, stop, need)  run layers start..stop-1 on hidden states; stop=None means to the end, of which only
                                     the rows need [B, L] are read (None: all), so the last layer may skip the feed-forward
                                     of the others. Activation checkpointing belongs below `stop` only: a recomputation
                                     after `with fast_weights(...)` has ended would not see phi
    head(h)                          [N, D] -> [N, V], final norm and unembedding, on the rows that need it
    matrices(first, scope)           {name: nn.Linear} of layers first.. that fast weights may act on: "ffn" or
                                     "ffn+attn" (the published code never adapts attention in a MoE layer)
                                     each called on [B, L, in]; an expert, whose input [N, in] mixes samples, has in
                                     its attribute `groups` the number of rows of each sample, in order
    num_layers, vocab_size, mask_id
Tokens and masks stay on the CPU, hidden states live where the model lives. So the positions of the masks are
known without reading them back from the device.

Not here: architectures, loading, data, the optimiser's loop, block diffusion with its threshold and cache
(LLaDA2.x), and second-order gradients, which the paper does not take either.
"""
from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


# ---- 1. Settings --------------------------------------------------------------------------------------

def setting(default, help, choices=None):
    """A dataclass field that also carries the text and the choices of its command-line flag."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Settings:
    """Everything the method can be told. The defaults are the paper's."""
    memory: bool = setting(True, "train with fast weights; --no-memory is the MDLM baseline, same data and masks")
    memory_from: str = setting("response", "what phi is written from in training: the noised response (the paper) "
                               "or the prompt, as at inference (an extension)", ["response", "prompt"])
    closed_book: bool = setting(False, "predict the response without sight of the prompt (an extension: only phi "
                                "can carry the prompt then)")
    trajectory: str = setting("consistent", "inner-loop states: consistent (the paper), pre_only, anchor_only, "
                              "inconsistent, or cover:K (K disjoint masks that cover everything; an extension)")
    inner_steps: int = setting(2, "K, number of inner steps of consistent and inconsistent; pre_only takes K - 1 of them")
    inner_loss: str = setting("ce", "what an inner step minimises",
                              ["ce", "kl", "reverse_kl", "hidden_mse", "hidden_cosine"])
    stage1_target: str = setting("clean", "loss positions before the anchor: every mask (clean) or, Eq. 7 read "
                                 "literally, those that the next state reveals", ["clean", "anchor_tokens"])
    pre_scale: float = setting(1.5, "s_pre: the pre-anchor has this many times the anchor's masks")
    anchor_ratio: float = setting(0.2, "share of prompt tokens masked at the anchor when adapting to a prompt")
    inner_lr: float = setting(0.1, "eta, learning rate of the inner SGD")
    clip: str = setting("local", "inner gradient clipping: each tensor by its own norm, all by one norm, or none",
                        ["local", "global", "none"])
    clip_norm: float = setting(1.0, "threshold of the inner clipping")
    per_sample: bool = setting(False, "in training, one phi per sample instead of one for the micro-batch")
    layer_fraction: float = setting(0.10, "fast weights act on this last share of the layers (at least one layer)")
    scope: str = setting("ffn", "which matrices of those layers", ["ffn", "ffn+attn"])
    adapter: str = setting("lora", "low-rank fast weights, or a full-rank delta", ["lora", "full"])
    rank: int = setting(32, "r, rank of the fast weights")
    alpha: float = setting(64.0, "the low-rank product is scaled by alpha / r")
    min_t: float = setting(1e-3, "smallest noise level drawn in training")

    def __post_init__(self):
        for name, f in self.__dataclass_fields__.items():
            choices, value = f.metadata.get("choices"), getattr(self, name)
            if choices and value not in choices:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(str, choices))}")
        kind, _, k = self.trajectory.partition(":")
        parts_fit = (k.isdecimal() and int(k) > 0) if kind == "cover" else (kind == self.trajectory)
        if kind not in TRAJECTORIES or not parts_fit:
            raise ValueError(f"trajectory is {self.trajectory!r}; it must be one of consistent, pre_only, "
                             "anchor_only, inconsistent, or cover:K with K of 1 or more (cover:4)")
        limits = [("inner_steps", 2, 1000), ("rank", 1, 1 << 20), ("alpha", 0, 1e9), ("layer_fraction", 1e-9, 1),
                  ("pre_scale", 1, 1e9), ("anchor_ratio", 0, 1), ("inner_lr", 0, 1e9), ("clip_norm", 1e-9, math.inf), ("min_t", 1e-9, 1)]
        for name, low, high in limits:
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie between {low:g} and {high:g}")


@dataclass(frozen=True)
class Batch:
    """One training batch. All on the CPU; rows are padded on the right."""
    x0: torch.Tensor            # [B, L] prompt and response, or the response alone for a closed book
    maskable: torch.Tensor      # [B, L] bool. Differs: never padding, which the published code masks and trains on
    valid: torch.Tensor         # [B, L] bool
    seeds: list                 # B entries: all the randomness of a sample follows from its seed
    prompt: torch.Tensor        # [B, P] what a memory of the prompt is written from
    prompt_valid: torch.Tensor  # [B, P] bool


# ---- 2. Noise and corruption (Eq. 1) ------------------------------------------------------------------

def uniform(seeds, purpose, *shape, dtype=torch.float32):
    """Numbers in [0, 1), [B, *shape]. Row b depends on seeds[b] and `purpose` alone.

    So a sample gets the same masks in any batch, at any padding, on any device and on any number of
    processes, and a run can be resumed from the step number. The baseline draws the same masks as MemDLM,
    because what the inner loop draws has other purposes.
    """
    def row(seed):
        generator = torch.Generator().manual_seed(crc32(f"{purpose} {seed}".encode()))
        return torch.rand(shape, generator=generator, dtype=dtype)
    return torch.stack([row(seed) for seed in seeds])


def corrupt(x0, maskable, t, u, mask_id):
    """Noise x0 at level t. x0, maskable, u [B, L], t [B] -> xt, masked [B, L]. A sample may stay unmasked."""
    # Eq. 1:  q(x_t^i | x_0^i) = (1 - t) [x_t^i = x_0^i] + t [x_t^i = m]
    masked = maskable & (u < t[:, None])
    return torch.where(masked, mask_id, x0), masked


# ---- 3. Trajectories: the states that the inner loop walks through (3.2) --------------------------------

class Stage(NamedTuple):
    x: torch.Tensor        # [B, L] input of this inner step
    targets: torch.Tensor  # [B, L] bool, positions of its loss
    weight: torch.Tensor   # [B] weight of a sample's loss
    next_x: torch.Tensor   # [B, L] the next, more revealed state: what a self-distillation teacher sees


def order(where, u):
    """Number the True positions of each row 0, 1, 2, ... by increasing u. [B, L] -> [B, L]; others come last."""
    return torch.where(where, u, 2.0).argsort(dim=1, stable=True).argsort(dim=1)


def at_least_one(maskable, u, rate):
    """Each maskable position with probability `rate`; where that would be none, the one with the lowest u."""
    return maskable & ((u < rate) | (order(maskable, u) == 0))


# A trajectory is a list of masks [B, L]: the inner loop steps at each but the last, which is where the path
# leads. With it comes the ratio [B] that weights each step, or None for the realised one.

def consistent(s, masked, maskable, t, seeds):
    """Pre-anchor, K - 2 states between, anchor, clean (3.2). Each mask contains the next."""
    n, m = maskable.sum(1), masked.sum(1)
    # 4.4:  t_pre = min(1, max(s_pre t, t)).  Differs: like the published code, the realised ratio rho = m / n for t,
    # and whole masks, floor(n rho_pre) = min(n, floor(s_pre m)), here without a division that could lose one.
    extra = torch.minimum((s.pre_scale * m.double() + 1e-9).floor().long(), n) - m
    free = maskable & ~masked
    rank = order(free, uniform(seeds, "pre-anchor", masked.shape[1]))
    masks = []
    for steps_left in range(s.inner_steps - 1, 0, -1):
        masks.append(masked | free & (rank < extra[:, None]))
        extra = extra - -(-extra // steps_left)  # reveal ceil(what is left / steps left)
    return masks + [masked, torch.zeros_like(masked)], None


def pre_only(s, masked, maskable, t, seeds):
    masks, ratio = consistent(s, masked, maskable, t, seeds)
    return masks[:-1], ratio


def anchor_only(s, masked, maskable, t, seeds):
    return [masked, torch.zeros_like(masked)], [t]  # weighted by the drawn t, as in the published code


def inconsistent(s, masked, maskable, t, seeds):
    """Masks that have nothing to do with the anchor (4.6): from 80 % down to anchor_ratio (20 %) in K steps. Weighted by
    the nominal ratio, as in the published code. Differs: at least one mask each, so that short prompts adapt."""
    ratios = torch.linspace(0.8, s.anchor_ratio, s.inner_steps)
    masks = [at_least_one(maskable, uniform(seeds, f"inconsistent {k}", masked.shape[1]), r) for k, r in enumerate(ratios)]
    return masks + [torch.zeros_like(masked)], [r.expand(len(masked)) for r in ratios]


def cover(s, masked, maskable, t, seeds):
    """K disjoint masks that together cover every maskable token. Differs: not in the paper, whose two masks
    leave about 70 % of a prompt without a loss."""
    parts = int(s.trajectory.partition(":")[2])
    rank, n = order(maskable, uniform(seeds, "cover", masked.shape[1])), maskable.sum(1, keepdim=True).clamp(min=1)
    masks = [maskable & (rank * parts // n == k) for k in range(parts)]
    return masks + [torch.zeros_like(masked)], None


TRAJECTORIES = {f.__name__: f for f in (consistent, pre_only, anchor_only, inconsistent, cover)}


def stages(s, x0, masked, maskable, t, seeds, mask_id, weighted):
    """The inner loop's stages. `weighted`: divide each sample's loss by its mask ratio (training), or not."""
    masks, ratios = TRAJECTORIES[s.trajectory.partition(":")[0]](s, masked, maskable, t, seeds)
    inputs = [torch.where(mask, mask_id, x0) for mask in masks]
    # Differs: Eq. 7-8 are plain sums. The published code weights a training sample by 1 / (rho + 1e-6) with
    # the realised ratio rho of the stage's input, and leaves prompts unweighted. So do we.
    ratios = ratios or [mask.sum(1) / maskable.sum(1).clamp(min=1) for mask in masks]
    path = []
    for mask, ratio, after, x, next_x in zip(masks, ratios, masks[1:], inputs, inputs[1:]):
        # Differs: Eq. 7 predicts x_t, that is the tokens revealed on the way to x_t. The paper's own default
        # (4.6) is the clean token at every mask, and so is ours; `anchor_tokens` is Eq. 7 to the letter.
        targets = mask & ~after if s.stage1_target == "anchor_tokens" else mask
        weight = 1 / (ratio + 1e-6) if weighted else torch.ones(len(x0))
        path.append(Stage(x, targets, weight, next_x))
    return path


# ---- 4. Losses ----------------------------------------------------------------------------------------

def scatter(values, where):
    """Per-row values [N] back to their places [B, L], zero elsewhere, so that sums read as in the paper."""
    out = torch.zeros(where.shape, dtype=values.dtype, device=values.device)
    out[where] = values
    return out


LOGITS = 1 << 26  # entries of the largest tensor of logits that is held at once: 256 MB in float32


class Rows(torch.autograd.Function):
    """The losses of some hidden rows, and with them their gradients: a row's needs nothing of what comes later but a
    factor, so it is taken while the row's logits are there. None is kept or computed again."""

    @staticmethod
    def forward(ctx, h, loss, backbone, *rest):
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            losses = loss(backbone, h.view_as(h), *rest)  # [n]; a view, for FLOP counters stumble over leaves
            ctx.save_for_backward(*torch.autograd.grad(losses.sum(), h))
        return losses.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, factor):
        return factor[:, None] * ctx.saved_tensors[0], *[None] * (len(ctx.needs_input_grad) - 1)


def by_rows(loss, backbone, h, *rest):
    """loss(backbone, h, *rest) -> [N], computed for some of the N rows at a time.

    With 157k words the logits of a sequence would be the largest tensor of all. A trained head (the toy's) needs all of them in
    the backward pass: if they are many, they are computed again there.
    """
    trained = backbone.head(h[:0].detach()).requires_grad  # of no rows: only the head's own weights can require it
    size = max(1, (LOGITS if trained or h.is_cuda else LOGITS // 16) // backbone.vocab_size)  # // 16: what a CPU's cache may hold
    parts = list(zip(*(row.split(size) for row in (h, *rest))))
    if trained:
        if len(parts) == 1:
            return loss(backbone, h, *rest)
        losses = [checkpoint(loss, backbone, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    elif h.requires_grad:
        losses = [Rows.apply(part, loss, backbone, *others) for part, *others in parts]
    else:
        losses = [loss(backbone, *part) for part in parts]
    return torch.cat(losses)


def token_nll(backbone, h, x0, where):
    """-log p(x0_i | x) at the positions `where`, zero elsewhere. h [B, L, D] -> [B, L], in nats."""
    # A logit costs V * D multiplications, so only masked rows get one.
    return scatter(by_rows(ce, backbone, h[where], x0[where].to(h.device)), where)


def mdlm_loss(nll, t, maskable):
    """The outer objective of baseline and MemDLM alike. nll [B, L] (zero off the masks), t [B] -> scalar."""
    # Eq. 2 / 9:  L = E[ omega(t) sum_{i in M_t} -log p(x_0^i | x_t) ],  omega(t) = 1 / t
    # Differs: the published code divides by t + 1e-6. Like it we divide the sum by the batch's maskable tokens.
    return (nll.sum(1) / t.to(nll.device)).sum() / maskable.sum().clamp(min=1)


# The inner losses, chosen by name. student: hidden rows [N, D]; target: clean tokens [N]; teacher: the same rows [N, D]
# of the same model with the current phi, without gradient, on the next state. All return [N].

def ce(backbone, student, target):
    return F.cross_entropy(backbone.head(student).float(), target, reduction="none")


def log_probs(backbone, student, teacher):
    with torch.no_grad():
        log_p = backbone.head(teacher).float().log_softmax(-1)
    return log_p, backbone.head(student).float().log_softmax(-1)  # teacher, student: [N, V]


def kl(backbone, student, target, teacher):
    log_p, log_q = log_probs(backbone, student, teacher)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(backbone, student, target, teacher):
    log_p, log_q = log_probs(backbone, student, teacher)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


# Differs: the published code compares the teacher's state after the final norm with the student's before it, so
# that even identical inputs have a loss. Here both are taken before the norm.

def hidden_mse(backbone, student, target, teacher):
    return (student.float() - teacher.float()).square().mean(-1)


def hidden_cosine(backbone, student, target, teacher):
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)


INNER_LOSSES = {f.__name__: f for f in (ce, kl, reverse_kl, hidden_mse, hidden_cosine)}


# ---- 5. Fast weights: plain values, never part of the model -------------------------------------------

def first_layer(num_layers, fraction):
    """Index of the first layer with fast weights: 16 layers and 10 % -> 14, so two layers, really 12.5 %. The last
    layer always has them."""
    return min(int(num_layers * (1 - fraction)), num_layers - 1)


def fresh_phi(backbone, s, seeds):
    """phi_0 for len(seeds) samples: {name: (A, B)}, or {name: (delta,)} for the full-rank variant. Float32."""
    # Differs: the paper says phi_0 = 0. Only B = 0 (the product is zero all the same); A is Kaiming-uniform
    # with a = sqrt(5), that is U(-1/sqrt(in), 1/sqrt(in)), and drawn anew each time. Here from the seed. While
    # B = 0 the gradient of A is 0: the first step moves B alone.
    phi = {}
    for name, matrix in backbone.matrices(first_layer(backbone.num_layers, s.layer_fraction), s.scope).items():
        out, width, device = matrix.out_features, matrix.in_features, matrix.weight.device
        if s.adapter == "full":
            phi[name] = (torch.zeros(len(seeds), out, width, device=device),)
        else:
            A = (2 * uniform(seeds, f"A {name}", s.rank, width) - 1) / math.sqrt(width)
            phi[name] = (A.to(device), torch.zeros(len(seeds), out, s.rank, device=device))
    if not phi:
        raise ValueError("no matrix for fast weights was found in the last layers of this model")
    return phi


def low_rank(x, A, B):
    """B A x. x [..., in], A [G, r, in], B [G, out, r]; with G > 1 the leading dimension of x is G."""
    if len(A) == 1:
        return F.linear(F.linear(x, A[0]), B[0])
    return x @ A.mT @ B.mT  # batched: each sample its own matrices


def full_rank(x, delta):
    return F.linear(x, delta[0]) if len(delta) == 1 else x @ delta.mT


def per_sample(apply, module, x, tensors):
    """apply(x, *tensors) where each sample has its own phi: x is [B, L, in], or an expert's rows, one sample after another."""
    groups = module.groups if x.dim() == 2 else [1] * len(x)
    if len(tensors[0]) != len(groups):
        raise ValueError(f"phi is for {len(tensors[0])} samples, the input has {len(groups)}")
    if x.dim() == 3:
        return apply(x, *tensors)
    parts = zip(x.split(groups), *(w.split(1) for w in tensors))
    return torch.cat([apply(part, *own) for part, *own in parts])


@contextmanager
def fast_weights(backbone, s, phi):
    """Inside `with fast_weights(...)` each target matrix computes W x + (alpha / r) B A x. phi=None: nothing.

    Hooks, so that nothing in the model is replaced, saved or seen by an optimiser, and so that no exception
    can leave a trace. A zero product leaves every output as it is, bit for bit.
    """
    apply, scale = (full_rank, 1.0) if s.adapter == "full" else (low_rank, s.alpha / s.rank)

    def hook(pair):
        def add(module, inputs, out):
            x = inputs[0]
            own = [w.to(x.dtype) for w in pair]  # phi stays float32; the products are in the model's precision
            return out + scale * (apply(x, *own) if len(own[0]) == 1 else per_sample(apply, module, x, own))
        return add

    handles = []
    matrices = backbone.matrices(first_layer(backbone.num_layers, s.layer_fraction), s.scope) if phi else {}
    try:
        for name, pair in (phi or {}).items():
            handles.append(matrices[name].register_forward_hook(hook(pair)))
            matrices[name].fast = pair, scale  # for experts multiplied all at once, whose matrices are never called
        yield
    finally:
        for handle in handles:
            handle.remove()
        for matrix in matrices.values():
            matrix.__dict__.pop("fast", None)


# Clipping: factors [P, G] from the gradient norms [P, G] of P tensors. Differs: the paper speaks of per-parameter
# normalisation; the published code scales each tensor's gradient down to norm 1 where it is longer, never up.
CLIPS = {
    "local": lambda norms, limit: (limit / (norms + 1e-12)).clamp(max=1),
    "global": lambda norms, limit: (limit / (norms.norm(dim=0) + 1e-12)).clamp(max=1).expand_as(norms),
    "none": lambda norms, limit: torch.ones_like(norms),
}


def sgd_step(s, phi, grads, loss):
    """One inner step. loss [G], grads like phi -> new phi and taken [G]: False where it was not finite.

    Differs: the published code checks the loss but not the gradient, and writes its NaN into phi.
    """
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads])  # [P, G]
    taken = loss.isfinite() & norms.isfinite().all(0)
    rate = (-s.inner_lr * CLIPS[s.clip](norms, s.clip_norm)).masked_fill(~taken, 0)  # [P, G]
    moves = iter([(r[:, None, None], g.masked_fill(~taken[:, None, None], 0)) for r, g in zip(rate, grads)])
    # Eq. 6:  phi_k = phi_{k-1} - eta clip(grad L_inner^(k)).  `moves` are in the order of phi's tensors.
    return {name: tuple(torch.addcmul(w.detach(), *next(moves)) for w in pair) for name, pair in phi.items()}, taken


# ---- 6. The inner loop (Eq. 6-8) ----------------------------------------------------------------------

def inner_loop(backbone, s, path, x0, valid, lower, phi):
    """Write the path into phi, one SGD step per stage.

    lower(x): hidden states [B, L, D] of x below the first fast layer, no gradient needed.
    Returns phi_K and a record: "inner" [K] mean loss at the start of each stage, "skipped" number of steps
    that were not finite and so not taken.
    """
    first, losses, skipped = first_layer(backbone.num_layers, s.layer_fraction), [], 0
    for stage in path:
        phi = {name: tuple(w.detach().requires_grad_() for w in pair) for name, pair in phi.items()}
        leaves = [w for pair in phi.values() for w in pair]
        with torch.enable_grad(), fast_weights(backbone, s, phi):
            need = stage.targets if stage.targets.any() else None  # with nothing to learn, a gradient of zero
            h = backbone.blocks(lower(stage.x), valid, first, None, need)
            rows = [h[stage.targets], x0[stage.targets].to(h.device)]
            if s.inner_loss != "ce":  # self-distillation: the teacher sees the next state
                with torch.no_grad():
                    rows.append(backbone.blocks(lower(stage.next_x), valid, first, None, stage.targets)[stage.targets])
            # Eq. 7-8:  L_inner^(k) = sum_{i in M} -log p_{theta, phi_{k-1}}(target_i | x)  (for inner_loss ce), weighted.
            # Differs: and divided by |M|, of the batch where it shares phi, of each sample where it does not.
            rows = by_rows(INNER_LOSSES[s.inner_loss], backbone, *rows)
            count = stage.targets.sum(1).to(h.device)
            loss = stage.weight.to(h.device) * scatter(rows, stage.targets).sum(1)  # [B]
            if len(leaves[0]) == 1:
                loss, count = loss.sum(0, keepdim=True), count.sum(0, keepdim=True)
            loss = loss / count.clamp(min=1)  # [G]
            grads = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
        if all(g is None for g in grads):
            raise RuntimeError("no fast weight took part in the forward pass: the model does not call its matrices")
        grads = [torch.zeros_like(w) if g is None else g for w, g in zip(leaves, grads)]  # None: an idle expert
        phi, taken = sgd_step(s, phi, grads, loss.detach())
        losses.append(loss.detach().mean())
        skipped = skipped + (~taken).sum()
    return phi, {"inner": torch.stack(losses), "skipped": skipped}


# ---- 7. Training: the MDLM step and the MemDLM step side by side ----------------------------------------

def below(backbone, s, x, valid):
    """Embedding and the layers that fast weights do not touch. [B, L] -> [B, L, D]."""
    return backbone.blocks(backbone.embed(x), valid, 0, first_layer(backbone.num_layers, s.layer_fraction))


def above(backbone, s, h, valid, phi, need=None):
    """The remaining layers, under phi; of the result only the rows `need` [B, L] may be read (None: all)."""
    with fast_weights(backbone, s, phi):
        return backbone.blocks(h, valid, first_layer(backbone.num_layers, s.layer_fraction), None, need)


class MemDLM(nn.Module):
    """loss, record = memdlm(batch); loss.backward(); optimizer.step(). That is one training step, all of it."""

    def __init__(self, backbone, settings):
        super().__init__()
        self.backbone, self.s = backbone, settings

    def forward(self, batch, report=False):
        """One step of the paper's algorithm. Returns the outer loss and a record of numbers (detached).

        The record: loss and ce (mean nats per masked token) as trained, that is with memory if there is one; masked, the
        number of masked tokens; inner and skipped of the inner loop; with report=True also loss_without and ce_without, the same masks
        seen by theta alone. Differs: the published code reports only the loss with memory, in training and in
        evaluation, but phi has seen the answers at these very positions: it cannot be compared with the
        baseline's. loss_without can.
        """
        u = uniform(batch.seeds, "t", 1)[:, 0]
        t = self.s.min_t + (1 - self.s.min_t) * u  # t ~ U(min_t, 1)
        u = uniform(batch.seeds, "anchor", batch.x0.shape[1])
        xt, masked = corrupt(batch.x0, batch.maskable, t, u, self.backbone.mask_id)
        step = self.memdlm_step if self.s.memory else self.mdlm_step
        nll, record, h = step(batch, t, xt, masked)
        loss = mdlm_loss(nll, t, batch.maskable)
        record |= {"loss": loss.detach(), "ce": nll.detach().sum() / masked.sum().clamp(min=1), "masked": masked.sum()}
        if report and self.s.memory:
            with torch.no_grad():
                nll = token_nll(self.backbone, above(self.backbone, self.s, h, batch.valid, None, masked), batch.x0, masked)
            record |= {"loss_without": mdlm_loss(nll, t, batch.maskable),
                       "ce_without": nll.sum() / masked.sum().clamp(min=1)}
        return loss, record

    def mdlm_step(self, batch, t, xt, masked):
        """Baseline. Eq. 2: predict x0 from the anchor."""
        h = below(self.backbone, self.s, xt, batch.valid)
        top = above(self.backbone, self.s, h, batch.valid, None, masked)
        return token_nll(self.backbone, top, batch.x0, masked), {}, h

    def memdlm_step(self, batch, t, xt, masked):
        """MemDLM. Eq. 9: the same, given phi_K. First order (Eq. 10): phi_K is a constant by now.

        Differs: in the published code phi still requires gradients here; they are computed for nothing and enter the
        norm by which the gradient of theta is clipped.
        """
        h = below(self.backbone, self.s, xt, batch.valid)
        phi, record = WRITE_FROM[self.s.memory_from](self.backbone, self.s, batch, t, xt, masked, h.detach())
        top = above(self.backbone, self.s, h, batch.valid, phi, masked)
        return token_nll(self.backbone, top, batch.x0, masked), record, h


def write_from_response(backbone, s, batch, t, xt, masked, h):
    """The paper's training: the inner loop sees the anchor and the answers of the outer loss."""
    def lower(x):
        # Stage 2 and the outer pass read the same anchor: computed once, used twice. (A pre-anchor that could add no
        # mask is the anchor too.)
        if torch.equal(x, xt):
            return h
        with torch.no_grad():
            return below(backbone, s, x, batch.valid)

    path = stages(s, batch.x0, masked, batch.maskable, t, batch.seeds, backbone.mask_id, weighted=True)
    # Differs: 3.1 says "a specific batch", 3.3 "per-sample"; the published code shares one phi in the
    # micro-batch, and so does ours by default; each process has its own. A shared phi writes about 1/B as much
    # into each sample.
    phi = fresh_phi(backbone, s, batch.seeds if s.per_sample else batch.seeds[:1])
    return inner_loop(backbone, s, path, batch.x0, batch.valid, lower, phi)


def write_from_prompt(backbone, s, batch, t, xt, masked, h):
    """Extension: the inner loop that runs at inference, so that theta learns to read a prompt from phi."""
    return adapt(backbone, s, batch.prompt, batch.prompt_valid, batch.seeds)


WRITE_FROM = {"response": write_from_response, "prompt": write_from_prompt}


# ---- 8. Adapting to a prompt (4.5) --------------------------------------------------------------------

@contextmanager
def eval_mode(backbone):
    """Every module in eval mode, and afterwards each in the mode it was in, whatever happens between."""
    modes = [(module, module.training) for module in backbone.modules()]
    try:
        backbone.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def adapt(backbone, s, prompt, valid, seeds):
    """Run the inner loop on prompts; every token may be masked. One phi per prompt, whatever the batch.

    prompt [B, P] tokens padded on the right, valid [B, P] bool, seeds: B entries. Returns phi, record.
    Differs: the published code masks with unseeded noise, may mask nothing in a short prompt (then nothing is
    adapted, silently), and leaves dropout on. Here at least one token is masked, and the model is in eval mode.
    """
    u = uniform(seeds, "prompt anchor", prompt.shape[1])
    masked = at_least_one(valid, u, s.anchor_ratio)
    path = stages(s, prompt, masked, valid, torch.full((len(prompt),), s.anchor_ratio), seeds, backbone.mask_id,
                  weighted=False)

    def lower(x):
        with torch.no_grad():
            return below(backbone, s, x, valid)

    with eval_mode(backbone):
        return inner_loop(backbone, s, path, prompt, valid, lower, fresh_phi(backbone, s, seeds))


# ---- 9. Decoding --------------------------------------------------------------------------------------

def quota(n, steps, k):
    """How many of n tokens to commit at step k of `steps`: even, the first n % steps steps take one more."""
    return n // steps + (n % steps > k)


def choose(backbone, h, blind=None, cfg_scale=0.0, temperature=0.0, noise=None):
    """A token for each hidden row, and its probability: h [N, D] -> [N], [N], on the CPU. Never the mask token.

    blind [N, D]: rows of the model that did not see what was given, for classifier-free guidance. noise [N, V] in [0, 1).
    """
    size, tokens, probabilities = max(1, LOGITS // backbone.vocab_size), [], []
    for i in range(0, len(h), size):
        logits = backbone.head(h[i:i + size]).float()
        if blind is not None:
            unguided = backbone.head(blind[i:i + size]).float()
            logits = unguided + (cfg_scale + 1) * (logits - unguided)
        logits[:, backbone.mask_id] = -math.inf
        best = logits
        if temperature > 0:  # argmax(logits / T + Gumbel) is a sample of softmax(logits / T)
            gumbel = -(-noise[i:i + size].to(h.device).clamp(min=1e-300).log()).log()
            best = logits + temperature * gumbel
        tokens.append(best.argmax(-1))
        # p = 1 / (1 + sum_{v not the token} exp(logit_v - logit_token)), the last step in float64: near 1 less than 1e-7 decides.
        token = tokens[-1][:, None]
        others = (logits - logits.gather(1, token)).exp().scatter(1, token, 0.0).sum(-1)
        probabilities.append(1 / (1 + others.double()))
    return torch.cat(tokens).cpu(), torch.cat(probabilities).cpu()


def gumbel_noise(backbone, seeds, tag, where):
    """Uniform numbers [N, V] for `choose`; float64, for the largest of 157k must not be rounded."""
    return torch.cat([uniform([seed], f"gumbel {tag}", int(n), backbone.vocab_size, dtype=torch.float64)[0]
                      for seed, n in zip(seeds, where.sum(1))])


@torch.no_grad()
def denoise(backbone, s, x, fill, valid, seeds, phi=None, steps=None, block_length=None, temperature=0.0,
            cfg_scale=0.0, remasking="low_confidence"):
    """Fill in the positions `fill` of x, most confident first. Yields the canvas [B, L] after each step.

    x, fill, valid [B, L]; rows may have different lengths and numbers of open positions. phi: one per row, written
    with the same settings s. block_length: open positions are decoded in blocks of that many, left to right
    (semi-autoregressive); None: one block. steps: about this many forward passes, shared evenly by the blocks (at least
    one each, a remainder is dropped, guidance doubles them); None: one token at a time.
    temperature: 0 takes the best token, otherwise Gumbel noise samples from softmax(logits / temperature).
    remasking: "low_confidence" commits where the chosen token is most probable, "random" anywhere.
    Low-confidence remasking is LLaDA's: what is not committed is masked again for the next step.
    """
    x, open_, given = torch.where(fill, backbone.mask_id, x), fill.clone(), valid & ~fill
    longest = max(1, int(fill.sum(1).max()))
    block_length = min(block_length or longest, longest)
    blocks = -(-longest // block_length)
    per_block = max(1, steps // blocks) if steps else block_length
    number = torch.where(fill, fill.cumsum(1) - 1, -1)  # [B, L] 0, 1, 2, ... over the open positions of a row
    for block in range(blocks):
        window = (number // block_length == block) & fill
        size = window.sum(1)
        for k in range(per_block):
            take, where = quota(size, per_block, k), window & open_
            if not take.any():
                continue
            tag = f"{block} {k}"
            h = above(backbone, s, below(backbone, s, x, valid), valid, phi, where)[where]
            blind, noise = None, None
            if cfg_scale:  # classifier-free guidance: away from what the model says without what was given
                unseen = below(backbone, s, torch.where(given, backbone.mask_id, x), valid)
                blind = above(backbone, s, unseen, valid, phi, where)[where]
            if temperature > 0:
                noise = gumbel_noise(backbone, seeds, tag, where)
            tokens, confidence = choose(backbone, h, blind, cfg_scale, temperature, noise)
            if remasking == "random":
                confidence = uniform(seeds, f"remask {tag}", x.shape[1])[where].double()
            best = order(where, -scatter(confidence, where))  # 0 = most confident open position of the row
            commit = where & (best < take[:, None])
            x = torch.where(commit, scatter(tokens, where), x)
            open_ = open_ & ~commit
            yield x


# ---- 10. Exposure bias (Eq. 3-4) ----------------------------------------------------------------------

@torch.no_grad()
def response_nll(backbone, s, x0, masked, valid, phi=None, x=None):
    """-log p(x0_i | x) [B, L] at the masked positions; x is x0 with these masks unless given."""
    x = torch.where(masked, backbone.mask_id, x0 if x is None else x)
    return token_nll(backbone, above(backbone, s, below(backbone, s, x, valid), valid, phi, masked), x0, masked).cpu()


@torch.no_grad()
def exposure_bias(backbone, s, x0, maskable, valid, seeds, ratios, phi=None):
    """Losses along the denoising path, each [len(ratios), B] mean nats per masked token.

    static (Eq. 3): a random share `ratio` of the response is masked, the rest is true text.
    sequential (Eq. 4): the response starts fully masked; the model commits its own most confident predictions
    until `ratio` of it is masked, one forward pass per ratio; loss against the truth at what is still masked.
    matched: true text again, masked where the sequential path is. Sequential loss is also higher because the
    model leaves the hard tokens for last; `matched` shares that, so sequential / matched is its errors alone.
    Differs: the paper reports sequential / static only. The static masks are the same for every model.
    """
    n = maskable.sum(1)
    rank = order(maskable, uniform(seeds, "static", x0.shape[1]))
    x, open_, curves = torch.where(maskable, backbone.mask_id, x0), maskable.clone(), []
    for ratio in ratios:  # falling
        keep = torch.maximum((ratio * n.double() + 1e-6).floor().long(), torch.ones_like(n))  # masks left at this ratio
        if (open_.sum(1) > keep).any():
            tokens, confidence = choose(backbone, above(backbone, s, below(backbone, s, x, valid), valid, phi, open_)[open_])
            commit = open_ & (order(open_, -scatter(confidence, open_)) < (open_.sum(1) - keep)[:, None])
            x = torch.where(commit, scatter(tokens, open_), x)
            open_ = open_ & ~commit
        static = maskable & (rank < keep[:, None])
        curves.append([response_nll(backbone, s, x0, where, valid, phi, canvas).sum(1) / where.sum(1).clamp(min=1)
                       for where, canvas in ((static, x0), (open_, x), (open_, x0))])
    static, sequential, matched = (torch.stack(curve) for curve in zip(*curves))
    return {"static": static, "sequential": sequential, "matched": matched}

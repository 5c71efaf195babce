"""A network of any family, with the interface that memdlm.py asks of a backbone."""
from __future__ import annotations

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import memdlm
from backbones.blocks import Context, Past, RMSNorm, TiedHead, linear, rotary
from backbones.families import FAMILIES
from backbones.lora import weights_checksum

LOGITS = 1 << 25  # numbers in the largest tensor of logits at a time: 128 MB in float32


def build_network(config):
    """The module tree of a checkpoint, under the checkpoint's own names."""
    family, root = FAMILIES[config.family], nn.Module()
    embedding = nn.Embedding(config.vocab_size, config.width)
    parts = {family.embed: embedding,
             family.layers: nn.ModuleList(family.block(config, i) for i in range(config.layers)),
             family.norm: RMSNorm(config.width, config.eps),
             family.head: (TiedHead(embedding) if config.tied
                           else linear(config.width, config.vocab_size))}
    for path, module in parts.items():
        *outer, name = path.split(".")
        place = root
        for part in outer:
            if not hasattr(place, part):
                setattr(place, part, nn.Module())
            place = getattr(place, part)
        setattr(place, name, module)
    return root


def causal_layers(attention, layers):
    """How many layers, the lowest, look left only: "causal:20" 20, "causal" all, others none."""
    kind, _, number = attention.partition(":")
    if kind != "causal":
        return 0
    if int(number or layers) > layers:
        raise ValueError(f"--attention {attention}: the model has {layers} layers")
    return int(number or layers)


def shift_right(h):
    """The hidden states that tell the logits of each token where those of token i come from i - 1.

    The first token has none before it and keeps its own. h [B, L, D].
    """
    return torch.cat([h[:, :1], h[:, :-1]], dim=1)


def shift_left(need):
    """Where hidden states are read if they will be shifted right. need [B, L] bool.

        need      1 0 0 1 1      token 0 reads its own
        read      1 0 1 1 0      tokens 3 and 4 read those of 2 and 3
    """
    read = torch.cat([need[:, 1:], torch.zeros_like(need[:, :1])], dim=1)
    read[:, 0] |= need[:, 0]
    return read


def in_response(valid, h):
    """Where the response stands, [B, L] bool: what --attention causal-prompt lets look both ways.

    `data.collate` leaves word of it on `valid`.
    """
    start = getattr(valid, "response_at", None)
    if start is None:
        raise ValueError("--attention causal-prompt has to know where the response begins, and "
                         "nothing says so here; choose another --attention")
    place = torch.arange(h.shape[1], device=h.device)
    return place >= memdlm.to_device(start[:, None], h)


class Backbone(nn.Module):
    """A network with the interface `Backbone` of memdlm.py."""
    keeps_past = True  # `blocks` takes keys and values of an earlier pass

    def __init__(self, network, config, tokenizer=None, attention="full", checkpointing=False,
                 name=""):
        super().__init__()
        self.network, self.config, self.tokenizer, self.name = network, config, tokenizer, name
        self.attention, self.checkpointing = attention, checkpointing
        self.family = FAMILIES[config.family]
        self.title, self.decoder = self.family.title, self.family.decoder
        self.num_layers, self.vocab_size = config.layers, config.vocab_size
        self.mask_id, self.lora_config = config.mask_id, None
        self.block_length = config.block_length or self.family.block_length
        self.causal_layers = causal_layers(attention, config.layers)

    @property
    def core(self):
        """The network inside PEFT's wrapper, if there is one."""
        wrapped = hasattr(self.network, "peft_config")
        return self.network.get_base_model() if wrapped else self.network

    @property
    def has_lora(self):
        return self.lora_config is not None

    @property
    def stop_ids(self):
        """Tokens that end a reply."""
        return self.tokenizer.stop_ids if self.tokenizer else [*self.config.eos_ids]

    def weights_checksum(self):
        vectors = [p for p in self.core.parameters() if p.dim() == 1]
        return weights_checksum(self.part("embed").weight, vectors)

    def part(self, name):
        """The module that the family calls embed, layers, norm or head."""
        return self.core.get_submodule(getattr(self.family, name))

    def embed(self, ids):
        table = self.part("embed")
        return table(memdlm.to_device(ids, table.weight))  # [B, L, D]

    def blocks(self, h, valid, start, stop, need=None, past=None):
        """Run layers start..stop-1 on h [B, L, D]; only positions `need` [B, L] will be read.

        past: keys and values of what stands before h, for block diffusion; or around it, for a
        block cache.
        """
        where = (past or Past(h.shape[1])).positions(h.shape[1], h.device)
        precision = torch.float32 if self.family.rotary_in_float32 else h.dtype
        c = self.config
        cos, sin = rotary(where, c.rotary_dim, c.rope_theta, precision, c.rope_scaling)
        context = Context(cos, sin, None, past, None, {})
        shift = self.config.shift and stop is None
        if shift and need is not None:
            need = shift_left(need)
        # Fast weights act from `stop` on. What is recomputed in the backward pass must not need
        # them.
        recompute = self.checkpointing and stop is not None and torch.is_grad_enabled()
        rows = rows_needed(need, h)
        for layer in self.part("layers")[start:stop]:
            if layer.layer in (start, self.causal_layers):  # where the mask is another
                looks_left = layer.layer < self.causal_layers
                context = context._replace(mask=self.mask(valid, h, past, looks_left))
            if layer.layer == self.num_layers - 1:
                context = context._replace(need=rows)
            h = (checkpoint(layer, h, context, use_reentrant=False) if recompute
                 else layer(h, context))
        return shift_right(h) if shift else h

    def mask(self, valid, h, past, looks_left=False):
        """Where a query may look: not at padding and, if block-causal, not beyond its own block.

        looks_left: nor at what follows it, in the layers that stay as they were trained. With
        causal-prompt the tokens of the prompt do so in all layers:

            prompt      a b      a sees a;  b sees a b
            response    c d      c and d see a b c d
        """
        mask = None
        if valid is not None and not valid.all():
            mask = memdlm.to_device(valid[:, None, None, :], h)  # [B, 1, 1, L]
        if self.attention == "block" or (past is not None and self.block_length):
            size, before = self.block_length, past.length if past else 0
            # If all queries are in the last block they see everything.
            if (before + h.shape[1] - 1) // size != before // size:
                block = torch.arange(before + h.shape[1], device=h.device) // size
                causal = block[before:, None] >= block  # [L, before + L]
                mask = causal if mask is None else mask & causal
        if looks_left or self.attention == "causal-prompt":
            past = past or Past(h.shape[1])
            place = past.positions(h.shape[1], h.device)  # [L], or [B, 1, L]
            left = place[..., None] >= torch.arange(past.end(h.shape[1]), device=h.device)
            if not looks_left:
                left = left | in_response(valid, h)[:, None, :, None]  # [B, 1, L, L]
            mask = left if mask is None else mask & left
        return mask

    def head(self, h):
        return self.part("head")(self.part("norm")(h))

    def per_row(self, f, h, *rest):
        """f(head, h, *rest) for some rows at a time, so that the logits [N, V] are never whole.

        With 157k words they would be the largest tensor of all. A head that is trained itself
        needs them in the backward pass: there they are computed again.
        """
        # Of no rows, only the head's own weights can require a gradient.
        trained = torch.is_grad_enabled() and self.head(h[:0].detach()).requires_grad
        # An eighth may stay in a CPU's cache.
        size = LOGITS if trained or h.is_cuda else LOGITS // 8
        pieces = h.split(max(1, size // self.vocab_size))
        others = [[None] * len(pieces) if x is None else x.split(len(pieces[0])) for x in rest]
        parts = list(zip(pieces, *others))
        if trained and len(parts) > 1:
            out = [checkpoint(f, self.head, *part, use_reentrant=False, preserve_rng_state=False)
                   for part in parts]
        elif h.requires_grad and not trained:
            out = [RowGradients.apply(part[0], f, self.head, *part[1:]) for part in parts]
        else:
            out = [f(self.head, *part) for part in parts]
        if torch.is_tensor(out[0]):
            return torch.cat(out)
        return tuple(torch.cat(piece) for piece in zip(*out))

    def matrices(self, first, scope):
        """{name: linear layer or its adapter} of layers first, first + 1, ... for fast weights."""
        layers, found = self.part("layers"), {}
        for i in range(first, self.num_layers):
            for name, matrix in layers[i].matrices(scope).items():
                found[f"{self.family.layers}.{i}.{name}"] = matrix
        return found


def rows_needed(need, h):
    """A mask [B, L] on the CPU -> the rows [B, M] of h as [B * L, D] that are read, or None: all.

    M is the most that a sample needs. A sample that needs fewer gets some others of its positions,
    which nobody will read.
    """
    if need is None or need.all() or (torch.is_grad_enabled() and not need.any()):
        return None  # with gradients, all weights must take part
    first = need.byte().argsort(dim=1, descending=True, stable=True)[:, :int(need.sum(1).max())]
    return memdlm.to_device(first + need.shape[1] * torch.arange(len(need))[:, None], h)


class RowGradients(torch.autograd.Function):
    """Losses of rows, whose gradients are taken at once instead of in the backward pass.

    A row's loss depends on that row alone, and later passes only multiply it by a factor. So its
    gradient [D] can be computed while its logits [V] exist, and the logits are never kept.
    """

    @staticmethod
    def forward(ctx, h, f, head, *rest):
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            losses = f(head, h.view_as(h), *rest)  # [n]. A view: FLOP counters stumble over leaves
            ctx.save_for_backward(*torch.autograd.grad(losses.sum(), h))
        return losses.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, factor):
        return factor[:, None] * ctx.saved_tensors[0], *[None] * (len(ctx.needs_input_grad) - 1)

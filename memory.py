"""The memory of a prompt: writing it into phi, and measuring what phi then holds.

`generate.py --adapt` writes with `write_memory`. `generate.py --inspect` shows what
`inspect_memory` measures:

    norms      how far phi moves each matrix, and how much of the prompt is lost without it
    losses     of each token of the prompt, before it was written and after
    times      how many inner steps had a loss at this token
"""
from __future__ import annotations

import sys
from dataclasses import replace
from typing import NamedTuple

import torch

import memdlm

# ---- Writing ------------------------------------------------------------------------------------

def write_memory(s, backbone, batch):
    """Write each prompt of a batch into a phi of its own.

    What is random about it follows from the prompt's tokens. So the same prompt gives the same
    memory, whatever the seed and whatever else is in the batch.
    """
    phi, record = memdlm.adapt(backbone, s, batch.prompt, batch.prompt_valid, prompt_seeds(batch))
    if record["skipped"]:
        print(f"warning: {int(record['skipped'])} inner steps were not finite and were left out",
              file=sys.stderr)
    return phi


def prompt_seeds(batch):
    """A seed for each prompt, which its tokens decide."""
    return [" ".join(map(str, ids[valid].tolist()))
            for ids, valid in zip(batch.prompt, batch.prompt_valid)]


# ---- What phi holds -----------------------------------------------------------------------------

class Inspection(NamedTuple):
    """What the phi of each prompt of a batch holds. B prompts of up to P tokens."""
    norms: dict           # {name of a matrix: [B], or [B, E] of a stack of E experts}
    losses_without: dict  # {name: [B]}, the mean loss of the prompt without this part of phi
    before: torch.Tensor  # [B, P] loss of each token of the prompt without phi, 0 on padding
    after: torch.Tensor   # [B, P] the same with phi
    times: torch.Tensor   # [B, P] how many inner steps had a loss at this token


def inspect_memory(s, backbone, batch, phi):
    """Measure what the phi of a batch's prompts holds. ValueError if nothing was written.

    Costs four forward passes over the prompts for each matrix that phi acts on, and eight more.
    """
    norms = update_norms(s, phi)
    moved = torch.stack([norm.reshape(len(norm), -1).sum(1) for norm in norms.values()])
    if not (moved.sum(0) > 0).all():
        raise ValueError("nothing was written into phi, so there is nothing to inspect: its steps "
                         "have size 0, or were left out since they were not finite; look at "
                         "--inner-lr, --alpha and --anchor-ratio")
    without = {}
    for name in phi:
        rest = {other: pair for other, pair in phi.items() if other != name}
        without[name] = torch.tensor(prompt_loss(s, backbone, batch, rest))
    times = torch.stack(targets_of_writing(s, backbone, batch)).sum(0)
    return Inspection(norms, without, token_losses(s, backbone, batch, None),
                      token_losses(s, backbone, batch, phi), times)


def update_norms(s, phi):
    """The Frobenius norm of what phi adds to each matrix: |(alpha / r) B A|, or |delta|.

    phi: of memdlm.adapt. Returns {name: [G]}, or [G, E] for a stack of E experts. B A [out, in] is
    never made: |B A|^2 is the sum over the entries of (B^T B) * (A A^T), both [r, r].
    """
    norms = {}
    for name, pair in phi.items():
        if len(pair) == 1:
            norms[name] = pair[0].double().norm(dim=(-2, -1)).cpu()
        else:
            A, B = (w.double() for w in pair)
            square = ((B.mT @ B) * (A @ A.mT)).sum((-2, -1)).clamp(min=0)
            norms[name] = (s.alpha / s.rank * square.sqrt()).cpu()
    return norms


def token_losses(s, backbone, batch, phi):
    """-log p of each token of the prompts under phi, [B, P] in nats, 0 on padding.

    Every token is masked once, in one of four parts of its prompt. For a run whose inner loop is
    cover:4 these are the masks that phi is written with.
    """
    prompt, valid, seeds = batch.prompt, batch.prompt_valid, prompt_seeds(batch)
    parts, _ = memdlm.cover(replace(s, trajectory="cover:4"), valid, valid, None, seeds)
    return sum(memdlm.response_nll(backbone, s, prompt, part, valid, phi)
               for part in parts if part.any())


def prompt_loss(s, backbone, batch, phi):
    """The mean of `token_losses` over the tokens of each prompt."""
    losses = token_losses(s, backbone, batch, phi)
    return (losses.sum(1) / batch.prompt_valid.sum(1)).tolist()


def targets_of_writing(s, backbone, batch):
    """Where each inner step of `write_memory` has its loss: a list of [B, P] bool.

    They are drawn once more.
    """
    path = memdlm.prompt_stages(backbone, s, batch.prompt, batch.prompt_valid, prompt_seeds(batch))
    return [stage.targets for stage in path]

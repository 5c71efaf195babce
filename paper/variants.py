"""Ways to train that no setting names: they take one thing out of memory and keep the rest.

MemDLM's outer step differs from MDLM's in phi alone. phi changes two things in the gradient of
theta: the error at the logits, and the path by which it goes down to theta. Each class here is a
MemDLM with one of these, or with a phi that does not hold what it should. `tune` trains them, and
can also give a run the pace of another.
"""
from __future__ import annotations

import torch

import memdlm
from files import read_json
from memdlm import MemDLM
from runs import save_checkpoint
from train import (
    Processes, check_finite, compute_gradients, learning_rate, make_batches, prepare, step_seeds,
)


# ---- Another phi --------------------------------------------------------------------------------

class ReplacedPhi(MemDLM):
    """The inner loop writes phi as usual. The outer step is given `replaced_phi` of it."""

    def memdlm_step(self, batch, t, xt, masked):
        h = memdlm.lower_layers(self.backbone, self.s, xt, batch.valid)
        phi, record = self.write(batch, t, xt, masked, h)
        phi = self.replaced_phi(phi, batch)
        top = memdlm.upper_layers(self.backbone, self.s, h, batch.valid, phi, masked)
        return memdlm.token_nll(self.backbone, top, batch.x0, masked), record, h

    def write(self, batch, t, xt, masked, h):
        return memdlm.write_from_response(self.backbone, self.s, batch, t, xt, masked, h)

    def replaced_phi(self, phi, batch):
        return phi


class NoisePhi(ReplacedPhi):
    """Noise in place of phi. Its change B A has the norm of phi's, by matrix and sample."""

    def replaced_phi(self, phi, batch):
        out = {}
        for name, (A, B) in phi.items():
            u = memdlm.uniform(batch.seeds, f"noise {name}", *B.shape[1:])
            noise = 2 * u - 1
            size, other = ((b @ A).norm(dim=(1, 2), keepdim=True) for b in (B, noise))
            out[name] = A, noise * size / other
        return out


class AnothersPhi(ReplacedPhi):
    """Each sample is given the phi of its neighbour in the batch."""

    def replaced_phi(self, phi, batch):
        return {name: tuple(w.roll(1, 0) for w in pair) for name, pair in phi.items()}


class ShuffledTargets(ReplacedPhi):
    """The inner loop predicts the sample's own answers at wrong places. It reads the right text."""

    def write(self, batch, t, xt, masked, h):
        s, backbone = self.s, self.backbone

        def lower(states):
            return [h if torch.equal(x, xt) else memdlm.lower_layers(backbone, s, x, batch.valid)
                    for x in states]
        path = memdlm.stages(s, batch.x0, masked, batch.maskable, t, batch.seeds, backbone.mask_id)
        phi = memdlm.fresh_phi(backbone, s, batch.seeds)
        return memdlm.inner_loop(backbone, s, path, shuffle(batch), batch.valid, lower, phi)


def shuffle(batch):
    """x0 with each sample's response in a random order. [B, L]"""
    x0, u = batch.x0.clone(), memdlm.uniform(batch.seeds, "shuffle", batch.x0.shape[1])
    for tokens, where, keys in zip(x0, batch.maskable, u):
        tokens[where] = tokens[where][keys[where].argsort()]
    return x0


# ---- A part of what phi does to the gradient ----------------------------------------------------

class TwoPasses(MemDLM):
    """phi as usual, then the outer pass without it and with it. `combine` says what is learned."""

    def memdlm_step(self, batch, t, xt, masked):
        s, backbone = self.s, self.backbone
        h = memdlm.lower_layers(backbone, s, xt, batch.valid)
        phi, record = memdlm.write_from_response(backbone, s, batch, t, xt, masked, h)
        rows = [memdlm.rows_at(memdlm.upper_layers(backbone, s, h, batch.valid, p, masked), masked)
                for p in (None, phi)]
        loss = backbone.per_row(self.combine, *rows, batch.x0[masked])  # [N]
        return memdlm.to_positions(loss, masked), record, h

    @staticmethod
    def combine(head, plain, given_phi, target):
        """Hidden states [N, D] without phi and with it -> one number to minimise for each, [N]."""
        raise NotImplementedError


def logit_error(head, h, target):
    """What the cross-entropy sends down from the logits: p - onehot(target), a constant. [N, V]"""
    with torch.no_grad():
        p = head(h).float().softmax(-1)
        return p.scatter_add(1, target[:, None], torch.full_like(p[:, :1], -1.0))


class ErrorOfPhi(TwoPasses):
    """The error that is left when phi has explained what it can, sent down without phi."""
    @staticmethod
    def combine(head, plain, given_phi, target):
        return (logit_error(head, given_phi, target) * head(plain).float()).sum(-1)


class PathOfPhi(TwoPasses):
    """The plain model's error, sent down through the layers as phi has changed them."""
    @staticmethod
    def combine(head, plain, given_phi, target):
        return (logit_error(head, plain, target) * head(given_phi).float()).sum(-1)


class WeightsOfPhi(TwoPasses):
    """Plain MDLM whose tokens weigh less by as much as phi has explained of them."""
    @staticmethod
    def combine(head, plain, given_phi, target):
        nll = memdlm.ce(head, plain, target)
        with torch.no_grad():
            left = 1 - (-memdlm.ce(head, given_phi, target)).exp()
            weight = left / (1 - (-nll).exp()).clamp(min=1e-3)
        return weight * nll


class NoEnds(MemDLM):
    """All weights are tuned but the embedding, the last norm and the head, as under a LoRA."""


# name of a variant -> its class
VARIANTS = {
    "plain": MemDLM,
    "noise": NoisePhi,
    "another": AnothersPhi,
    "shuffled": ShuffledTargets,
    "error": ErrorOfPhi,
    "path": PathOfPhi,
    "weights": WeightsOfPhi,
    "no ends": NoEnds,
}


# ---- Training them ------------------------------------------------------------------------------

AT_THE_PACE_OF = " at the pace of "


def tune(s, folder, variant):
    """Train one variant, and write its checkpoint. Returns measures: its updates' norms.

    variant: a name above, or "NAME at the pace of RUN". RUN is a run of the same seed, beside this
    one. Every update has then the direction of this run and the norm of that one's.
    """
    name, _, leader = variant.partition(AT_THE_PACE_OF)
    pace = read_json(folder.parent / leader / "measures.json")["moves"] if leader else None
    s, data, model, optimizer, _ = prepare(s, folder, False, Processes())
    model, moves = VARIANTS[name](model.backbone, s), []
    parameters = optimizer.param_groups[0]["params"]
    begun = [p.detach().clone() for p in parameters]
    for step in range(s.steps):
        dropout_seed, _ = step_seeds(s, step, Processes())
        model.train()
        torch.manual_seed(dropout_seed)
        optimizer.zero_grad()
        batches = make_batches(s, data, step, Processes())
        record = compute_gradients(s, model, batches, False, Processes())
        if name == "no ends":
            for part in (model.backbone.embedding, model.backbone.norm, model.backbone.lm_head):
                part.zero_grad()
        norm = torch.nn.utils.clip_grad_norm_(parameters, s.grad_clip)
        check_finite(folder, step, record, norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(s, step)
        before = [p.detach().clone() for p in parameters]
        optimizer.step()
        moves.append(set_length(parameters, before, pace and pace[step]))
    save_checkpoint(folder, model, optimizer, s.steps)
    whole = distance(parameters, begun)
    return {"moves": moves, "moved in all": sum(moves), "moved from the start": whole}


def distance(parameters, before):
    return torch.stack([(p.detach() - b).norm() for p, b in zip(parameters, before)]).norm().item()


@torch.no_grad()
def set_length(parameters, before, length):
    """Give the last update this length, unless it is None. Returns the length that it has."""
    moved = distance(parameters, before)
    if length is None:
        return moved
    for p, b in zip(parameters, before):
        p.copy_(b + (p - b) * (length / max(moved, 1e-30)))
    return length

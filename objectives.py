"""Other outer objectives: what else is said to help against exposure bias, as baselines.

Each is MemDLM with one method changed. Data, masks and initial weights stay those of plain MDLM
with the same seed, so runs can be compared in pairs. Only training changes: a model in eval mode
has the plain loss, at the plain noise levels, whatever it was trained by.

    name    source        what changes                                   cost of a plain step
    mdlm    Eq. 2         nothing                                        1
    papl    2509.23405    tokens that are decoded early count more       1
    own     2602.11590    also learn from what the model itself said     2
    bell    2605.13026    middle noise levels are drawn more often       1
"""
from __future__ import annotations

import math

import torch

from memdlm import (
    MemDLM, lower_layers, pick_tokens, rows_at, to_positions, token_nll, upper_layers,
)

ALPHA, TAU = 1.0, 1.0  # of PAPL: what its authors suggest to begin with


class PlannerWeights(MemDLM):
    """PAPL, planner-aware path learning (2509.23405).

    Decoding fills in the token that the model is surest of. So that token's loss counts more in
    training: 1 + alpha w_i times, where w is what the planner would choose, given the right tokens.
    With three masks whose right tokens have the probabilities .6, .3 and .1:

        w         .6    .3    .1     tau = 1: the probabilities, made to add up to 1
        factor   1.6   1.3   1.1     alpha = 1
    """

    def outer_loss(self, nll, t, batch, masked):
        if self.training:
            # w_i ~ exp(log p(x_0^i | x_t) / tau) over the masks of a sample; it has no gradient.
            # Differs: the source divides a sample's loss by its number of masks. Ours keeps the
            # 1 / t of Eq. 2, so that alpha = 0 is plain MDLM.
            confidence = (-nll.detach() / TAU).masked_fill(~masked.to(nll.device), -math.inf)
            nll = nll * (1 + ALPHA * confidence.softmax(1).nan_to_num())  # no mask: 0 / 0
        return super().outer_loss(nll, t, batch, masked)


class OwnPredictions(MemDLM):
    """Two steps on the model's own predictions: the training of ProSeCo (2602.11590).

        anchor   the cat  _  on the  _      step 1 is the plain one
        guess    the cat sat on the hat     every mask filled with the likeliest token
        step 2   predict the clean text from the guess, at every token of the response

    In decoding the model reads its own guesses, right and wrong. Here it does so in training. The
    guess has no gradient. Both losses have the weight 1 / t.
    """

    def mdlm_step(self, batch, t, xt, masked):
        h = lower_layers(self.backbone, self.s, xt, batch.valid)
        top = upper_layers(self.backbone, self.s, h, batch.valid, None, masked)
        with torch.no_grad():
            guess, _ = pick_tokens(self.backbone, rows_at(top, masked))
        self.guess = torch.where(masked, to_positions(guess, masked), xt)
        return token_nll(self.backbone, top, batch.x0, masked), {}, h

    def outer_loss(self, nll, t, batch, masked):
        if self.training:
            h = lower_layers(self.backbone, self.s, self.guess, batch.valid)
            top = upper_layers(self.backbone, self.s, h, batch.valid, None, batch.maskable)
            nll = nll + token_nll(self.backbone, top, batch.x0, batch.maskable)
        return super().outer_loss(nll, t, batch, masked)


class BellShapedT(MemDLM):
    """Noise levels from a bell: few nearly clean and few nearly empty samples (2605.13026).

    t ~ Beta(2, 2), whose density 6 t (1 - t) is highest at one half. t grows with the u of plain
    MDLM, which has u itself for its t:

        u   0    .1     .3     .5     .7     .9    1
        t   0   .196   .363    .5    .637   .804   1

    Differs: of the source only the abstract could be read here. It says that bell-shaped sampling
    of t makes training faster. Beta(2, 2) is ours, and so is that the weight stays 1 / t. So middle
    levels count more, instead of being drawn more often and counted less.
    """

    def noise_level(self, u):
        if self.training:
            # The inverse of F(t) = 3 t^2 - 2 t^3.
            u = 0.5 - (torch.asin(1 - 2 * u) / 3).sin()
        return super().noise_level(u)


OBJECTIVES = {"mdlm": MemDLM, "papl": PlannerWeights, "own": OwnPredictions, "bell": BellShapedT}

"""The paper's claims as differences between runs, and the verdicts that statistics give. Nothing here is judged by hand."""
from __future__ import annotations

from typing import NamedTuple

# Two-sided 95 % quantile of Student's t, by degrees of freedom; more than 9 count as 9, which errs on the careful side.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
FLAT = 0.02  # "the same" means within this, with 95 % confidence


class Claim(NamedTuple):
    """`text` says that the first (run, measure) is more, less or the same as the second."""
    place: str     # in the paper, or "control": a question that the paper leaves out
    text: str
    first: tuple
    second: tuple
    expect: str    # more, less, same


TUNED, SCRATCH = ("memdlm", "mdlm"), ("scratch memdlm", "scratch mdlm")  # with memory, without


def retrieval_claims():
    for place, where, what in (("Table 1", "in", "at trained lengths"),
                               ("Table 2", "beyond", "at 2 and 4 times the trained length")):
        on, off, base, other = ((TUNED[0], f"{where} adapted"), (TUNED[0], f"{where} alone"),
                                (TUNED[1], f"{where} alone"), (TUNED[0], f"{where} another"))
        yield Claim(place, f"train-only retrieves more than MDLM, {what}", off, base, "more")
        yield Claim(place, f"train & inference retrieves more than train-only, {what}", on, off, "more")
        yield Claim(place, f"train & inference retrieves more than MDLM, {what}", on, base, "more")
        yield Claim("control", "... and more than MDLM with the same adaptation", on, (TUNED[1], f"{where} adapted"), "more")
        yield Claim("control", "... and more than with phi of another prompt", on, other, "more")
        yield Claim("control", "MDLM retrieves more when adapted to its prompt", (TUNED[1], f"{where} adapted"), base, "more")


def exposure_claims():
    for (memory, plain), how in ((SCRATCH, "from scratch"), (TUNED, "tuned")):
        yield Claim("Fig. 3", f"train-only has a lower exposure-bias ratio than MDLM, {how}",
            (memory, "ratio alone"), (plain, "ratio alone"), "less")
        yield Claim("Fig. 3", f"train & inference has a lower ratio than train-only, {how}",
            (memory, "ratio adapted"), (memory, "ratio alone"), "less")
        yield Claim("control", "... at matched positions, train-only against MDLM",
            (memory, "ratio matched alone"), (plain, "ratio matched alone"), "less")
        yield Claim("control", "... with a lower static loss, too", (memory, "static alone"), (plain, "static alone"), "less")
        yield Claim("control", "dividing MDLM's logits by 3 lowers the ratio too, with decoding unchanged",
            (plain, "ratio cooled"), (plain, "ratio alone"), "less")


def training_claims():
    for (memory, plain), how in ((SCRATCH, "from scratch"), (TUNED, "tuned")):
        yield Claim("Fig. 4", f"lower training loss, as published: measured with phi of the answers, {how}",
            (memory, "train"), (plain, "train"), "less")
        yield Claim("Fig. 4", f"lower evaluation loss, as published: with phi of the answers, {how}",
            (memory, "nats answers"), (plain, "nats alone"), "less")
        yield Claim("control", "... without phi, on the training samples", (memory, "train alone"), (plain, "train"), "less")
        yield Claim("control", "... without phi, on held-out samples", (memory, "nats alone"), (plain, "nats alone"), "less")
        yield Claim("control", "... without phi, in the first half of training (converges faster)",
            (memory, "train alone, first half"), (plain, "train alone, first half"), "less")
    yield Claim("4.5", "adapting a MemDLM to its prompt lowers the loss, from scratch",
        (SCRATCH[0], "nats adapted"), (SCRATCH[0], "nats alone"), "less")
    yield Claim("control", "adapting a plain MDLM does so too", (SCRATCH[1], "nats adapted"), (SCRATCH[1], "nats alone"), "less")
    yield Claim("control", "MemDLM adapted is better than MDLM adapted alike",
        (SCRATCH[0], "nats adapted"), (SCRATCH[1], "nats adapted"), "less")
    yield Claim("control", "... and than MDLM given the same compute, adapted alike",
        (SCRATCH[0], "nats adapted"), ("scratch mdlm, same compute", "nats adapted"), "less")
    yield Claim("control", "MDLM gains more from four masks that cover the prompt than from the paper's two",
        (SCRATCH[1], "nats cover"), (SCRATCH[1], "nats adapted"), "less")


def forgetting_claims():
    short = "in alone"
    yield Claim("Fig. 5", "tuning an MDLM costs retrieval that the base had", (TUNED[1], short), ("base", short), "less")
    yield Claim("Fig. 5", "MemDLM, train-only, retrieves more than the base", (TUNED[0], short), ("base", short), "more")
    yield Claim("Fig. 5", "MemDLM, train & inference, retrieves more than the base", (TUNED[0], "in adapted"), ("base", short), "more")
    yield Claim("control", "MDLM keeps more at half the learning rate", ("mdlm, lr x 0.5", short), (TUNED[1], short), "more")
    yield Claim("control", "MemDLM keeps more than MDLM at half the learning rate", (TUNED[0], short), ("mdlm, lr x 0.5", short), "more")
    yield Claim("control", "MemDLM keeps more than MDLM after half the steps", (TUNED[0], short), ("mdlm, half the steps", short), "more")


def lora_claims():
    """The paper's own way to tune: a LoRA on a base whose weights stay."""
    with_memory, without, kept, loss = "lora memdlm", "lora mdlm", "in alone", "nats alone"
    yield Claim("Table 1", "tuned by a LoRA: train-only retrieves more than MDLM, at trained lengths",
                (with_memory, kept), (without, kept), "more")
    yield Claim("Table 2", "tuned by a LoRA: train-only retrieves more than MDLM, beyond",
                (with_memory, "beyond alone"), (without, "beyond alone"), "more")
    yield Claim("Fig. 4", "tuned by a LoRA: a lower loss on held-out samples, without phi", (with_memory, loss), (without, loss), "less")
    for run, text in (("lora mdlm, lr x 0.5", "at half the learning rate"), ("lora mdlm, lr x 2", "at twice the learning rate"),
                      ("lora mdlm, same compute", "given the same compute")):
        yield Claim("control", f"... it retrieves more than MDLM {text}", (with_memory, kept), (run, kept), "more")
        yield Claim("control", f"... its loss is lower than of MDLM {text}", (with_memory, loss), (run, loss), "less")
    yield Claim("Table 1", "tuned by a LoRA: train & inference retrieves more than train-only",
                (with_memory, "in adapted"), (with_memory, kept), "more")
    yield Claim("control", "... than with phi of another prompt", (with_memory, "in adapted"), (with_memory, "in another"), "more")
    yield Claim("Fig. 5", "tuned by a LoRA: train-only retrieves more than the base", (with_memory, kept), ("base", kept), "more")
    half = "lora mdlm, 4 layers, lr x 0.5"
    yield Claim("control", "a base of four layers: it retrieves more than MDLM at half the learning rate",
                ("lora memdlm, 4 layers", kept), (half, kept), "more")
    yield Claim("control", "a base of four layers: its loss is lower than of MDLM at half the learning rate",
                ("lora memdlm, 4 layers", loss), (half, loss), "less")
    for what, text in (("4 layers", "a base of four layers"), ("3 x steps", "a base trained three times as long")):
        first, second = f"{with_memory}, {what}", f"{without}, {what}"
        yield Claim("Table 1", f"{text}, tuned by a LoRA: train-only retrieves more than MDLM", (first, kept), (second, kept), "more")
        yield Claim("Table 2", f"{text}, tuned by a LoRA: and beyond the trained lengths", (first, "beyond alone"), (second, "beyond alone"), "more")
        yield Claim("Fig. 4", f"{text}, tuned by a LoRA: a lower loss on held-out samples, without phi", (first, loss), (second, loss), "less")
        yield Claim("Table 1", f"{text}, tuned by a LoRA: train & inference retrieves more than train-only", (first, "in adapted"), (first, kept), "more")


def ablation_claims():
    best = (TUNED[0], "in adapted")
    for name, text in (("kl", "KL"), ("reverse_kl", "reverse KL"),
                       ("hidden_cosine", "hidden cosine"), ("hidden_mse", "hidden MSE")):
        yield Claim("Fig. 6", f"cross-entropy in the inner loop is better than {text}", best, (name, "in adapted"), "more")
    for name, text in (("all layers", "all layers"), ("ffn+attn", "FFN and attention"), ("full rank", "a full-rank delta")):
        yield Claim("Fig. 7", f"the last layer's FFN is better than {text}", best, (name, "in adapted"), "more")
    yield Claim("Fig. 7", "a full-rank delta reaches a lower training loss", ("full rank", "train"), (TUNED[0], "train"), "less")
    for name, text in (("clip global", "global clipping"), ("clip 0.5", "a threshold of 0.5"), ("clip 2", "a threshold of 2")):
        yield Claim("4.4", f"local clipping at 1 is better than {text}", best, (name, "in adapted"), "more")
    yield Claim("4.4", "without clipping it is about as good", best, ("no clip", "in adapted"), "same")
    yield Claim("4.4", "a pre-anchor scale of 1.5 is better than 1.25", best, ("s_pre 1.25", "in adapted"), "more")
    for scale in ("1.75", "2"):
        yield Claim("4.4", f"... and about as good as {scale}", best, (f"s_pre {scale}", "in adapted"), "same")
    for ratio in (0.4, 0.6, 0.8):
        yield Claim("Fig. 8", f"an anchor ratio of {ratio} at inference is about as good as 0.2",
            (TUNED[0], f"in anchor {ratio}"), (TUNED[0], "in anchor 0.2"), "same")
    yield Claim("Fig. 9", "the consistent trajectory has a lower training loss than the inconsistent one",
        (TUNED[0], "train"), ("inconsistent", "train"), "less")
    yield Claim("Fig. 9", "... and retrieves more", best, ("inconsistent", "in adapted"), "more")
    for name, text in (("anchor only", "the anchor stage alone"), ("pre only", "the pre-anchor stage alone"),
                       ("pre only, anchor tokens", "the pre-anchor stage alone, anchor tokens"),
                       ("anchor tokens", "both with Eq. 7 to the letter")):
        yield Claim("Fig. 10", f"two stages with clean targets are better than {text}", best, (name, "in adapted"), "more")
    for k in (3, 4):
        yield Claim("Fig. 11", f"{k} inner steps lower the training loss", (f"K={k}", "train"), (TUNED[0], "train"), "less")
        yield Claim("Fig. 11", f"... and retrieve less than 2", (f"K={k}", "in adapted"), best, "less")


def recall_claims():
    own = ("closed memdlm", "recall cover")
    yield Claim("4.2", "phi holds the prompt: closed book, own phi recalls more than none",
        own, ("closed memdlm", "recall alone"), "more")
    yield Claim("control", "... than phi of another prompt", own, ("closed memdlm", "recall cover another"), "more")
    yield Claim("control", "... than a closed-book MDLM", own, ("closed mdlm", "recall alone"), "more")
    yield Claim("control", "... than that MDLM adapted at inference only (learning to adapt matters)",
        own, ("closed mdlm", "recall cover"), "more")
    yield Claim("control", "... than the paper's two masks at inference", own, ("closed memdlm", "recall paper's masks"), "more")
    yield Claim("4.2", "phi relieves attention: recalls more than attention that sees the prompt",
        own, ("open mdlm", "recall alone"), "more")


def claims():
    return [*retrieval_claims(), *exposure_claims(), *training_claims(), *forgetting_claims(), *lora_claims(),
            *ablation_claims(), *recall_claims()]


def value(results, place):
    """A measure of a run, one number per seed; None where there is none."""
    run, key = place
    return [seed.get(key) if seed else None for seed in results.get(run, [])]


def summary(numbers):
    """Mean, its standard error (nan for one number) and half the width of its 95 % interval."""
    n = len(numbers)
    mean = sum(numbers) / n
    if n == 1:
        return mean, float("nan"), float("inf")
    error = (sum((x - mean) ** 2 for x in numbers) / (n - 1) / n) ** 0.5
    return mean, error, T95[min(n - 1, 9)] * error


def paired(results, first, second):
    """Differences between two measures, seed by seed, where both are there."""
    pairs = zip(value(results, first), value(results, second))
    return [a - b for a, b in pairs if a is not None and b is not None]


def verdict(differences, expect):
    """reproduced, reversed or not reproduced: whether the 95 % interval of the mean lies on the claimed side of zero, on the
    other, or on both. "same" is reproduced if it lies within +-FLAT, reversed if wholly outside."""
    if len(differences) < 2:
        return "not run"
    mean, _, half = summary(differences)
    low, high = mean - half, mean + half
    if expect == "same":
        return "reproduced" if -FLAT <= low and high <= FLAT else "reversed" if low > FLAT or high < -FLAT else "not reproduced"
    if expect == "less":
        low, high = -high, -low
    return "reproduced" if low > 0 else "reversed" if high < 0 else "not reproduced"


def judged(results):
    """A row per claim: place, text, differences, their mean, standard error and interval, seeds on the claimed side, verdict."""
    out = []
    for claim in claims():
        if claim.first[0] not in results or claim.second[0] not in results:
            continue  # not among the runs of this size
        differences = paired(results, claim.first, claim.second)
        row = {"place": claim.place, "claim": claim.text, "expect": claim.expect, "verdict": verdict(differences, claim.expect),
               "first": list(claim.first), "second": list(claim.second), "differences": differences}
        if differences:
            mean, error, half = summary(differences)
            sign = {"more": 1, "less": -1}.get(claim.expect)
            agree = sum(abs(x) <= FLAT if sign is None else x * sign > 0 for x in differences)
            row |= {"mean": mean, "error": error, "interval": [mean - half, mean + half],
                    "agree": f"{agree} of {len(differences)}"}
        out.append(row)
    return out

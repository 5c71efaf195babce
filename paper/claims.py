"""The paper's claims, each as a difference between two runs, and the verdict of the statistics.

A claim names two measures of runs and says which is larger. The runs come in pairs that share a
seed, so there is one difference per seed. Student's t gives the 95 % interval of their mean, and
its p: how often as large a mean would come of nothing. Claims that answer one question are a
family. The more claims a family has, the more often one of them seems true by chance, so Holm's
method raises the p of all of them. The raised p gives the verdict. No verdict here is a judgement
by hand.

Claims whose place is "control" are not the paper's. They ask what it leaves out, for example
whether a plain MDLM with half the learning rate would have done as well.
"""
from __future__ import annotations

from functools import cache
from typing import NamedTuple

FLAT = 0.02    # "the same" means within this
LEVEL = 0.05   # a claim is decided if its p is at most this
POWER = 0.8    # how often the smallest effect that "could be seen" would be seen


class Claim(NamedTuple):
    """`text` says in words: the measure `first` is more than, less than or the same as `second`."""
    place: str     # in the paper, or "control"
    text: str
    first: tuple   # (run, key of its measures)
    expect: str    # more, less or same
    second: tuple
    family: str = ""  # the claims that are corrected together


# ---- The claims ---------------------------------------------------------------------------------

# The runs with memory and without it, tuned and from scratch.
MEMDLM, MDLM = "memdlm", "mdlm"
SCRATCH_MEMDLM, SCRATCH_MDLM = "scratch memdlm", "scratch mdlm"
PAIRS = ((SCRATCH_MEMDLM, SCRATCH_MDLM, "from scratch"), (MEMDLM, MDLM, "tuned"))


def retrieval_claims():
    for place, where, what in (("Table 1", "in", "at trained lengths"),
                               ("Table 2", "beyond", "at 2 and 4 times the trained length")):
        train_only, adapted = (MEMDLM, f"{where} alone"), (MEMDLM, f"{where} adapted")
        plain, plain_adapted = (MDLM, f"{where} alone"), (MDLM, f"{where} adapted")
        yield Claim(
            place, f"train-only retrieves more than MDLM, {what}",
            train_only, "more", plain)
        yield Claim(
            place, f"train & inference retrieves more than train-only, {what}",
            adapted, "more", train_only)
        yield Claim(
            place, f"train & inference retrieves more than MDLM, {what}",
            adapted, "more", plain)
        yield Claim(
            "control", "... and more than MDLM with the same adaptation",
            adapted, "more", plain_adapted)
        yield Claim(
            "control", "... and more than with phi of another prompt",
            adapted, "more", (MEMDLM, f"{where} another"))
        yield Claim(
            "control", "MDLM retrieves more when adapted to its prompt",
            plain_adapted, "more", plain)


def exposure_claims():
    for memory, plain, how in PAIRS:
        yield Claim(
            "Fig. 3", f"train-only has a lower exposure-bias ratio than MDLM, {how}",
            (memory, "ratio alone"), "less", (plain, "ratio alone"))
        yield Claim(
            "Fig. 3", f"train & inference has a lower ratio than train-only, {how}",
            (memory, "ratio adapted"), "less", (memory, "ratio alone"))
        yield Claim(
            "control", "... at matched positions, train-only against MDLM",
            (memory, "ratio matched alone"), "less", (plain, "ratio matched alone"))
        yield Claim(
            "control", "... with a lower static loss, too",
            (memory, "static alone"), "less", (plain, "static alone"))
        yield Claim(
            "control", "dividing MDLM's logits by 3 lowers the ratio too, with decoding unchanged",
            (plain, "ratio cooled"), "less", (plain, "ratio alone"))


def training_claims():
    for memory, plain, how in PAIRS:
        yield Claim(
            "Fig. 4",
            f"lower training loss, as published: measured with phi of the answers, {how}",
            (memory, "train"), "less", (plain, "train"))
        yield Claim(
            "Fig. 4", f"lower evaluation loss, as published: with phi of the answers, {how}",
            (memory, "nats answers"), "less", (plain, "nats alone"))
        yield Claim(
            "control", "... without phi, on the training samples",
            (memory, "train alone"), "less", (plain, "train"))
        yield Claim(
            "control", "... without phi, on held-out samples",
            (memory, "nats alone"), "less", (plain, "nats alone"))
        yield Claim(
            "control", "... without phi, in the first half of training (converges faster)",
            (memory, "train alone, first half"), "less", (plain, "train alone, first half"))


def adaptation_claims():
    adapted, plain_adapted = (SCRATCH_MEMDLM, "nats adapted"), (SCRATCH_MDLM, "nats adapted")
    yield Claim(
        "4.5", "adapting a MemDLM to its prompt lowers the loss, from scratch",
        adapted, "less", (SCRATCH_MEMDLM, "nats alone"))
    yield Claim(
        "control", "adapting a plain MDLM does so too",
        plain_adapted, "less", (SCRATCH_MDLM, "nats alone"))
    yield Claim(
        "control", "MemDLM adapted is better than MDLM adapted alike",
        adapted, "less", plain_adapted)
    yield Claim(
        "control", "... and than MDLM given the same compute, adapted alike",
        adapted, "less", ("scratch mdlm, same compute", "nats adapted"))
    yield Claim(
        "control",
        "MDLM gains more from four masks that cover the prompt than from the paper's two",
        (SCRATCH_MDLM, "nats cover"), "less", plain_adapted)


def forgetting_claims():
    train_only, plain, base = (MEMDLM, "in alone"), (MDLM, "in alone"), ("base", "in alone")
    slower, shorter = ("mdlm, lr x 0.5", "in alone"), ("mdlm, half the steps", "in alone")
    yield Claim(
        "Fig. 5", "tuning an MDLM costs retrieval that the base had",
        plain, "less", base)
    yield Claim(
        "Fig. 5", "MemDLM, train-only, retrieves more than the base",
        train_only, "more", base)
    yield Claim(
        "Fig. 5", "MemDLM, train & inference, retrieves more than the base",
        (MEMDLM, "in adapted"), "more", base)
    yield Claim(
        "control", "MDLM keeps more at half the learning rate",
        slower, "more", plain)
    yield Claim(
        "control", "MemDLM keeps more than MDLM at half the learning rate",
        train_only, "more", slower)
    yield Claim(
        "control", "MemDLM keeps more than MDLM after half the steps",
        train_only, "more", shorter)


def lora_claims():
    """The paper's own way to tune: a LoRA on a base whose weights stay."""
    kept, plain_kept = ("lora memdlm", "in alone"), ("lora mdlm", "in alone")
    loss, plain_loss = ("lora memdlm", "nats alone"), ("lora mdlm", "nats alone")
    adapted = ("lora memdlm", "in adapted")
    yield Claim(
        "Table 1", "tuned by a LoRA: train-only retrieves more than MDLM, at trained lengths",
        kept, "more", plain_kept)
    yield Claim(
        "Table 2", "tuned by a LoRA: train-only retrieves more than MDLM, beyond",
        ("lora memdlm", "beyond alone"), "more", ("lora mdlm", "beyond alone"))
    yield Claim(
        "Fig. 4", "tuned by a LoRA: a lower loss on held-out samples, without phi",
        loss, "less", plain_loss)
    for run, text in (("lora mdlm, lr x 0.5", "at half the learning rate"),
                      ("lora mdlm, lr x 2", "at twice the learning rate"),
                      ("lora mdlm, same compute", "given the same compute")):
        yield Claim(
            "control", f"... it retrieves more than MDLM {text}",
            kept, "more", (run, "in alone"))
        yield Claim(
            "control", f"... its loss is lower than of MDLM {text}",
            loss, "less", (run, "nats alone"))
    yield Claim(
        "Table 1", "tuned by a LoRA: train & inference retrieves more than train-only",
        adapted, "more", kept)
    yield Claim(
        "control", "... than with phi of another prompt",
        adapted, "more", ("lora memdlm", "in another"))
    yield Claim(
        "Fig. 5", "tuned by a LoRA: train-only retrieves more than the base",
        kept, "more", ("base", "in alone"))


def larger_base_claims():
    """Does the gain of a LoRA grow with the base under it?"""
    slower = "lora mdlm, 4 layers, lr x 0.5"
    yield Claim(
        "control",
        "a base of four layers: it retrieves more than MDLM at half the learning rate",
        ("lora memdlm, 4 layers", "in alone"), "more", (slower, "in alone"))
    yield Claim(
        "control",
        "a base of four layers: its loss is lower than of MDLM at half the learning rate",
        ("lora memdlm, 4 layers", "nats alone"), "less", (slower, "nats alone"))
    for what, text in (("4 layers", "a base of four layers"),
                       ("3 x steps", "a base trained three times as long")):
        memory, plain = f"lora memdlm, {what}", f"lora mdlm, {what}"
        yield Claim(
            "Table 1", f"{text}, tuned by a LoRA: train-only retrieves more than MDLM",
            (memory, "in alone"), "more", (plain, "in alone"))
        yield Claim(
            "Table 2", f"{text}, tuned by a LoRA: and beyond the trained lengths",
            (memory, "beyond alone"), "more", (plain, "beyond alone"))
        yield Claim(
            "Fig. 4", f"{text}, tuned by a LoRA: a lower loss on held-out samples, without phi",
            (memory, "nats alone"), "less", (plain, "nats alone"))
        yield Claim(
            "Table 1",
            f"{text}, tuned by a LoRA: train & inference retrieves more than train-only",
            (memory, "in adapted"), "more", (memory, "in alone"))


def attention_claims():
    """What version 2 of the paper says first: memory in training relieves attention."""
    for memory, plain, how in ((MEMDLM, MDLM, "tuned"),
                               ("lora memdlm", "lora mdlm", "tuned by a LoRA")):
        for times in (1, 2, 4):
            where = f"{how}, at {times} x the trained length"
            yield Claim(
                "version 2", f"train-only spreads attention less than MDLM, {where}",
                (memory, f"entropy x{times}"), "less", (plain, f"entropy x{times}"))
            yield Claim(
                "version 2", f"... and has more of it on the needle, {where}",
                (memory, f"on needle x{times}"), "more", (plain, f"on needle x{times}"))


def inner_loop_claims():
    """What an inner step minimises, what it may change, and how far."""
    best, training_loss = (MEMDLM, "in adapted"), (MEMDLM, "train")
    for run, text in (("kl", "KL"), ("reverse_kl", "reverse KL"),
                      ("hidden_cosine", "hidden cosine"), ("hidden_mse", "hidden MSE")):
        yield Claim(
            "Fig. 6", f"cross-entropy in the inner loop is better than {text}",
            best, "more", (run, "in adapted"))
    for run, text in (("all layers", "all layers"), ("ffn+attn", "FFN and attention"),
                      ("full rank", "a full-rank delta")):
        yield Claim(
            "Fig. 7", f"the last layer's FFN is better than {text}",
            best, "more", (run, "in adapted"))
    yield Claim(
        "Fig. 7", "a full-rank delta reaches a lower training loss",
        ("full rank", "train"), "less", training_loss)
    for run, text in (("clip global", "global clipping"), ("clip 0.5", "a threshold of 0.5"),
                      ("clip 2", "a threshold of 2")):
        yield Claim(
            "4.4", f"local clipping at 1 is better than {text}",
            best, "more", (run, "in adapted"))
    yield Claim(
        "4.4", "without clipping it is about as good",
        best, "same", ("no clip", "in adapted"))


def trajectory_claims():
    """Through which states the inner loop walks."""
    best, training_loss = (MEMDLM, "in adapted"), (MEMDLM, "train")
    yield Claim(
        "4.4", "a pre-anchor scale of 1.5 is better than 1.25",
        best, "more", ("s_pre 1.25", "in adapted"))
    for scale in ("1.75", "2"):
        yield Claim(
            "4.4", f"... and about as good as {scale}",
            best, "same", (f"s_pre {scale}", "in adapted"))
    for ratio in (0.4, 0.6, 0.8):
        yield Claim(
            "Fig. 8", f"an anchor ratio of {ratio} at inference is about as good as 0.2",
            (MEMDLM, f"in anchor {ratio}"), "same", best)
    yield Claim(
        "Fig. 9", "the consistent trajectory has a lower training loss than the inconsistent one",
        training_loss, "less", ("inconsistent", "train"))
    yield Claim(
        "Fig. 9", "... and retrieves more",
        best, "more", ("inconsistent", "in adapted"))
    for run, text in (("anchor only", "the anchor stage alone"),
                      ("pre only", "the pre-anchor stage alone"),
                      ("pre only, anchor tokens", "the pre-anchor stage alone, anchor tokens"),
                      ("anchor tokens", "both with Eq. 7 to the letter")):
        yield Claim(
            "Fig. 10", f"two stages with clean targets are better than {text}",
            best, "more", (run, "in adapted"))
    for k in (3, 4):
        yield Claim(
            "Fig. 11", f"{k} inner steps lower the training loss",
            (f"K={k}", "train"), "less", training_loss)
        yield Claim(
            "Fig. 11", "... and retrieve less than 2",
            (f"K={k}", "in adapted"), "less", best)


def recall_claims():
    own = ("closed memdlm", "recall cover")
    yield Claim(
        "4.2", "phi holds the prompt: closed book, own phi recalls more than none",
        own, "more", ("closed memdlm", "recall alone"))
    yield Claim(
        "control", "... than phi of another prompt",
        own, "more", ("closed memdlm", "recall cover another"))
    yield Claim(
        "control", "... than a closed-book MDLM",
        own, "more", ("closed mdlm", "recall alone"))
    yield Claim(
        "control", "... than that MDLM adapted at inference only (learning to adapt matters)",
        own, "more", ("closed mdlm", "recall cover"))
    yield Claim(
        "control", "... than the paper's two masks at inference",
        own, "more", ("closed memdlm", "recall paper's masks"))
    yield Claim(
        "4.2", "phi relieves attention: recalls more than attention that sees the prompt",
        own, "more", ("open mdlm", "recall alone"))


FAMILIES = {
    "retrieval, all weights": retrieval_claims,
    "exposure bias": exposure_claims,
    "loss": training_claims,
    "adapting": adaptation_claims,
    "forgetting": forgetting_claims,
    "a LoRA": lora_claims,
    "larger bases": larger_base_claims,
    "attention": attention_claims,
    "inner loop": inner_loop_claims,
    "trajectory": trajectory_claims,
    "closed book": recall_claims,
}
CLAIMS = [claim._replace(family=family) for family, make in FAMILIES.items() for claim in make()]


# ---- Statistics ---------------------------------------------------------------------------------
# results: {run: [the measures of each seed]}, as `run_all` of runs.py returns them. A seed whose
# run is missing or diverged has None or a dict without the key.

def look_up(results, run, key):
    """One measure of a run: a number for each seed, None where there is none."""
    return [measures.get(key) if measures else None for measures in results.get(run, [])]


def subtract(results, first, second):
    """first - second, both (run, key): a number for each seed that has both."""
    pairs = zip(look_up(results, *first), look_up(results, *second))
    return [a - b for a, b in pairs if a is not None and b is not None]


@cache
def quantiles(freedom):
    """Of Student's t: half the width of the 95 % interval, and the smallest effect that is seen.

    Both in standard errors. The effect is seen if the interval lies on its side of zero, and that
    happens with a probability of POWER.
    """
    from scipy import optimize, stats
    edge = float(stats.t.ppf(1 - LEVEL / 2, freedom))

    def missing(effect):
        return stats.nct.sf(edge, freedom, effect) - POWER
    return edge, float(optimize.brentq(missing, 0, 2 * edge + 3))


def summarise(numbers):
    """The mean, its standard error, and half the width of its 95 % interval.

    A single number has a standard error of nan and an infinite interval.
    """
    n = len(numbers)
    mean = sum(numbers) / n
    if n == 1:
        return mean, float("nan"), float("inf")
    error = (sum((x - mean) ** 2 for x in numbers) / (n - 1) / n) ** 0.5
    return mean, error, quantiles(n - 1)[0] * error


def chance_above(mean, error, edge, freedom):
    """How often a mean as far above `edge` would come by chance if the truth were the edge."""
    from scipy import stats
    if error == 0:
        return 0.0 if mean > edge else 1.0
    return float(stats.t.sf((mean - edge) / error, freedom))


def weigh(differences, expect):
    """The p of a claim and what its differences speak for: "reproduced" or "reversed".

    "more" and "less": the p of the two-sided t-test against zero.
    "same": the claim is that the mean lies within +-FLAT. For it speaks a mean that is above -FLAT
    and below FLAT (two one-sided tests, the worse of which counts); against it one that is beyond
    either. p is twice the smaller of both, as in a two-sided test.
    """
    mean, error, _ = summarise(differences)
    freedom = len(differences) - 1
    if expect == "same":
        holds = max(chance_above(mean, error, -FLAT, freedom),
                    chance_above(-mean, error, -FLAT, freedom))
        fails = chance_above(abs(mean), error, FLAT, freedom)
    else:
        sign = 1 if expect == "more" else -1
        holds = chance_above(sign * mean, error, 0, freedom)
        fails = chance_above(-sign * mean, error, 0, freedom)
    return min(1.0, 2 * min(holds, fails)), "reproduced" if holds <= fails else "reversed"


def correct(chances):
    """Holm's method: the p of each claim of a family, raised for the number of claims.

    The smallest p counts times their number n, the next times n - 1, and so on; and none counts
    less than one before it. If nothing is there, the chance that any claim of the family has a
    raised p of at most 0.05 is at most 0.05.
    """
    raised, highest = [0.0] * len(chances), 0.0
    for rank, i in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        highest = max(highest, min(1.0, (len(chances) - rank) * chances[i]))
        raised[i] = highest
    return raised


def judge(differences, expect):
    """The verdict on a claim by itself, from its differences, one per seed.

    "more" and "less": reproduced if the 95 % interval of the mean lies wholly on the claimed side
    of zero, reversed if it lies wholly on the other side.
    "same": reproduced if the interval lies within +-FLAT, reversed if it lies wholly outside.
    Everything else is not reproduced. Fewer than two differences count as not run.
    """
    if len(differences) < 2:
        return "not run"
    p, side = weigh(differences, expect)
    return side if p <= LEVEL else "not reproduced"


def count_agreeing(differences, expect):
    """How many of the differences lie on the claimed side."""
    if expect == "same":
        return sum(abs(x) <= FLAT for x in differences)
    return sum(x > 0 if expect == "more" else x < 0 for x in differences)


def judge_claims(results, claims=None):
    """The claims whose two runs are among the results, as `judge_rows` returns them."""
    rows = []
    for claim in CLAIMS if claims is None else claims:
        if claim.first[0] in results and claim.second[0] in results:
            rows.append({"family": claim.family, "place": claim.place, "claim": claim.text,
                         "expect": claim.expect, "first": list(claim.first),
                         "second": list(claim.second),
                         "differences": subtract(results, claim.first, claim.second)})
    return judge_rows(rows)


def judge_rows(rows):
    """Add the statistics to rows that have family, expect and differences, a dict each for JSON.

    `verdict` is corrected for the number of claims in the family, `alone` is not. With at least one
    difference a row has `mean`, `error`, `interval` and `agree`; with two also `p`, `holm`, the
    raised p, and `seen`, the smallest effect that this many seeds would have shown.
    """
    rows = [row | describe_differences(row["differences"], row["expect"]) for row in rows]
    families = {}
    for row in rows:
        if "p" in row:
            families.setdefault(row["family"], []).append(row)
    for family in families.values():
        for row, p in zip(family, correct([row["p"] for row in family])):
            row["holm"] = p
            row["verdict"] = row["alone"] if p <= LEVEL else "not reproduced"
    return rows


def describe_differences(differences, expect):
    """What a claim's differences say by themselves, a dict."""
    alone = judge(differences, expect)
    out = {"alone": alone, "verdict": alone}
    if differences:
        mean, error, half = summarise(differences)
        agreeing = count_agreeing(differences, expect)
        out |= {"mean": mean, "error": error, "interval": [mean - half, mean + half],
                "agree": f"{agreeing} of {len(differences)}"}
    if len(differences) > 1:
        out |= {"p": weigh(differences, expect)[0],
                "seen": quantiles(len(differences) - 1)[1] * error}
    return out

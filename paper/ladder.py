"""The ends of the ladder: rows of pretrained bases beside the toy's, and what only 7B can show.

results/ladder.json holds what was found on pretrained bases. A row there is data and needs no code:

    {"base": "SmolLM2-135M, two-way", "place": "Table 1", "claim": "train-only retrieves more than
     MDLM, at trained lengths", "expect": "more", "differences": [0.01, 0.02, 0.015],
     "command": "python train.py ...", "learned from": "a LoRA, 300 steps, seeds 60 to 62"}

A difference is one seed's. The rows of one base are a family, and get the statistics of the claims.
A claim with the words of one of the toy's has the toy's row above it.
"""
from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from files import read_json
from paper.claims import judge_rows

LADDER = Path(__file__).parent.parent / "results" / "ladder.json"
NEEDED = {"base": str, "place": str, "claim": str, "expect": str, "differences": list}


# ---- Pretrained bases ---------------------------------------------------------------------------

def read_rows(path=LADDER):
    """The rows of a ladder.json, [] if there is none. ValueError if one is not as it should be."""
    if not path.exists():
        return []
    rows = read_json(path)
    if not isinstance(rows, list):
        raise ValueError(f"{path} must be a list of rows")
    for number, row in enumerate(rows, 1):
        missing = [name for name, kind in NEEDED.items()
                   if not isinstance(row, dict) or not isinstance(row.get(name), kind)]
        if missing:
            raise ValueError(f"{path}, row {number}: {', '.join(missing)} is missing or of another "
                             "kind")
        if row["expect"] not in ("more", "less", "same"):
            raise ValueError(f"{path}, row {number}: expect is {row['expect']!r:.40}; it must be "
                             "more, less or same")
        if not all(type(x) in (int, float) for x in row["differences"]):
            raise ValueError(f"{path}, row {number}: differences must be numbers, one per seed")
    return rows


def pretrained_rows(toy, path=LADDER):
    """The rows of pretrained bases, judged, each below the toy's row with the same words.

    toy: the verdicts on the toy, as `judge_claims` returns them. [] if no base was tried.
    """
    rows = judge_rows([row | {"family": row["base"]} for row in read_rows(path)])
    out, shown = [], set()
    for row in rows:
        same = [claim | {"base": "toy"} for claim in toy if claim["claim"] == row["claim"]
                and claim["place"] == row["place"]]
        out += [] if row["claim"] in shown else same[:1]
        shown.add(row["claim"])
        out.append(row)
    return out


# ---- What only 7B can show ----------------------------------------------------------------------

CARD = "an H100 at 40 % of its 989 TFLOP/s of dense bfloat16"
DELIVERED = 0.4 * 989  # TFLOP per second
STEPS = 500            # of 32 samples. The published code gives no number; Fig. 4 shows hundreds
MODEL = "inclusionAI/LLaDA-MoE-7B-A1B-Base"
RUN = "runs/LLaDA-MoE-7B-A1B-Base-LongAlpaca-12k"
TRAIN = f"python train.py --model {MODEL} --load-4bit --steps {STEPS}"

LONGBENCH = ",".join(f"longbench_{task}" for task in (
    "triviaqa", "passage_retrieval_en", "passage_retrieval_zh", "multifieldqa_en",
    "multifieldqa_zh", "2wikimqa", "dureader", "multi_news", "trec", "samsum", "lcc",
    "repobench-p"))

# Of LLaDA-MoE with one sample, in TFLOP, as `python bench.py --scale` counts it: at 4,096 tokens a
# plain step and a MemDLM step. A plain step runs the layers forward, again for checkpointing, and
# backward, which costs one more forward pass while the weights are frozen. So a forward pass is a
# third of the step: at 4,096, 8,192, 16,384 and 32,768 tokens.
PLAIN, WITH_MEMORY = 33.9, 52.6
FORWARD = {4096: 11.3, 8192: 26.7, 16384: 69.8, 32768: 205.3}
ANSWER = 64  # looks at the whole text per answer, one for each token


class OnlyLarge(NamedTuple):
    """A claim that no small model can decide, and the command that would."""
    place: str
    claim: str
    command: str
    tflop: float  # counted


def decode_tflop(samples, *lengths):
    return samples * ANSWER * sum(FORWARD[length] for length in lengths)


ONLY_LARGE = (
    OnlyLarge("Table 1", "train-only beats MDLM on RULER and BABILong at 4K and 8K: two trainings",
              f"{TRAIN}; the same with --no-memory", 32 * STEPS * (PLAIN + WITH_MEMORY)),
    OnlyLarge("Table 1", "... and their scores: three RULER tasks of 500 samples, per model",
              f"python evaluate.py tasks niah_multivalue,ruler_vt,ruler_cwe {RUN} --lengths "
              "4096,8192", 3 * decode_tflop(500, 4096, 8192)),
    OnlyLarge("Table 1", "... BABILong, five tasks of 100 samples, per model",
              f"python evaluate.py tasks babilong_longctx {RUN} --lengths 4096,8192 --limit 100",
              5 * decode_tflop(100, 4096, 8192)),
    OnlyLarge("Table 2", "memory helps beyond the window: RULER at 16K and 32K, 100 samples",
              f"python evaluate.py tasks niah_multivalue,ruler_vt,ruler_cwe {RUN} --lengths "
              "16384,32768 --limit 100", 3 * decode_tflop(100, 16384, 32768)),
    OnlyLarge("Table 3", "memory helps on LongBench: twelve tasks of 200 samples of about 8K",
              f"python evaluate.py tasks {LONGBENCH} {RUN} --adapt",
              12 * decode_tflop(200, 8192)),
)


def hours(tflop):
    return tflop / DELIVERED / 3600


def only_large_table():
    """What only 7B can show: the command that would show it, its work and its hours."""
    out = [["place", "what only 7B can show", "command", "TFLOP", "hours"]]
    for row in ONLY_LARGE:
        out.append([row.place, row.claim, f"`{row.command}`", f"{row.tflop:,.0f}",
                    f"{hours(row.tflop):.1f}"])
    return out


ONLY_LARGE_TEXT = (
    f"One seed. Hours on {CARD}, an assumption: with 4-bit weights and single samples a card often "
    "delivers less. The work of a step is counted by `bench.py --scale`; an answer is taken as "
    f"{ANSWER} looks at the whole text, without a cache. Five paired seeds cost five times as much."
)

"""Measure speed and memory, and count the work beside the seconds.

    python bench.py                             on a CPU: the toy, and two models of a middle size
    python bench.py --quick                     the same with fewer cases
    python bench.py --decoding                  what a block cache and thresholds save and change
    python bench.py --decoding --run RUN        in your run; or --model FOLDER --data FILE
    python bench.py --scale                     no measurement: the work and memory that real
                                                models need at 4K to 32K tokens
    python bench.py --profile                   what a plain and a MemDLM step spend their time on
    python bench.py --model llada-moe --random  on a GPU: a real model's shape in 4-bit, made one
                                                layer at a time, without a download
    python bench.py --model llada2.1-mini --random --optimizer adamw8bit --lora-dtype bfloat16
    python bench.py --model qwen3-0.6b --random --device cpu    on a CPU, if you mean it

What is compared runs in one process, in turns, and the medians are shown. On a shared machine only
their ratios mean something. The counts of floating-point operations are exact and the same on every
machine.
"""
from __future__ import annotations

if __name__ == "__main__":  # first of all: a Ctrl-C may come while torch is imported
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback, until `begin` takes it
    import console
    console.begin()

import ctypes
import platform
import random
import statistics
import time
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import kernels
import memdlm
from backbones import experts
from backbones.checkpoint import describe, load_backbone
from backbones.families import FAMILIES, PUBLISHED, TINY, translate
from backbones.lora import add_lora
from backbones.plan import empty_network, lora_sizes, memory_plan, plan_text
from decoding import count_forwards, decode, measure_model, table_of, ways_of
from files import nearest, write_json
from memdlm import Batch, MemDLM
from runs import build, peak_memory, pick_device
from settings import (
    CHANGEABLE, Parser, REAL, Settings, add_flags, enough_memory, file_to_write, names_of,
    one_line, settings_from_flags,
)
from train import Processes, compute_gradients, make_batch, make_optimizer

FLAGS = [name for name in names_of("method", "inner loop", "optimisation", "real models", "loading")
         if name not in ("memory", "from_adapter", "merge", "warmup")] + ["seed"]

# Shapes of a middle size: small enough for one thread of a CPU, and large enough that the time goes
# into matrix products.
MIDDLE = {
    "llada-moe": dict(
        hidden_size=256, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=4,
        num_experts=16, num_experts_per_tok=4, expert_intermediate_size=128,
        mask_token_id=5, eos_token_id=6, pad_token_id=7),
    "llada2.1-mini": dict(
        hidden_size=256, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=4,
        head_dim=64, intermediate_size=512, num_experts=16, num_experts_per_tok=4,
        moe_intermediate_size=128, n_group=4, topk_group=2,
        mask_token_id=5, eos_token_id=6, pad_token_id=7),
}
DENSE = dict(  # LLaDA-8B's
    d_model=256, n_layers=8, n_heads=4, n_kv_heads=4, mlp_hidden_size=768, vocab_size=8192,
    embedding_size=8192, mask_token_id=5, eos_token_id=6, pad_token_id=7)


# ---- Measuring ----------------------------------------------------------------------------------

class Clock:
    """Measures a piece of work: clock(work) -> seconds, and on a GPU the peak of its memory."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"

    def __call__(self, work):
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        work()
        if self.cuda:
            torch.cuda.synchronize()  # only now has the work really ended
        seconds = time.perf_counter() - begin
        return seconds, torch.cuda.max_memory_allocated() if self.cuda else 0


def time_in_turns(works, repeats, clock):
    """{label: work(seed)} -> {label: (median seconds, peak bytes)}.

    One round of all works warms up. Then there are `repeats` rounds that count.
    """
    measured = {label: [] for label in works}
    for seed in range(repeats + 1):
        for label, work in works.items():
            measured[label].append(clock(lambda: work(seed)))
    out = {}
    for label, rounds in measured.items():
        seconds = statistics.median(seconds for seconds, _ in rounds[1:])
        out[label] = seconds, max(peak for _, peak in rounds)
    return out


def grouped_flops(a, b, *rest, **options):
    """Of `grouped_mm`, from shapes: rows times a matrix each [N, k] x [E, k, n], or the gradient of
    the matrices [m, N] x [N, n]. PyTorch's counter does not know it."""
    return 2 * a[0] * a[1] * b[-1]


def count_flops(work):
    """Floating-point operations of all matrix products in a piece of work, attention included."""
    ours = {torch.ops.aten._grouped_mm: grouped_flops}
    counter = FlopCounterMode(display=False, custom_mapping=ours)
    with sdpa_kernel(SDPBackend.MATH), counter:
        work()
    return counter.get_total_flops()


def measure_extra_memory(work):
    """Peak megabytes that a piece of work needs above what the process held before it.

    On a Linux CPU. Elsewhere the answer is nan.
    """
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # give back what earlier work has left
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forget the peak
        before = read_status("VmRSS")
        work()
        return read_status("VmHWM") - before
    except (OSError, AttributeError):
        return float("nan")


def read_status(field):
    """A field of /proc/self/status, in megabytes."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field):
                return int(line.split()[1]) / 1024
    return float("nan")


class Table:
    """A table whose rows are printed as they come. The first column stands left, the others right.

    first: the width of the first column. The others are as wide as their heads, at least 6.
    """

    def __init__(self, head, first=0):
        self.widths = [max(6, len(name)) for name in head]
        self.widths[0] = max(first, len(head[0]))
        self.add(head)
        print("|" + "|".join("-" * (width + 2) for width in self.widths) + "|", flush=True)

    def add(self, row):
        cells = [cell.rjust(width) for cell, width in zip(row, self.widths)]
        cells[0] = row[0].ljust(self.widths[0])
        print("| " + " | ".join(cells) + " |", flush=True)


def print_table(rows):
    """Rows of text that are all there, the head first."""
    table = Table(rows[0], max(len(row[0]) for row in rows))
    for row in rows[1:]:
        table.add(row)
    print(flush=True)


# ---- What is measured ---------------------------------------------------------------------------

WIDEST = len("llada2.1-mini, 32k words")  # of the names of cases


class Case(NamedTuple):
    """A model and the batches for it."""
    name: str
    backbone: object
    s: Settings
    batch: object  # seed -> Batch


def random_batch(vocab_size, mask_id, s, length, seed, prompt=0.75):
    """Samples of `length` random tokens. A share of them, from the start, is the prompt."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randint(8, vocab_size - 8, (s.batch, length), generator=generator)
    x0[x0 == mask_id] = 0
    valid, cut = torch.ones_like(x0, dtype=torch.bool), int(length * prompt)
    maskable = torch.arange(length).expand(s.batch, -1) >= cut
    seeds = [f"{seed} {i}" for i in range(s.batch)]
    return Batch(x0, maskable, valid, seeds, x0[:, :cut], valid[:, :cut])


def toy_case(kind):
    """The toy as train.py builds it for one kind of data."""
    s = settings_from_flags({"data": kind, "threads": 1})
    data, model = build(s)
    return Case(f"toy, {kind}", model.backbone, s, lambda seed: make_batch(s, data, seed))


def middle_case(name, vocabulary, lora=True, device="cpu"):
    """A real model in a middle size with random weights: 2 samples of 512 tokens."""
    raw = PUBLISHED[name] | MIDDLE[name] | {"vocab_size": vocabulary}
    backbone = load_backbone(raw, random=True, dtype="float32", device=device)
    if lora:
        add_lora(backbone, 32, 64.0, 0.05)
    s = Settings(model=name, batch=2)

    def batch(seed):
        return random_batch(vocabulary, backbone.mask_id, s, 512, seed, 0.25)
    return Case(f"{name}, {vocabulary // 1024}k words", backbone, s, batch)


def run_forward(backbone, s, batch):
    """One pass of the whole batch through all layers. Returns hidden states [B, L, D]."""
    with torch.no_grad():
        h = memdlm.lower_layers(backbone, s, batch.x0, batch.valid)
        return memdlm.upper_layers(backbone, s, h, batch.valid, None)


# ---- A training step ----------------------------------------------------------------------------

class LogitsEverywhere(MemDLM):
    """A plain step as most code has it: logits at every position, and most of them unused."""

    def mdlm_step(self, batch, t, xt, masked):
        h = memdlm.lower_layers(self.backbone, self.s, xt, batch.valid)
        top = memdlm.upper_layers(self.backbone, self.s, h, batch.valid, None)
        logits = self.backbone.head(top).flatten(0, 1).float()  # [B * L, V]
        targets = batch.x0.flatten().to(h.device)
        nll = F.cross_entropy(logits, targets, reduction="none").view_as(masked)
        return nll * masked.to(h.device), {}, h


def steps_of(case):
    """{label: work(seed)}: each kind of training step, with backward pass and optimiser."""
    backbone, plain = case.backbone, replace(case.s, memory=False)
    parameters = [p for p in backbone.parameters() if p.requires_grad]
    optimizer, processes = make_optimizer(case.s, parameters), Processes()
    models = {"plain": MemDLM(backbone, plain), "MemDLM": MemDLM(backbone, case.s),
              "plain, logits everywhere": LogitsEverywhere(backbone, plain)}

    def step(label, seed):
        backbone.train()
        optimizer.zero_grad()
        compute_gradients(case.s, models[label], [case.batch(seed)], False, processes)
        torch.nn.utils.clip_grad_norm_(parameters, case.s.grad_clip)
        optimizer.step()
    return {label: partial(step, label) for label in models}


def count_least_extra(case, seed):
    """FLOPs that a MemDLM step must add to a plain one, however the mathematics is arranged.

    A MemDLM step is a plain step with the inner loop before it. Stage 1 reads the pre-anchor, whose
    layers below phi nothing else computes: one more forward pass of these. Stage 2 reads the
    anchor. The outer step does too, so its lower layers cost nothing. The layers with phi and the
    head run forward and backward in each stage, because phi changes between the stages. The
    backward pass goes only as far down as phi does.
    """
    backbone, s, batch = case.backbone, case.s, case.batch(seed)
    x0, valid, seeds = batch.x0, batch.valid, batch.seeds
    if s.memory_from == "prompt":
        return count_flops(partial(
            memdlm.adapt, backbone, s, batch.prompt, batch.prompt_valid, seeds))
    t = s.min_t + (1 - s.min_t) * memdlm.uniform(seeds, "t", 1)[:, 0]
    u = memdlm.uniform(seeds, "anchor", x0.shape[1])
    xt, masked = memdlm.corrupt(x0, batch.maskable, t, u, backbone.mask_id)
    path = memdlm.stages(s, x0, masked, batch.maskable, t, seeds, backbone.mask_id, weighted=True)
    with torch.no_grad():
        h = memdlm.lower_layers(backbone, s, xt, valid)
        prefix = count_flops(partial(memdlm.lower_layers, backbone, s, path[0].x, valid))
    phi = memdlm.fresh_phi(backbone, s, seeds if s.per_sample else seeds[:1])

    def lower(states):
        return [h] * len(states)
    return prefix + count_flops(partial(
        memdlm.inner_loop, backbone, s, path, x0, valid, lower, phi))


def measure_training(case, repeats, clock):
    """A row of the table of steps, as a dict."""
    works, seeds, flops = steps_of(case), range(4), {}
    for label in ("plain", "MemDLM"):
        counts = [count_flops(lambda: works[label](seed)) for seed in seeds]
        flops[label] = sum(counts) / len(seeds)
    least = sum(count_least_extra(case, seed) for seed in seeds) / len(seeds) + flops["plain"]

    backbone, s, batch = case.backbone, case.s, case.batch(0)
    works["forward"] = lambda seed: run_forward(backbone.eval(), s, batch)
    works["adapt"] = lambda seed: memdlm.adapt(backbone.eval(), s, batch.x0, batch.valid,
                                               batch.seeds)
    for label in ("forward", "adapt"):
        flops[label] = count_flops(lambda: works[label](0))
    times = time_in_turns(works, repeats, clock)
    memory = {label: measure_extra_memory(lambda: works[label](0))
              for label in ("plain", "MemDLM", "adapt")}
    seconds = {label: median for label, (median, _) in times.items()}
    return {
        "case": case.name,
        "seconds": seconds,
        "gflop": {label: count / 1e9 for label, count in flops.items()},
        "extra_mb": memory,
        "ratio": seconds["MemDLM"] / seconds["plain"],
        "counted": flops["MemDLM"] / flops["plain"],
        "floor": least / flops["plain"],
        "against_logits_everywhere": seconds["plain"] / seconds["plain, logits everywhere"],
        "adapt_forwards": seconds["adapt"] / seconds["forward"],
        "adapt_forwards_counted": flops["adapt"] / flops["forward"],
    }


STEPS = ("case", "plain s", "MemDLM s", "ratio", "counted", "floor", "plain GF", "MemDLM GF")


def step_row(result):
    seconds, gflop = result["seconds"], result["gflop"]
    ratios = [result[key] for key in ("ratio", "counted", "floor")]
    return (result["case"], f"{seconds['plain']:.3f}", f"{seconds['MemDLM']:.3f}",
            *(f"{x:.2f}" for x in ratios), f"{gflop['plain']:.1f}", f"{gflop['MemDLM']:.1f}")


def others_table(results):
    """What else was measured with the steps."""
    out = [("case", "plain / everywhere", "adapting", "counted", "plain MB", "MemDLM MB",
            "adapt MB")]
    for result in results:
        ratios = [result[key] for key in ("against_logits_everywhere", "adapt_forwards",
                                          "adapt_forwards_counted")]
        out.append((result["case"], *(f"{x:.2f}" for x in ratios),
                    *(f"{result['extra_mb'][label]:.0f}" for label in ("plain", "MemDLM",
                                                                       "adapt"))))
    return out


# ---- Decoding -----------------------------------------------------------------------------------

def measure_decoding(case, prompt, new, repeats, clock):
    """A row of the table of decoding, as a dict: `new` tokens after a prompt.

    Our decoder is compared with the plainest one, a forward pass of the whole window per token.
    """
    backbone, s = case.backbone.eval(), replace(case.s, batch=1)
    length = prompt + new
    batch = random_batch(backbone.vocab_size, backbone.mask_id, s, length, 0, prompt / length)

    def decode_window(seed):  # one token: all positions, and the logits of a block
        with torch.no_grad():
            h = run_forward(backbone, s, batch)
            backbone.head(h[:, -min(32, new):])

    positions = sum(count_forwards(backbone, partial(decode, backbone, s, batch)))
    times = time_in_turns({"ours": lambda seed: decode(backbone, s, batch),
                           "window": decode_window}, repeats, clock)
    per_token, window_per_token = times["ours"][0] / new, times["window"][0]
    return {
        "case": case.name, "prompt": prompt, "new": new,
        "positions": positions, "window_positions": new * length,
        "seconds_per_token": per_token, "window_seconds_per_token": window_per_token,
        "times_faster": window_per_token / per_token,
    }


DECODING = ("case", "prompt", "new", "s / token", "window s", "faster", "positions", "window")


def decoding_row(result):
    return (result["case"], f"{result['prompt']:,}", str(result["new"]),
            f"{result['seconds_per_token']:.4f}", f"{result['window_seconds_per_token']:.4f}",
            f"{result['times_faster']:.1f}",
            f"{result['positions']:,}", f"{result['window_positions']:,}")


def measure_batch_of_eight(repeats, clock):
    """How many times faster the toy answers 8 prompts at once than one by one, closed book."""
    s = settings_from_flags({"threads": 1})
    data, model = build(s)

    def answer(numbers):
        batch = data.tests("64 x1", numbers, s.closed_book)
        phi, _ = memdlm.adapt(model.backbone, s, batch.prompt, batch.prompt_valid, batch.seeds)
        decode(model.backbone, s, batch, phi)

    def one_by_one(seed):
        for number in range(8):
            answer([number])

    works = {"at once": lambda seed: answer(range(8)), "one by one": one_by_one}
    times = time_in_turns(works, repeats * 5, clock)
    return times["one by one"][0] / times["at once"][0]


# ---- Decoding with a block cache and a threshold ------------------------------------------------

class Language:
    """Texts of 40 words, each of which three others may follow. A wrong word is easy to tell.

    A word is 3 to 7 of 12 letters, which are the tokens 0 to 11. Token 12 stands between words.
    """
    space, mask_id, size = 12, 15, 40

    def __init__(self):
        rng, words = random.Random(0), set()
        while len(words) < self.size:
            words.add(tuple(rng.randrange(self.space) for _ in range(rng.randint(3, 7))))
        self.words = sorted(words)
        self.number = {word: number for number, word in enumerate(self.words)}
        self.followers = [rng.sample(range(self.size), 3) for _ in self.words]

    def text(self, rng, length):
        """A text that begins somewhere in a word."""
        number, tokens, skip = rng.randrange(self.size), [], rng.randrange(8)
        while len(tokens) < length + skip:
            tokens += [*self.words[number], self.space]
            number = rng.choices(self.followers[number], [0.6, 0.3, 0.1])[0]
        return tokens[skip:length + skip]

    def batch(self, seed, count, prompt, length=192):
        """Texts of 192 tokens; all but the prompt may be masked."""
        rng = random.Random(f"language {seed}")
        x0 = torch.tensor([self.text(rng, length) for _ in range(count)])
        valid = torch.ones_like(x0, dtype=torch.bool)
        maskable = (torch.arange(length) >= prompt).expand_as(x0)
        seeds = [f"{seed} {i}" for i in range(count)]
        return Batch(x0, maskable, valid, seeds, x0[:, :prompt], valid[:, :prompt])

    def share_right(self, x, prompt):
        """The share of words that end after the prompt and may follow the word before them."""
        right = count = 0
        for row in x.tolist():
            ends = [i for i, token in enumerate(row) if token == self.space]
            words = [tuple(row[a + 1:b]) for a, b in zip(ends, ends[1:])]
            for before, word, end in zip(words, words[1:], ends[2:]):
                if end >= prompt:
                    allowed = self.followers[self.number[before]] if before in self.number else ()
                    right += self.number.get(word) in allowed
                    count += 1
        return right / count


def train_on_language(language, steps):
    """A model of LLaDA-8B's kind, small, trained from scratch on plain MDLM."""
    small = dict(d_model=96, n_layers=3, n_heads=4, n_kv_heads=4, mlp_hidden_size=288,
                 vocab_size=16, embedding_size=16, rope_theta=1e4, mask_token_id=language.mask_id,
                 eos_token_id=14, pad_token_id=14)
    backbone = load_backbone(PUBLISHED["llada-8b"] | small, random=True, dtype="float32",
                             device="cpu").requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    for p in backbone.parameters():
        if p.dim() > 1:
            p.data = torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5
    model = MemDLM(backbone, Settings(memory=False))
    optimizer = torch.optim.AdamW(backbone.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, step / 50, (steps - step) / (0.3 * steps))
        loss, record = model(language.batch(step, 16, 0))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            print(f"step {step + 1}: {float(record['ce']):.2f} nats per masked token", flush=True)
    return backbone.eval()


def measure_trade_off(steps, samples):
    """What the cache and a threshold change in 96 tokens after a prompt of 96."""
    language, prompt, rows, exact = Language(), 96, {}, None
    backbone = train_on_language(language, steps)
    table = Table(("96 + 96 tokens, trained", "tokens unlike exact", "words right", "looks",
                   "positions", "CPU s / token"))
    batches = [language.batch(f"test {i}", 1, prompt) for i in range(samples)]
    for name, options in ways_of(backbone).items():
        begin, done = time.process_time(), []
        sizes = count_forwards(backbone, lambda: done.extend(
            decode(backbone, Settings(), batch, **options) for batch in batches))
        seconds, canvas = time.process_time() - begin, torch.cat(done)
        exact = canvas if exact is None else exact  # the first way
        row = rows[name] = {
            "differ": float((canvas != exact)[:, prompt:].float().mean()),
            "right": language.share_right(canvas, prompt),
            "looks": len(sizes) / samples, "positions": sum(sizes) / samples,
            "seconds_per_token": seconds / samples / 96}
        table.add((name, f"{row['differ']:.3f}", f"{row['right']:.3f}", f"{row['looks']:.1f}",
                   f"{row['positions']:,.0f}", f"{row['seconds_per_token']:.4f}"))
    return rows


def measure_cache(repeats):
    """CPU seconds per token of 128 tokens after 1,024, in a middle size with random weights."""
    backbone = load_backbone(PUBLISHED["llada-8b"] | DENSE, random=True, dtype="float32",
                             device="cpu").eval()
    s, rows, seconds = Settings(batch=1), {}, {name: [] for name in ("exact", "cache")}
    batch = random_batch(backbone.vocab_size, backbone.mask_id, s, 1152, 0, 1024 / 1152)
    ways = ways_of(backbone)
    for name in seconds:
        sizes = count_forwards(backbone, partial(decode, backbone, s, batch, **ways[name]))
        rows[name] = {"looks": len(sizes), "positions": sum(sizes)}
    for _ in range(repeats):
        for name, measured in seconds.items():
            begin = time.process_time()
            decode(backbone, s, batch, **ways[name])
            measured.append((time.process_time() - begin) / 128)
    for name, measured in seconds.items():
        rows[name]["seconds_per_token"] = statistics.median(measured)
    return rows


def measure_both_ways(quick, repeats):
    """Decoding of models that look both ways, on one thread."""
    torch.set_num_threads(1)
    speed = measure_cache(1 if quick else repeats)
    print_table([("1,024 + 128 tokens, dense, middle size", "CPU s / token", "looks", "positions")]
                + [(name, f"{row['seconds_per_token']:.4f}", str(row["looks"]),
                    f"{row['positions']:,}") for name, row in speed.items()])
    rows = measure_trade_off(*(20, 4) if quick else (800, 32))
    return {"speed": speed, "trade_off": rows}


# ---- The tables of a CPU ------------------------------------------------------------------------

def measure_cpu(quick, repeats):
    """Measure the toy and the models of a middle size on one thread. Print what is measured."""
    torch.set_num_threads(1)
    clock, steps, decodes = Clock(torch.device("cpu")), [], []
    makers = [partial(toy_case, "dictionary"), partial(toy_case, "languages")]
    for name in MIDDLE:
        for vocabulary in (8192,) if quick else (8192, 32768):
            makers.append(partial(middle_case, name, vocabulary))
    print("A training step: seconds, their ratio, and the matrix products counted (GF: GFLOP).")
    table = Table(STEPS, WIDEST)
    for make in makers:
        steps.append(measure_training(make(), repeats, clock))
        table.add(step_row(steps[-1]))
    print("\nA plain step against one with logits everywhere. Adapting to a prompt, in forward "
          "passes.\nMB: what the work needs beyond what the process holds.")
    print_table(others_table(steps))
    print("Decoding, against a forward pass of the whole window for each token, and its positions.")
    table = Table(DECODING, WIDEST)
    for name in MIDDLE:
        case = middle_case(name, 8192, lora=False)  # as after merging it
        in_blocks = case.backbone.decoder is not memdlm.denoise
        new = 32 if in_blocks else 2
        sizes = [(256, new), (1024, new), (4096, new)]
        if in_blocks:
            sizes.append((1024, 128))
        for prompt, new in sizes[:2] if quick else sizes:
            rounds = 1 if prompt > 1024 else repeats
            decodes.append(measure_decoding(case, prompt, new, rounds, clock))
            table.add(decoding_row(decodes[-1]))
    eight = measure_batch_of_eight(repeats, clock)
    print(f"\ntoy: adapting to and answering 8 prompts at once is {eight:.1f} times faster than "
          "one by one")
    return {"steps": steps, "decoding": decodes, "toy_batch_of_eight": eight}


# ---- Real models on a GPU -----------------------------------------------------------------------

def real_shape(name, tiny):
    raw = PUBLISHED[name]
    return raw | TINY[name] | {"mask_token_id": 301, "eos_token_id": 300} if tiny else raw


def real_case(name, s, length, tiny):
    """A real model's shape with random weights, on the GPU if there is one."""
    backbone = load_random(real_shape(name, tiny), s, pick_device(s))
    print(describe(backbone), flush=True)
    vocabulary = backbone.config.vocab_size - 64

    def batch(seed, length=length, prompt=0.75):
        return random_batch(vocabulary, backbone.mask_id, s, length, seed, prompt)
    return Case(name, backbone, s, batch)


def measure_real(name, s, length, repeats, tiny, new_tokens, room=None):
    """Load a real model's shape with random weights, and measure all that is done with it.

    A row is printed when it is measured. What does not fit in memory is said, and the rest goes on.
    room: bytes that the GPU's memory is capped to.
    """
    device = pick_device(s)
    plan = memory_plan(translate(real_shape(name, tiny)), s, length, device)
    print(plan_text(plan, room, device))
    planned = sum(size for _, size in plan)
    clock, cases = Clock(torch.device(device)), []
    result = {"planned": dict(plan), "planned_total": planned}
    result["load"] = clock(lambda: cases.append(real_case(name, s, length, tiny)))
    works = works_of(cases[0], length, new_tokens)
    for labels in (["plain step", "MemDLM step"], *([label] for label in [*works][2:])):
        try:  # the two steps in turns, for their ratio
            result |= time_in_turns({label: works[label] for label in labels}, repeats, clock)
        except torch.OutOfMemoryError:
            result |= {label: None for label in labels}
        for label in labels:
            print(f"{label:30} {seconds_and_peak(result[label])}", flush=True)
    if result["MemDLM step"]:
        (plain, _), (seconds, peak) = result["plain step"], result["MemDLM step"]
        print(f"{'MemDLM / plain step':30} {seconds / plain:8.2f}")
        if peak:
            print(f"{'MemDLM step, peak / planned':30} {peak / planned:8.2f}")
    if device == "cpu":
        result["process_peak"] = peak_memory() * 2**20  # bytes, like all sizes here
        print(f"{'peak of the process':30} {result['process_peak'] / 2**30:8.2f} GiB")
    return result


def seconds_and_peak(measured):
    if measured is None:
        return "does not fit in memory"
    seconds, peak = measured
    return f"{seconds:8.3f} s" + (f"   peak {peak / 2**30:6.2f} GiB" if peak else "")


def works_of(case, length, new_tokens):
    """{label: work(seed)}: all that is done with a real model."""
    _, backbone, s, batch = case
    window, steps, first = length + new_tokens, steps_of(case), batch(0)
    to_decode = batch(0, window, length / window)
    works = {
        "plain step": steps["plain"],
        "MemDLM step": steps["MemDLM"],
        "forward pass": lambda seed: run_forward(backbone.eval(), s, first),
        "prompt adaptation": lambda seed: memdlm.adapt(
            backbone.eval(), s, first.x0, first.valid, first.seeds),
        f"decoding {new_tokens} tokens": lambda seed: decode(backbone.eval(), s, to_decode),
    }
    ways = ways_of(backbone)
    if "cache" in ways:  # a model may always have a cache of its own, or can have none
        works[f"decoding {new_tokens} with a cache"] = lambda seed: decode(
            backbone.eval(), s, to_decode, **ways["cache"])
    return works


def cap_memory(gib):
    """Let PyTorch have so many GiB of the GPU's memory, and no more. Returns the bytes."""
    if not torch.cuda.is_available():
        raise ValueError("--memory-cap needs a GPU: on a CPU PyTorch's memory has no cap")
    whole = torch.cuda.get_device_properties(0).total_memory
    if not 0 < gib * 2**30 <= whole:
        raise ValueError(f"--memory-cap is {gib:g}; it must lie above 0 and be at most "
                         f"{whole / 2**30:.1f}, the GiB of this GPU")
    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / whole)
    return int(gib * 2**30)


def measure_profile(case):
    """What a plain and a MemDLM step spend their time on."""
    clock, works, result = Clock(torch.device(pick_device(case.s))), steps_of(case), {}
    for label in ("plain", "MemDLM"):
        step = partial(works[label], 1)
        step()  # warms up
        seconds, _ = clock(step)
        summary = kernels.summarise(kernels.record(step, clock.cuda), seconds)
        print(kernels.summary_text(f"{case.name}, {label} step", summary), flush=True)
        result[label] = summary
    return {"case": case.name, "profile": result}


def load_random(raw, s, device):
    """A backbone of this config.json with random weights, and what is trained of it."""
    backbone = load_backbone(raw, random=True, load_4bit=s.load_4bit, dtype=s.dtype, device=device,
                             attention=s.attention, checkpointing=s.checkpointing)
    if s.lora:
        add_lora(backbone, s.lora_rank, s.lora_alpha, s.lora_dropout, s.lora_scope, s.lora_router,
                 s.lora_dtype)
    elif not s.load_4bit:
        backbone.requires_grad_(True)
    return backbone


# ---- Scale: the work counted by hand ------------------------------------------------------------

SCALE = """\
These numbers are counted, not measured. TF: 10^12 operations; seconds are those of a card that
delivers 100 of them a second. Each is for one micro-batch of one sample, with 4-bit weights
(Qwen3's are in bfloat16) and a LoRA of rank 32 on all linear layers. Three quarters of the sample
are response.
A step of the published run is 32 micro-batches: multiply by 32, and divide by the number of GPUs.
A card delivers only a part of its peak, often 20 to 50 % in bfloat16 products with 4-bit weights:
divide the TFLOP by what yours delivers.
Each GPU computes its own samples, phi included. Once per step they exchange the gradients of the
LoRA: {lora} for the two large models, in float32. A step of 32 micro-batches
hides that if the link moves it in less than a second."""


def forward_flops(c, tokens, length, read=1.0):
    """FLOPs of `tokens` tokens through one layer, and through the head.

    The tokens come in samples of `length`. A weight costs 2 per token, and so does each number in
    attention's two products with every key. A LoRA adds 2 r (in + out) to a matrix, with r = 32.
    read: the share of the tokens whose result is read, in the last layer. All have keys and values.
    """
    def product(a, b):
        return 2 * a * b + 2 * 32 * (a + b)
    D, q, kv = c.width, c.heads * c.head_dim, c.kv_heads * c.head_dim
    if len(FAMILIES[c.family].attention) > 2:
        for_all, for_read = 2 * product(D, kv), product(D, q) + product(q, D)
    else:  # queries, keys and values in one matrix
        for_all, for_read = product(D, q + 2 * kv), product(q, D)
    feed_forwards = [(c.expert_ffn, c.top_k), (c.shared, 1)] if c.experts else [(c.ffn, 1)]
    for_read += 4 * length * q + 2 * D * c.experts
    for_read += sum(count * 3 * product(D, inner) for inner, count in feed_forwards if inner)
    return tokens * (for_all + read * for_read), tokens * 2 * D * c.vocab_size


def step_flops(c, s, length):
    """FLOPs of a plain step on one sample, and of the inner loop that a MemDLM step adds to it."""
    first, last = memdlm.first_fast_layer(c.layers, s.layer_fraction), c.layers - 1
    layer, head = forward_flops(c, length, length)
    # Three quarters are response, and half of it is masked on average. The pre-anchor has 1.25
    # times the masks.
    top, top_before = (forward_flops(c, length, length, read)[0] + read * head
                       for read in (0.75 * 0.5, 0.75 * 0.5 * 1.25))
    # The weights are frozen, so a backward pass costs one more forward pass, for the gradient of
    # the input. Checkpointing computes the layers below phi a second time.
    plain = (2 * last + first) * layer + 2 * top
    # Stage 1 also computes the lower layers of the pre-anchor. Both stages run the upper layers and
    # the head forward and backward.
    inner = first * layer + 2 * (2 * (last - first) * layer + top + top_before)
    return plain, inner


def scale_table():
    """A MemDLM step on real models by the rules above, and its memory, at growing lengths."""
    four_bit, eight_bit = dict(load_4bit=True), dict(optimizer="adamw8bit", lora_dtype="bfloat16")
    out = [("model", "tokens", "plain TF", "MemDLM TF", "ratio", "s, 100 TF/s",
            "GiB", "24 GB", "80 GB")]
    for name, options in (("qwen3-0.6b", {}), ("llada-moe", four_bit),
                          ("llada2.1-mini", four_bit | eight_bit)):
        c = translate(PUBLISHED[name])
        s = Settings(model=name, batch=1, **options)
        for length in (4096, 8192, 16384, 32768):
            plain, inner = step_flops(c, s, length)
            whole, memory = plain + inner, sum(size for _, size in memory_plan(c, s, length))
            fits = ["fits" if memory < room else "no" for room in (24 * 2**30, 80 * 2**30)]
            out.append((name, f"{length:,}", f"{plain / 1e12:.1f}", f"{whole / 1e12:.1f}",
                        f"{whole / plain:.2f}", f"{whole / 1e14:.1f}", f"{memory / 2**30:.1f}",
                        *fits))
    return out


def lora_gigabytes(name):
    """Size of a published shape's LoRA of rank 32 on all linear layers, in float32."""
    c = translate(PUBLISHED[name])
    return sum(lora_sizes(empty_network(c), c, Settings(model=name))) * 4 / 1e9


def print_scale():
    print_table(scale_table())
    sizes = [lora_gigabytes(name) for name in ("llada-moe", "llada2.1-mini")]
    print(SCALE.format(lora=" and ".join(f"{size:.2f} GB" for size in sizes)))


# ---- The command line ---------------------------------------------------------------------------

def make_parser():
    parser = Parser(["--quick", "--decoding", "--scale", "--profile", "--model", "--random",
                     "--tiny", "--memory-cap", "--json"], description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="without --model: fewer cases")
    add("--decoding", action="store_true", help="what a cache and thresholds do to decoding")
    add("--scale", action="store_true", help="the work and memory of real models")
    add("--profile", action="store_true", help="what a step spends its time on")
    add("--run", metavar="FOLDER", help="with --decoding: the run that decodes")
    add("--data", metavar="FILE", help="with --decoding --model: prompts and responses")
    add("--samples", type=int, default=8, help="with --decoding: answers [default 8]")
    add("--model", metavar="NAME",
        help=f"a real model's shape, on a GPU: {', '.join(PUBLISHED)}")
    add("--random", action="store_true",
        help="random weights (the only kind there is yet)")
    add("--tiny", action="store_true", help="tiny shapes, for a CPU")
    add("--memory-cap", type=float, metavar="GIB",
        help="with --model, on a GPU: use so much of its memory at most, as on a smaller one")
    add("--experts", choices=["grouped", "padded"],
        help="how a GPU multiplies the experts' rows, in place of what is fast on it")
    add("--length", type=int, default=4096, help="tokens per sample [default 4096]")
    add("--new-tokens", type=int, default=32,
        help="tokens to decode after the prompt [default 32]")
    add("--repeats", type=int, default=3,
        help="rounds that are measured; their median is shown [default 3]")
    add("--json", type=file_to_write, metavar="FILE",
        help="write the numbers, with hardware and versions")
    add_flags(parser, FLAGS)
    return parser


def measure_decoding_of(arguments, given):
    """Measure what a cache and a threshold change in the answers of a run or a model."""
    run, model, data = arguments.run, arguments.model, arguments.data
    if not arguments.decoding:
        raise ValueError("--run and --data are for --decoding")
    if bool(run) == bool(model) or bool(model) != bool(data):
        raise ValueError("--decoding takes --run FOLDER, or --model with --data FILE")
    changed = [name for name in given if name not in CHANGEABLE]
    if changed:
        raise ValueError(f"--{changed[0].replace('_', '-')} is not for --decoding of a run or a "
                         "model, which is trained already")
    result = measure_model(run, model, data, given, arguments.samples, arguments.new_tokens)
    print_table(table_of(result))
    return result


def measure_as_told(arguments, given):
    """The measurement that the command line asks for. `given`: settings among its flags."""
    if arguments.run or arguments.data or (arguments.decoding and arguments.model):
        return measure_decoding_of(arguments, given)
    if arguments.decoding:
        return measure_both_ways(arguments.quick, arguments.repeats)
    if arguments.memory_cap is not None and arguments.model is None:
        raise ValueError("--memory-cap goes with --model: all else is measured on a CPU")
    room = None if arguments.memory_cap is None else cap_memory(arguments.memory_cap)
    if arguments.model is None and arguments.profile:
        torch.set_num_threads(1)
        return measure_profile(middle_case("llada-moe", 8192, device=pick_device(Settings())))
    if arguments.model is None:
        return measure_cpu(arguments.quick, arguments.repeats)
    if arguments.model not in PUBLISHED:
        raise ValueError(f"--model {arguments.model} is not one of {', '.join(PUBLISHED)}"
                         f"{nearest(arguments.model, PUBLISHED)}; --decoding takes any model")
    if not arguments.random:
        raise ValueError("give --random: the published shapes with random weights")
    if given.get("load_4bit", True) and not given.get("lora", True):
        raise ValueError("4-bit weights cannot be trained themselves: add --no-load-4bit to "
                         "--no-lora")
    defaults = {"batch": REAL["batch"], "load_4bit": True}
    s = Settings(**{**defaults, **given, "model": arguments.model})
    if not arguments.tiny and s.device == "auto" and not torch.cuda.is_available():
        raise ValueError("the shapes of real models need a GPU; on a CPU use --tiny, or say "
                         "--device cpu if you mean it")
    if s.threads:
        torch.set_num_threads(s.threads)
    if arguments.experts:
        experts.pads = lambda x: arguments.experts == "padded"
    if arguments.profile:
        result = measure_profile(real_case(s.model, s, arguments.length, arguments.tiny))
    else:
        result = measure_real(s.model, s, arguments.length, arguments.repeats, arguments.tiny,
                              arguments.new_tokens, room)
    return {"model": arguments.model, "tiny": arguments.tiny, "length": arguments.length, **result}


def check_flags(arguments):
    """ValueError where flags mean nothing, or nothing together."""
    sizes = arguments.repeats, arguments.length, arguments.new_tokens, arguments.samples
    if min(sizes) < 1:
        raise ValueError("--repeats, --length, --new-tokens and --samples must be at least 1")
    asked = [f"--{name}" for name in ("decoding", "scale", "profile") if getattr(arguments, name)]
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(asked)} are different measurements; give one of them")
    idle = [f"--{name}" for name in ("model", "run", "data", "json") if getattr(arguments, name)]
    if arguments.scale and idle:
        raise ValueError(f"--scale counts three known models and prints; {idle[0]} means nothing "
                         "with it")


def main():
    arguments = make_parser().parse_args()
    given = {name: value for name, value in vars(arguments).items() if name in FLAGS}
    with one_line(), enough_memory():
        check_flags(arguments)
        if arguments.scale:
            return print_scale()
        result = measure_as_told(arguments, given)
        if arguments.json:
            device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()
            versions = {"torch": torch.__version__, "python": platform.python_version()}
            whole = {"device": device, "versions": versions, "settings": given, **result}
            write_json(arguments.json, whole, indent=1)


def processor_name():
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()

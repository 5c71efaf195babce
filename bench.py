"""Speed and memory, measured side by side in one process, with the work counted beside the seconds.

    python bench.py                             a CPU: the toy, and LLaDA-MoE and LLaDA2.x in middle size with random weights
    python bench.py --quick                     the same, shorter
    python bench.py --scale                     no measurement: FLOPs and memory of the full models at 4K to 32K tokens
    python bench.py --model llada-moe --random  a GPU: the published shapes in 4-bit, one layer at a time, no download
    python bench.py --model llada2.1-mini --random --optimizer adamw8bit --lora-dtype bfloat16

What is compared runs interleaved, and medians are shown; on a shared machine only the ratios mean something.
"""
from __future__ import annotations

import ctypes
import json
import platform
import statistics
import time
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import memdlm
from backbones.backbone import build_network
from backbones.checkpoint import describe, load_backbone
from backbones.families import FAMILIES, PUBLISHED, TINY, translate
from backbones.lora import add_lora, lora_targets
from backbones.plan import memory_plan, plan_text
from memdlm import Batch, MemDLM
from runs import build
from settings import Parser, REAL, Settings, add_flags, names_of, one_line, settings_from_flags
from train import Processes, make_batch, make_optimizer, outer_step

NAMES = [name for name in names_of("method", "inner loop", "optimisation", "real models", "loading")
         if name not in ("memory", "from_adapter", "merge", "warmup")] + ["seed"]

# Middle-sized shapes: small enough for one thread of a CPU, large enough that matrix products decide.
MIDDLE = dict(hidden_size=256, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=4, num_experts=16, num_experts_per_tok=4,
              mask_token_id=5, eos_token_id=6, pad_token_id=7)
MIDDLE = {"llada-moe": MIDDLE | dict(expert_intermediate_size=128),
          "llada2.1-mini": MIDDLE | dict(head_dim=64, intermediate_size=512, moe_intermediate_size=128, n_group=4, topk_group=2)}


# ---- Measuring -------------------------------------------------------------------------------------------

class Clock:
    """Seconds and peak bytes of a piece of work, on a GPU after it has really ended."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"

    def __call__(self, work):
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        work()
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin, torch.cuda.max_memory_allocated() if self.cuda else 0


def interleaved(works, repeats, clock):
    """{label: work(seed)} -> {label: (median seconds, peak bytes)}. One round of all to warm up, then `repeats` rounds."""
    times = {label: [] for label in works}
    for seed in range(repeats + 1):
        for label, work in works.items():
            times[label].append(clock(lambda: work(seed)))
    return {label: (statistics.median(seconds for seconds, _ in pairs[1:]), max(peak for _, peak in pairs)) for label, pairs in times.items()}


def flops(work):
    """Floating-point operations of the matrix products in a piece of work, attention's included."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def extra_memory(work):
    """Peak megabytes that a piece of work needs above what is there before it, on a Linux CPU; elsewhere not a number."""
    def status(field):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024

    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # give back what earlier work has left
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forget the peak
        before = status("VmRSS")
        work()
        return status("VmHWM") - before
    except (OSError, AttributeError, StopIteration):
        return float("nan")


# ---- A training step ---------------------------------------------------------------------------------------

def random_batch(vocab_size, mask_id, s, length, seed, prompt=0.75):
    """Samples of `length` random tokens, the first part a prompt."""
    x0 = torch.randint(8, vocab_size - 8, (s.batch, length), generator=torch.Generator().manual_seed(seed))
    x0[x0 == mask_id] = 0
    valid, cut = torch.ones_like(x0, dtype=torch.bool), int(length * prompt)
    maskable = torch.arange(length).expand(s.batch, -1) >= cut
    return Batch(x0, maskable, valid, [f"{seed} {i}" for i in range(s.batch)], x0[:, :cut], valid[:, :cut])


class Logits(MemDLM):
    """A plain step as it is mostly written: a logit at every position, of which most are then left out."""

    def mdlm_step(self, batch, t, xt, masked):
        h = memdlm.lower_layers(self.backbone, self.s, xt, batch.valid)
        top = memdlm.upper_layers(self.backbone, self.s, h, batch.valid, None)
        logits = self.backbone.head(top).flatten(0, 1).float()  # [B * L, V]
        nll = F.cross_entropy(logits, batch.x0.flatten().to(h.device), reduction="none").view_as(masked)
        return nll * masked.to(h.device), {}, h


class Case(NamedTuple):
    name: str
    backbone: object
    s: Settings
    batch: object  # seed -> Batch


def steps_of(case):
    """{label: work(seed)}: forward, backward and optimiser of each kind of step."""
    backbone, parameters = case.backbone, [p for p in case.backbone.parameters() if p.requires_grad]
    optimizer, processes = make_optimizer(case.s, parameters), Processes()
    plain = replace(case.s, memory=False)
    models = {"plain": MemDLM(backbone, plain), "MemDLM": MemDLM(backbone, case.s), "plain, logits everywhere": Logits(backbone, plain)}

    def step(label, seed):
        backbone.train()
        optimizer.zero_grad()
        outer_step(case.s, models[label], [case.batch(seed)], False, processes)
        torch.nn.utils.clip_grad_norm_(parameters, case.s.grad_clip)
        optimizer.step()
    return {label: lambda seed, label=label: step(label, seed) for label in models}


def floor(case, seed, plain):
    """FLOPs that no arrangement of the same mathematics can save.

    A MemDLM step is a plain step and, before it, the inner loop. Stage 1 reads the pre-anchor, whose layers below phi nobody else
    computes: one more forward of these. Stage 2 reads the anchor, as the outer step does: for nothing. The layers with phi and
    the head run forward and backward in each stage, for phi changes between them; backward only as far as phi is.
    """
    backbone, s, batch = case.backbone, case.s, case.batch(seed)
    if s.memory_from == "prompt":
        return plain + flops(lambda: memdlm.adapt(backbone, s, batch.prompt, batch.prompt_valid, batch.seeds))
    t = s.min_t + (1 - s.min_t) * memdlm.uniform(batch.seeds, "t", 1)[:, 0]
    xt, masked = memdlm.corrupt(batch.x0, batch.maskable, t, memdlm.uniform(batch.seeds, "anchor", batch.x0.shape[1]), backbone.mask_id)
    path = memdlm.stages(s, batch.x0, masked, batch.maskable, t, batch.seeds, backbone.mask_id, weighted=True)
    with torch.no_grad():
        h = memdlm.lower_layers(backbone, s, xt, batch.valid)
        prefix = flops(lambda: memdlm.lower_layers(backbone, s, path[0].x, batch.valid))
    phi = memdlm.fresh_phi(backbone, s, batch.seeds if s.per_sample else batch.seeds[:1])
    return plain + prefix + flops(lambda: memdlm.inner_loop(backbone, s, path, batch.x0, batch.valid, lambda x: h, phi))


def training(case, repeats, clock):
    """A row of the table of steps."""
    works, seeds = steps_of(case), range(4)
    gf = {label: sum(flops(lambda: works[label](seed)) for seed in seeds) / 4 for label in ("plain", "MemDLM")}
    least = sum(floor(case, seed, 0) for seed in seeds) / 4 + gf["plain"]
    batch = case.batch(0)

    def forward(seed):
        with torch.no_grad():
            memdlm.upper_layers(case.backbone.eval(), case.s, memdlm.lower_layers(case.backbone, case.s, batch.x0, batch.valid), batch.valid, None)

    works["forward"] = forward
    works["adapt"] = lambda seed: memdlm.adapt(case.backbone.eval(), case.s, batch.x0, batch.valid, batch.seeds)
    gf |= {label: flops(lambda: works[label](0)) for label in ("forward", "adapt")}
    times = interleaved(works, repeats, clock)
    memory = {label: extra_memory(lambda: works[label](0)) for label in ("plain", "MemDLM", "adapt")}
    seconds = {label: value[0] for label, value in times.items()}
    return {"case": case.name, "seconds": seconds, "gflop": {label: x / 1e9 for label, x in gf.items()}, "extra_mb": memory,
            "ratio": seconds["MemDLM"] / seconds["plain"], "counted": gf["MemDLM"] / gf["plain"], "floor": least / gf["plain"],
            "against_logits_everywhere": seconds["plain"] / seconds["plain, logits everywhere"],
            "adapt_forwards": seconds["adapt"] / seconds["forward"], "adapt_forwards_counted": gf["adapt"] / gf["forward"]}


def steps_table(rows):
    head = ("case", "plain s", "MemDLM s", "ratio", "counted", "floor", "plain GF", "MemDLM GF", "plain / logits everywhere",
            "adapt / forward", "counted", "MB plain", "MB MemDLM", "MB adapt")
    yield head
    for r in rows:
        s, g, m = r["seconds"], r["gflop"], r["extra_mb"]
        yield (r["case"], f"{s['plain']:.3f}", f"{s['MemDLM']:.3f}", f"{r['ratio']:.2f}", f"{r['counted']:.2f}", f"{r['floor']:.2f}",
               f"{g['plain']:.1f}", f"{g['MemDLM']:.1f}", f"{r['against_logits_everywhere']:.2f}", f"{r['adapt_forwards']:.2f}",
               f"{r['adapt_forwards_counted']:.2f}", *(f"{m[k]:.0f}" for k in ("plain", "MemDLM", "adapt")))


# ---- Decoding ------------------------------------------------------------------------------------------------

def decoding(case, prompt, new, repeats, clock):
    """Seconds per new token after a prompt, as we decode and by a forward pass of everything per token; positions computed."""
    backbone, s = case.backbone.eval(), replace(case.s, batch=1)
    batch = random_batch(backbone.vocab_size, backbone.mask_id, s, prompt + new, 0, prompt / (prompt + new))
    computed = [0]

    def counted(module, inputs):
        computed[0] += inputs[0].numel()

    def ours(seed):
        for _ in backbone.decoder(backbone, s, batch.x0, batch.maskable, batch.valid, batch.seeds):
            pass

    def window(seed):  # one token by the whole window, with a block's logits
        with torch.no_grad():
            h = memdlm.upper_layers(backbone, s, memdlm.lower_layers(backbone, s, batch.x0, batch.valid), batch.valid, None)
            backbone.head(h[:, -min(32, new):])

    table = backbone.part("embed") if hasattr(backbone, "part") else backbone.embedding
    handle = table.register_forward_pre_hook(counted)
    ours(0)
    handle.remove()
    times = interleaved({"ours": ours, "window": window}, repeats, clock)
    per_token = times["ours"][0] / new
    return {"case": case.name, "prompt": prompt, "new": new, "positions": computed[0], "window_positions": new * (prompt + new),
            "seconds_per_token": per_token, "window_seconds_per_token": times["window"][0], "times_faster": times["window"][0] / per_token}


def decoding_table(rows):
    yield "case", "prompt", "new", "s / token", "s / token, whole window", "times faster", "positions", "of the whole window"
    for r in rows:
        yield (r["case"], str(r["prompt"]), str(r["new"]), f"{r['seconds_per_token']:.4f}", f"{r['window_seconds_per_token']:.4f}",
               f"{r['times_faster']:.1f}", f"{r['positions']:,}", f"{r['window_positions']:,}")


def batch_of_eight(repeats, clock):
    """The toy, closed book: adapting and decoding 8 prompts at once against one by one."""
    s = settings_from_flags({"threads": 1})
    data, model = build(s)
    column = "64 x1"

    def answer(numbers):
        batch = data.tests(column, numbers, s.closed_book)
        phi, _ = memdlm.adapt(model.backbone, s, batch.prompt, batch.prompt_valid, batch.seeds)
        for _ in memdlm.denoise(model.backbone, s, batch.x0, batch.maskable, batch.valid, batch.seeds, phi):
            pass

    times = interleaved({"at once": lambda seed: answer(range(8)), "one by one": lambda seed: [answer([i]) for i in range(8)]},
                        repeats * 5, clock)
    return times["one by one"][0] / times["at once"][0]


# ---- The table of a CPU -----------------------------------------------------------------------------------------

def middle(name, vocabulary, lora=True):
    raw = PUBLISHED[name] | MIDDLE[name] | {"vocab_size": vocabulary}
    backbone = load_backbone(raw, random=True, dtype="float32", device="cpu")
    if lora:
        add_lora(backbone, 32, 64.0, 0.05)
    s = Settings(model=name, batch=2)
    return Case(f"{name}, {vocabulary // 1024}k words", backbone, s,
                lambda seed: random_batch(vocabulary, backbone.mask_id, s, 512, seed, 0.25))


def toy(kind):
    s = settings_from_flags({"data": kind, "threads": 1})
    data, model = build(s)
    return Case(f"toy, {kind}", model.backbone, s, lambda seed: make_batch(s, data, seed))


def show(rows):
    rows = list(rows)
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for number, row in enumerate(rows):
        print("| " + " | ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, wide))) + " |")
        if number == 0:
            print("|" + "|".join("-" * (w + 2) for w in wide) + "|")
    print(flush=True)


def cpu_table(quick, repeats):
    """The toy and the middle-sized shapes, one thread."""
    torch.set_num_threads(1)
    clock, steps, decodes = Clock(torch.device("cpu")), [], []
    for make in [lambda: toy("dictionary"), lambda: toy("languages"),
                 *((lambda name=name, v=v: middle(name, v)) for name in MIDDLE for v in ((8192,) if quick else (8192, 32768)))]:
        steps.append(training(make(), repeats, clock))
        print(steps[-1]["case"], "measured", flush=True)
    for name in MIDDLE:
        case = middle(name, 8192, lora=False)  # as after merging it
        in_blocks = case.backbone.decoder is not memdlm.denoise
        sizes = [(prompt, 32 if in_blocks else 2) for prompt in (256, 1024, 4096)] + [(1024, 128)] * in_blocks
        for prompt, new in sizes[:2] if quick else sizes:
            decodes.append(decoding(case, prompt, new, 1 if prompt > 1024 else repeats, clock))
    eight = batch_of_eight(repeats, clock)
    print()
    show(steps_table(steps))
    show(decoding_table(decodes))
    print(f"toy: adapting to and answering 8 prompts at once is {eight:.1f} times faster than one by one")
    return {"steps": steps, "decoding": decodes, "toy_batch_of_eight": eight}


# ---- The full shapes on a GPU --------------------------------------------------------------------------------------

def full(name, s, length, repeats, tiny, new_tokens):
    raw = PUBLISHED[name] | (TINY[name] | {"mask_token_id": 301, "eos_token_id": 300} if tiny else {})
    parts = memory_plan(translate(raw), s, length)
    print(plan_text(parts))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock, result, box = Clock(device), {"planned": dict(parts), "planned_total": sum(size for _, size in parts)}, {}

    def build():
        box["backbone"] = load_backbone(raw, random=True, load_4bit=s.load_4bit, dtype=s.dtype, device=device, attention=s.attention,
                                     checkpointing=s.checkpointing, experts=s.experts)
        if s.lora:
            add_lora(box["backbone"], s.lora_rank, s.lora_alpha, s.lora_dropout, s.lora_scope, s.lora_router, s.lora_dtype)
        elif not s.load_4bit:
            box["backbone"].requires_grad_(True)
    result["load"] = clock(build)
    backbone = box["backbone"]
    print(describe(backbone), flush=True)
    case = Case(name, backbone, s, lambda seed: random_batch(backbone.config.vocab_size - 64, backbone.mask_id, s, length, seed))
    batch = case.batch(0)
    grown = random_batch(backbone.config.vocab_size - 64, backbone.mask_id, s, length + new_tokens, 0, length / (length + new_tokens))

    def decode(seed):
        for _ in backbone.decoder(backbone.eval(), s, grown.x0, grown.maskable, grown.valid, grown.seeds):
            pass

    def forward(seed):
        with torch.no_grad():
            memdlm.upper_layers(backbone.eval(), s, memdlm.lower_layers(backbone, s, batch.x0, batch.valid), batch.valid, None)
    steps = steps_of(case)
    works = {"plain step": steps["plain"], "MemDLM step": steps["MemDLM"], "forward pass": forward,
             "prompt adaptation": lambda seed: memdlm.adapt(backbone.eval(), s, batch.x0, batch.valid, batch.seeds),
             f"decoding {new_tokens} tokens": decode}
    for label, (seconds, peak) in interleaved(works, repeats, clock).items():
        result[label] = [seconds, peak]
        print(f"{label:22} {seconds:8.3f} s" + (f"   peak {peak / 2**30:6.2f} GiB" if peak else ""), flush=True)
    print(f"MemDLM / plain step    {result['MemDLM step'][0] / result['plain step'][0]:8.2f}")
    return result


# ---- Scale, on paper -------------------------------------------------------------------------------------------------

def forward_flops(c, rows, length):
    """FLOPs of `rows` tokens, in samples of `length`, through one layer and through the head: 2 per weight and token, and attention's
    two products with every key. An adapted matrix adds 2 r (in + out), r = 32."""
    D, q, kv = c.width, c.heads * c.head_dim, c.kv_heads * c.head_dim
    shapes = [(D, q), (D, kv), (D, kv), (q, D)] if len(FAMILIES[c.family].attention) > 2 else [(D, q + 2 * kv), (q, D)]
    inner = [(c.expert_ffn, c.top_k), (c.shared, 1)] if c.experts else [(c.ffn, 1)]
    attention = sum(2 * a * b + 2 * 32 * (a + b) for a, b in shapes) + 4 * length * q
    routed = sum(k * 3 * (2 * D * f + 2 * 32 * (D + f)) for f, k in inner if f) + 2 * D * c.experts
    return rows * (attention + routed), rows * 2 * D * c.vocab_size


def scale():
    """FLOPs of a MemDLM step on the full models, from the rule above, and memory by --plan, at growing lengths."""
    yield ("model", "tokens", "plain TFLOP", "MemDLM TFLOP", "ratio", "s / step at 100 TFLOP/s", "GiB", "24 GB card", "80 GB card")
    for name in ("llada-moe", "llada2.1-mini"):
        c = translate(PUBLISHED[name])
        extra = dict(optimizer="adamw8bit", lora_dtype="bfloat16") if name == "llada2.1-mini" else {}
        s = Settings(model=name, batch=1, load_4bit=True, **extra)
        first = memdlm.first_fast_layer(c.layers, s.layer_fraction)
        for length in (4096, 8192, 16384, 32768):
            layer, head = forward_flops(c, length, length)
            masked = head * 0.75 * 0.5  # three quarters are response, half of it masked on average
            # Frozen weights: backward costs one more forward, for the gradient of the input; checkpointing computes the layers
            # below phi a second time.
            plain = (c.layers + first) * layer + masked + c.layers * layer + masked
            stages = first * layer + 2 * (2 * (c.layers - first) * layer) + 2 * masked * (1.25 + 1)  # 1.25: the pre-anchor has more masks
            size = sum(part for _, part in memory_plan(c, s, length)) / 2**30
            yield (name, f"{length:,}", f"{plain / 1e12:.1f}", f"{(plain + stages) / 1e12:.1f}", f"{(plain + stages) / plain:.2f}",
                   f"{(plain + stages) / 1e14:.1f}", f"{size:.1f}", *("fits" if size * 2**30 < room else "no" for room in (24e9, 80e9)))


SCALE = """Counted, not measured: one micro-batch of one sample, 4-bit weights, LoRA r 32 on all linear layers, three quarters of a sample
response. A step of the published run is 32 of these: multiply by 32, divide by the GPUs. A card delivers a part of its peak (bfloat16
products with 4-bit weights: often 20 to 50 %); divide the TFLOP by what yours does. On N GPUs each computes its samples alone,
phi included, and once per step all exchange the LoRA's gradients: {lora} for the two models, in float32, so a step of 32
micro-batches hides it where the link moves that in less than a second."""


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="without a model: fewer cases")
    parser.add_argument("--scale", action="store_true", help="count the full models' work and memory at growing lengths, and stop")
    parser.add_argument("--model", choices=list(PUBLISHED), help="a full model's shapes, on a GPU")
    parser.add_argument("--random", action="store_true", help="random weights of the published shapes (the only kind there is yet)")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for a CPU")
    parser.add_argument("--length", type=int, default=4096, help="tokens per sample [default 4096]")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to decode after the prompt [default 32]")
    parser.add_argument("--repeats", type=int, default=3, help="measured rounds, of which the median is shown [default 3]")
    parser.add_argument("--json", metavar="FILE", help="write the numbers, with hardware and versions")
    add_flags(parser, NAMES)
    given = vars(parser.parse_args())
    quick, count, name, random, tiny, length, new, repeats, file = (given.pop(k) for k in (
        "quick", "scale", "model", "random", "tiny", "length", "new_tokens", "repeats", "json"))
    with one_line():
        if min(repeats, length, new) < 1:
            raise ValueError("--repeats, --length and --new-tokens must be at least 1")
        if count:
            show(scale())
            sizes = [sum(32 * (m.in_features + m.out_features) for m in adapted(name)) * 4 / 1e9 for name in ("llada-moe", "llada2.1-mini")]
            print(SCALE.format(lora=" and ".join(f"{size:.2f} GB" for size in sizes)))
            return
        if name is None:
            result = cpu_table(quick, repeats)
        else:
            if not random:
                raise ValueError("give --random: the published shapes with random weights")
            if given.get("load_4bit", True) and not given.get("lora", True):
                raise ValueError("4-bit weights cannot be trained themselves: add --no-load-4bit to --no-lora")
            if not tiny and not torch.cuda.is_available():
                raise ValueError("the full shapes need a GPU; on a CPU use --tiny, or no --model at all")
            s = Settings(**{"batch": REAL["batch"], "load_4bit": True, **given, "model": name})
            if s.threads:
                torch.set_num_threads(s.threads)
            result = {"model": name, "tiny": tiny, "length": length, **full(name, s, length, repeats, tiny, new)}
    if file:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        with open(file, "w") as out:
            json.dump({"device": device, "versions": versions, "settings": given, **result}, out, indent=1)


def adapted(name):
    """The linear layers that get a LoRA, of the published shapes, without their weights."""
    c = translate(PUBLISHED[name])
    with torch.device("meta"):
        network = build_network(c)
    targets = lora_targets(c, "all", False)
    return [m for n, m in network.named_modules() if isinstance(m, torch.nn.Linear) and n.rpartition(".")[2] in targets]


def processor():
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.partition(":")[2].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()

"""Measure a full model's training step and memory, without its weights: the true shapes, filled with random numbers.

    python bench.py --model llada-moe --random                a GPU; 4-bit, one layer at a time, no download
    python bench.py --model llada2.1-mini --random --optimizer adamw8bit --lora-dtype bfloat16
    python bench.py --model llada-moe --random --tiny         the same code on a CPU, in seconds

Prints the planned memory beside the measured, and the time of a plain step, a MemDLM step, prompt adaptation and decoding.
"""
from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from dataclasses import replace

import torch

import llada
import memdlm
from memdlm import Batch, MemDLM
from train import FULL, Settings, add_flags, decoder, make_optimizer, one_line, outer_step, Processes

NAMES = [f for f in Settings.__dataclass_fields__ if f not in (
    "model", "data", "steps", "epochs", "control", "width", "layers", "heads", "prompt_length", "response_length", "skip_bad",
    "log_every", "save_every", "sample_every", "table_samples", "eval_every", "eval_samples", "from_adapter", "max_length",
    "truncate", "split_seed", "eos_loss", "warmup", "memory")]


def random_batch(config, s, length, seed):
    """Samples of `length` random tokens, the last quarter a response."""
    x0 = torch.randint(0, config.vocab_size - 64, (s.batch, length), generator=torch.Generator().manual_seed(seed))
    x0[x0 == config.mask_id] = 0
    valid = torch.ones_like(x0, dtype=torch.bool)
    maskable = torch.arange(length).expand(s.batch, -1) >= length * 3 // 4
    return Batch(x0, maskable, valid, [f"{seed} {i}" for i in range(s.batch)], x0[:, :length * 3 // 4], valid[:, :length * 3 // 4])


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


def measure(name, s, length, repeats, tiny, new_tokens):
    raw = llada.PUBLISHED[name] | (llada.TINY[name] | {"mask_token_id": 301, "eos_token_id": 300} if tiny else {})
    parts = llada.plan(llada.translate(raw), s, length)
    print(llada.plan_text(parts))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock, result = Clock(device), {"planned": dict(parts), "planned_total": sum(size for _, size in parts)}
    box = {}

    def build():
        box["backbone"] = llada.load(raw, random=True, load_4bit=s.load_4bit, dtype=s.dtype, device=device, attention=s.attention,
                                     checkpointing=s.checkpointing)
        if s.lora:
            llada.add_lora(box["backbone"], s.lora_rank, s.lora_alpha, s.lora_dropout, s.lora_scope, s.lora_router, s.lora_dtype)
        elif not s.load_4bit:
            box["backbone"].requires_grad_(True)
    result["load"] = clock(build)
    backbone = box["backbone"]
    print(llada.describe(backbone), flush=True)
    parameters = [p for p in backbone.parameters() if p.requires_grad]
    optimizer, processes = make_optimizer(s, parameters), Processes()
    models = {"plain step": MemDLM(backbone, replace(s, memory=False)), "MemDLM step": MemDLM(backbone, s)}

    def step(kind, seed):
        backbone.train()
        optimizer.zero_grad()
        outer_step(s, models[kind], [random_batch(backbone.config, s, length, seed)], False, processes)
        torch.nn.utils.clip_grad_norm_(parameters, s.grad_clip)
        optimizer.step()

    batch = random_batch(backbone.config, s, length, 0)
    fill = torch.cat([torch.zeros_like(batch.valid), torch.ones(s.batch, new_tokens, dtype=torch.bool)], dim=1)

    def decode(phi=None):
        x = torch.cat([batch.x0, torch.zeros(s.batch, new_tokens, dtype=torch.long)], dim=1)
        for _ in decoder(backbone)(backbone, s, x, fill, torch.ones_like(fill), batch.seeds, phi):
            pass

    def adapt():
        return memdlm.adapt(backbone.eval(), s, batch.x0, batch.valid, batch.seeds)

    def forward():
        with torch.no_grad():
            memdlm.above(backbone.eval(), s, memdlm.below(backbone, s, batch.x0, batch.valid), batch.valid, None)
    works = {"plain step": lambda seed: step("plain step", seed), "MemDLM step": lambda seed: step("MemDLM step", seed),
             "forward pass": lambda seed: forward(), "prompt adaptation": lambda seed: adapt(),
             f"decoding {new_tokens} tokens": lambda seed: decode()}
    times = {label: [] for label in works}
    for seed in range(repeats + 1):  # interleaved, the first round to warm up
        for label, work in works.items():
            times[label].append(clock(lambda: work(seed)))
    for label, pairs in times.items():
        seconds, peak = statistics.median(p[0] for p in pairs[1:]), max(p[1] for p in pairs)
        result[label] = [seconds, peak]
        print(f"{label:22} {seconds:8.3f} s" + (f"   peak {peak / 2**30:6.2f} GiB" if peak else ""), flush=True)
    print(f"MemDLM / plain step    {result['MemDLM step'][0] / result['plain step'][0]:8.2f}")
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(llada.PUBLISHED), required=True)
    parser.add_argument("--random", action="store_true", help="random weights of the published shapes (the only kind there is yet)")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for a CPU")
    parser.add_argument("--length", type=int, default=4096, help="tokens per sample [default 4096]")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to decode after the prompt [default 32]")
    parser.add_argument("--repeats", type=int, default=3, help="measured rounds, of which the median is shown [default 3]")
    parser.add_argument("--json", metavar="FILE", help="write the numbers, with hardware and versions")
    add_flags(parser, NAMES)
    given = vars(parser.parse_args())
    name, random, tiny, length, new, repeats, file = (given.pop(k) for k in (
        "model", "random", "tiny", "length", "new_tokens", "repeats", "json"))
    with one_line():
        if not random:
            raise ValueError("give --random: the published shapes with random weights")
        if given.get("load_4bit", True) and not given.get("lora", True):
            raise ValueError("4-bit weights cannot be trained themselves: add --no-load-4bit to --no-lora")
        if not tiny and not torch.cuda.is_available():
            raise ValueError("the full shapes need a GPU; on a CPU use --tiny")
        s = Settings(**{"batch": FULL["batch"], "load_4bit": True, **given, "model": name})
        if s.threads:
            torch.set_num_threads(s.threads)
        result = measure(name, s, length, repeats, tiny, new)
    if file:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        with open(file, "w") as out:
            json.dump({"model": name, "tiny": tiny, "length": length, "device": device, "versions": versions, "settings": given,
                       **result}, out, indent=1)


if __name__ == "__main__":
    main()

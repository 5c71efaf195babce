"""Train a masked diffusion language model with MemDLM, or the MDLM baseline.

    python train.py --model toy                     closed-book memory, seen to work within minutes on a CPU
    python train.py --model toy --data languages    the method as published, with the controls it needs
    python train.py --model toy --data python       real text (the source of Python's own library)
    python train.py --model toy --data my.jsonl     your own {"prompt": ..., "response": ...} lines
    python train.py --model toy --no-memory         the baseline: same data, same masks, no inner loop
    python train.py --model inclusionAI/LLaDA-MoE-7B-A1B-Base --load-4bit          a full model, on one GPU
    accelerate launch train.py --model ...          the same on several
    python train.py --resume                        go on where the latest run stopped, exactly

Every run leaves a folder: settings.json, origin.json (checksums of code and data), model.safetensors (what was trained, and the
optimiser), metrics.jsonl, loss.png, and for a full model adapter/, the LoRA in PEFT's format.
"""
from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import torch
from tqdm import tqdm

import memdlm
from compare import draw_losses, print_comparison
from data import collate
from files import write_whole
from runs import (build, free_folder, load_checkpoint, open_folder, save_checkpoint, settings_to_resume)
from settings import Parser, Settings, add_flags, control_settings, one_line, refuse, settings_from_flags


def train(s, folder, resume, stop, processes):
    """Train one model into its folder. Returns the seconds it took."""
    with one_line():
        data, model = build(s, device=processes.device, say=print if processes.rank == 0 else lambda text: None)
        if s.epochs:
            if not hasattr(data, "pairs"):
                raise ValueError(f"--epochs needs a data set with an end; {s.data} has none, use --steps")
            per_step = s.batch * s.accumulate * processes.count
            s = replace(s, steps=max(1, math.ceil(s.epochs * len(data.pairs["train"]) / per_step)))
            model.s = s
        parameters = [p for p in model.parameters() if p.requires_grad]
        if parameters[0].dtype is torch.bfloat16 and s.optimizer == "adamw":
            raise ValueError("AdamW would round small updates of bfloat16 weights away: use --dtype float32 (--lora-dtype for a "
                             "LoRA) or --optimizer adamw8bit, which rounds at random")
        optimizer = make_optimizer(s, parameters)
        if s.from_run and not s.toy_lora:
            load_checkpoint(s.from_run, model)
        start = load_checkpoint(folder, model, optimizer, processes.count) if resume and (folder / "model.safetensors").exists() else 0
        if main := processes.rank == 0:
            open_folder(s, folder)
    if main:
        announce(s, folder, data, parameters, processes)
    wrapped, parts = processes.wrap(model), s.accumulate * processes.count
    began = time.perf_counter()
    with open_metrics(folder if main else None, start) as metrics, \
            tqdm(total=s.steps, initial=start, unit="step", disable=not main) as bar:
        for step in range(start, s.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(s, step)
            report = step % s.log_every == 0 or step == s.steps - 1
            wrapped.train()
            dropout, rounding = step_seeds(s, step, processes)
            torch.manual_seed(dropout)
            mine = range(processes.rank * s.accumulate, (processes.rank + 1) * s.accumulate)
            batches = [make_batch(s, data, step, part, parts) for part in mine]
            optimizer.zero_grad()
            record = outer_step(s, wrapped, batches, report, processes)
            norm = torch.nn.utils.clip_grad_norm_(parameters, s.grad_clip, error_if_nonfinite=False)
            if not norm.isfinite():
                refuse(f"step {step}: loss {float(record['loss'])} and gradient norm {norm.item()} are not finite; "
                       f"the checkpoint in {folder} is from before. Try a smaller --lr or --inner-lr")
            torch.manual_seed(rounding)
            optimizer.step()
            bar.update()
            if report and main:
                log_step(record, step, learning_rate(s, step), norm, time.perf_counter() - began, metrics, bar)
            if main:
                show_progress(s, data, model, step, metrics, bar)
            stopping = bool(processes.total(int(stop.signal is not None)))
            if main and ((step + 1) % s.save_every == 0 or step == s.steps - 1 or stopping):
                with one_line():
                    save_checkpoint(folder, model, optimizer, step + 1, processes.count)
            if stopping and step < s.steps - 1:
                bar.close()
                leave(folder, step, stop, main)
    if main:
        draw_losses(folder)
    return time.perf_counter() - began


def outer_step(s, model, batches, report, processes):
    """Gradients of one step, summed over micro-batches and processes. Returns the record of numbers.

    Each micro-batch's loss is a mean over its own maskable tokens; weighted by its share of all of them, the sum is the loss
    of one large batch (Eq. 2's mean is over tokens), however it is cut.
    """
    counts = [int(batch.maskable.sum()) for batch in batches]
    all_tokens = max(1, int(processes.total(sum(counts))))
    sums = {}
    for i, (batch, count) in enumerate(zip(batches, counts)):
        with processes.quiet_between(model, i == len(batches) - 1):
            loss, record = model(batch, report)
            (loss * (count * processes.count / all_tokens)).backward()  # DDP takes the mean over processes
        masked = record.pop("masked")
        for name, value in record.items():
            # A loss is a mean over maskable tokens, a ce one over masked tokens, `inner` one over samples; skipped is a count.
            weight = {"loss": count, "ce": masked, "inner": len(batch.x0), "skipped": 1}[name.removesuffix("_without")]
            total, weights = sums.get(name, (0, 0))
            sums[name] = total + weight * value, weights + weight
    totals = {name: (processes.total(value), processes.total(weights)) for name, (value, weights) in sums.items()}
    return {name: value if name == "skipped" else value / max(1, int(weights)) for name, (value, weights) in totals.items()}


def make_batch(s, data, step, part=0, parts=1):
    """Micro-batch `part` of the `parts` of a step. It follows from seed and step alone, so resuming needs no saved random
    state, and N processes see what one process with N times the accumulation would."""
    numbers = range((step * parts + part) * s.batch, (step * parts + part + 1) * s.batch)
    names = [f"{s.seed} {step} {number - step * parts * s.batch}" for number in numbers]
    samples = [data.train(random.Random(f"data {name}"), step / s.steps, number) for name, number in zip(names, numbers)]
    batch = collate(samples, names, s.closed_book)
    if s.eos_loss:
        # Differs from our default: in the published run, padding is end tokens with labels, masked and predicted like the
        # response and visible to it. Then a sample's loss depends on what it is batched with.
        pad = ~batch.valid
        batch = replace(batch, x0=batch.x0.masked_fill(pad, data.tokenizer.eos_id), maskable=batch.maskable | pad,
                        valid=batch.valid | pad)
    return batch


def learning_rate(s, step):
    """Linear warm-up, then a cosine down to zero."""
    warm = s.warmup * s.steps
    if step < warm:
        return s.lr * min(1, (step + 1) / warm)  # (a warm-up may be shorter than a step)
    return s.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, s.steps - warm)))


def step_seeds(s, step, processes):
    """For the two things that draw from the global generator, so that a resumed run draws the same: dropout, of its own on
    each process, and rounding at random, alike on all, for nobody compares their weights again."""
    return crc32(f"{s.seed} {step} {processes.rank}".encode()), crc32(f"{s.seed} {step} rounding".encode())


def make_optimizer(s, parameters):
    if s.optimizer == "adamw":
        # Fused where it can be: the other kinds make temporary copies of everything that is trained.
        return torch.optim.AdamW(parameters, lr=s.lr, weight_decay=s.weight_decay, fused=parameters[0].is_cuda or None)
    try:
        import bitsandbytes
    except ImportError:
        raise ValueError(f"--optimizer {s.optimizer} needs bitsandbytes, which is not installed: pip install bitsandbytes") from None
    kind = getattr(bitsandbytes.optim, {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit"}[s.optimizer])

    class Rounding(kind):
        """bfloat16 weights have 8 bits: an update of 2e-5 on a weight of 0.02 would be rounded away, each time. So the step
        is taken in float32 and rounded at random, up as often as it is near: the mean of many steps is then right."""

        def update_step(self, group, p, gindex, pindex):
            if p.dtype is not torch.bfloat16:
                return super().update_step(group, p, gindex, pindex)
            # By a stand-in: a parameter that changes its type, even for a moment, loses the hooks by which DDP exchanges gradients.
            wide = torch.nn.Parameter(p.detach().float())
            wide.grad, p.grad = p.grad.float(), None
            self.state[wide] = self.state[p]
            super().update_step(group, wide, gindex, pindex)
            del self.state[wide]
            p.data.copy_(round_at_random(wide.detach()))

    return Rounding(parameters, lr=s.lr, weight_decay=s.weight_decay)


def round_at_random(x):
    """float32 -> bfloat16, to one of the two neighbours, the nearer one more often: right on average."""
    low = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device)  # what is cut off, and a random carry
    return ((x.view(torch.int32) + low) & -65536).view(torch.float32).to(torch.bfloat16)


class Processes:
    """One process, or those that `accelerate launch` started: each works on its share of every step."""

    def __init__(self):
        self.accelerator, self.rank, self.count, self.device = None, 0, 1, None
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from accelerate import Accelerator
            from accelerate.utils import DistributedDataParallelKwargs
            # Experts that no token chose have no gradient: DDP has to be told that this can happen.
            unused = DistributedDataParallelKwargs(find_unused_parameters=True)
            self.accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[unused])  # whatever its own settings say
            self.rank, self.count = self.accelerator.process_index, self.accelerator.num_processes
            self.device = self.accelerator.device

    def wrap(self, model):
        if not self.accelerator:
            return model
        self.accelerator.free_memory()  # of the run before this one
        return self.accelerator.prepare(model)

    def total(self, value):
        """The sum over processes of a number or tensor."""
        return self.accelerator.reduce(torch.as_tensor(value, device=self.device), "sum") if self.accelerator else value

    def quiet_between(self, model, last):
        """Gradients are exchanged once per step, at its last micro-batch."""
        return contextlib.nullcontext() if last or not self.accelerator else self.accelerator.no_sync(model)


class Stop:
    """Ctrl-C and SIGTERM ask for a stop; the loop then saves and leaves. A second Ctrl-C leaves at once."""

    def __init__(self):
        self.signal = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)


def leave(folder, step, stop, main):
    """After Ctrl-C or SIGTERM, with everything saved."""
    whole = folder.parent if folder.name == "control" else folder
    if main:
        print(f"stopped after step {step + 1} and saved; go on with: python train.py --resume {whole}")
    sys.exit(128 + (stop.signal or signal.SIGTERM))


def announce(s, folder, data, parameters, processes):
    if data.note:
        print(data.note)
    kind = f"memory written from the {s.memory_from}" if s.memory else "no memory"
    share = f", {processes.count} processes" if processes.count > 1 else ""
    print(f"{folder}: {sum(p.numel() for p in parameters):,} trained weights, {kind}, {'closed' if s.closed_book else 'open'} "
          f"book, {s.steps} steps of {s.batch * s.accumulate * processes.count} samples{share}", flush=True)


def show_progress(s, data, model, step, metrics, bar):
    """Now and then: a sample, and the held-out loss."""
    if s.sample_every and step % s.sample_every == s.sample_every - 1:
        model.eval()
        bar.write(sample_line(s, data, model, step + 1))
    if s.eval_every and (step % s.eval_every == s.eval_every - 1 or step == s.steps - 1):
        values = measure_held_out(s, data, model)
        metrics.write(json.dumps({"step": step, **values}) + "\n")
        bar.write(f"  held out after step {step + 1}: " + ", ".join(f"{name[9:]} {x:.3f}" for name, x in values.items()))


def sample_line(s, data, model, step):
    """A held-out sample, denoised: the question with gaps, the model's answer, the truth."""
    columns = list(data.columns)
    batch = data.tests(columns[step % len(columns)], [step], s.closed_book, name="sample")
    if s.model != "toy":  # the first words of the reply
        first = batch.maskable & (batch.maskable.cumsum(1) <= 32)
        end = int(first[0].nonzero().max()) + 1
        batch = replace(batch, x0=batch.x0[:, :end], maskable=first[:, :end], valid=batch.valid[:, :end])
    phi = None
    if s.memory and s.memory_from == "prompt":
        phi, _ = memdlm.adapt(model.backbone, s, batch.prompt, batch.prompt_valid, batch.seeds)
    canvas = batch.x0
    for canvas in model.backbone.decoder(model.backbone, s, batch.x0, batch.maskable, batch.valid, batch.seeds, phi):
        pass
    show, answer = data.tokenizer.decode, batch.maskable[0]
    right = int((canvas[0] == batch.x0[0])[answer].sum())
    prompt, seen = show(batch.prompt[0].tolist()), 0 if s.closed_book else int(batch.prompt_valid[0].sum())
    if len(prompt) > 60:
        prompt = "... " + prompt[-60:].partition(" ")[2]
    rest = show(canvas[0][seen:].tolist())
    return (f"  sample at step {step}: {prompt!r} -> {rest!r}, {right} of {int(answer.sum())} right; "
            f"truth {show(batch.x0[0][answer].tolist())!r}")


@torch.no_grad()
def measure_held_out(s, data, model):
    """Cross-entropy per masked token of held-out samples, with memory and without, under the same masks every time."""
    model.eval()
    column, sums = next(iter(data.columns)), {}
    for start in range(0, s.eval_samples, s.batch):
        numbers = range(start, min(start + s.batch, s.eval_samples))
        _, record = model(data.tests(column, numbers, s.closed_book, name="held out"), True)
        for name in ("masked", "ce", "ce_without"):
            if name in record:
                sums[name] = sums.get(name, 0) + float(record[name]) * (1 if name == "masked" else int(record["masked"]))
    return {f"held_out_{name}": sums[name] / max(1, sums["masked"]) for name in ("ce", "ce_without") if name in sums}


def open_metrics(folder, step):
    """metrics.jsonl for appending, without the lines that a resumed run will write again."""
    path = folder / "metrics.jsonl" if folder else Path(os.devnull)
    if folder and path.exists():
        kept = [line for line in path.read_text().splitlines(True) if line.endswith("\n")]
        kept = [line for line in kept if json.loads(line)["step"] < step]
        write_whole(path, lambda aside: aside.write_text("".join(kept)))
    return open(path, "a", buffering=1)


def log_step(record, step, lr, norm, seconds, metrics, bar):
    """One line of metrics.jsonl, and the same numbers on the bar."""
    values = {name: torch.as_tensor(value).tolist() for name, value in record.items()}
    shown = {"ce with memory" if "inner" in values else "ce": f"{values['ce']:.3f}"}
    if "inner" in values:
        shown |= {"without": f"{values['ce_without']:.3f}", "inner": ">".join(f"{x:.2f}" for x in values["inner"])}
    if values.get("skipped"):
        shown["skipped"] = values["skipped"]
    bar.set_postfix(shown, refresh=False)
    metrics.write(json.dumps({"step": step, **values, "lr": lr, "grad_norm": norm.item(), "seconds": seconds}) + "\n")


def show_plan(s):
    from backbones.families import read_config
    from backbones.plan import memory_plan, plan_text
    if s.model == "toy":
        raise ValueError("--plan is for full models; the toy takes a few hundred megabytes")
    room = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 24 * 2**30
    print(plan_text(memory_plan(read_config(s.model), s, s.max_length), room))


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--out", help="run folder [default runs/ and the name of the data]")
    parser.add_argument("--plan", action="store_true", help="print the memory that the run would take, and stop (full models)")
    parser.add_argument("--resume", nargs="?", const="latest", metavar="RUN", help="go on with a run [default the latest]")
    parser.add_argument("--anyway", action="store_true", help="resume although code, data or PyTorch have changed since")
    add_flags(parser, Settings.__dataclass_fields__)
    given = vars(parser.parse_args())
    out, resume, plan, anyway = given.pop("out"), given.pop("resume"), given.pop("plan"), given.pop("anyway")
    with one_line():
        if plan:
            return show_plan(settings_from_flags(given))
        s, folder = settings_to_resume(resume, given, anyway) if resume else (settings_from_flags(given), None)
        folder = folder or Path(out or free_folder(s))
        if not resume and (folder / "settings.json").exists():
            raise ValueError(f"{folder} holds a run already: --resume {folder} goes on with it, "
                             "another --out starts anew")
    stop, processes = Stop(), Processes()
    seconds = train(s, folder, resume, stop, processes)
    if s.memory and s.control:
        print("\nnow its control: the same data and seed, without memory, with sight of the prompt")
        seconds += train(control_settings(s), folder / "control", resume, stop, processes)
    if processes.rank:
        return
    if s.table_samples:
        print_comparison([folder], s.table_samples, picture=folder / "panel.png")
    ask = "--show     answer a prompt from this run" if s.model == "toy" else '--prompt "..."     answer with this run'
    print(f"trained in {seconds:.0f} s. Look at the pictures in {folder}; next:\n"
          f"  python generate.py --adapt {ask}\n"
          f"  python evaluate.py                    compare runs, with more samples")


if __name__ == "__main__":
    main()

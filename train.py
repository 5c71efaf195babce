"""Train a masked diffusion language model with MemDLM, or the MDLM baseline.

    python train.py                          closed-book memory, in a minute on a CPU
    python train.py --data languages         the method as published, with the controls it needs
    python train.py --data python            real text: the source of Python's own library
    python train.py --data my.jsonl          your own {"prompt": ..., "response": ...} lines
    python train.py --no-memory              the baseline: the same without an inner loop
    python train.py --resume                 go on where the latest run stopped, exactly
    python train.py --model ID --load-4bit   a real model of the hub, on one GPU
    accelerate launch train.py --model ...   the same on several

Every run leaves a folder with its settings, checksums of code and data, weights, metrics and
pictures, and for a real model adapter/, the LoRA in PEFT's format.
"""
from __future__ import annotations

if __name__ == "__main__":  # first of all: a Ctrl-C may come while torch is imported
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback, until `begin` takes it
    import console
    console.begin(goes_on=True)

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
from cards import write_adapter_card
from compare import draw_losses, print_comparison
from console import (
    catch_signals, end_work, fold, format_answers, last_words, say, show_end, terminal_width,
)
from data import collate, mark_response, visible_pieces
from files import append_line
from runs import (
    build, find_run_to_resume, hold_run, load_checkpoint, missing_folders, pick_folder,
    plan_memory, save_checkpoint, trim_metrics, whole_run, write_settings,
)
from settings import (
    Parser, Settings, add_flags, control_settings, enough_memory, one_line, refuse,
    settings_from_flags,
)
from trackers import KINDS, open_tracker, pick_tracker


# ---- The loop -----------------------------------------------------------------------------------

def train(s, folder, resume, stop, processes, log="none"):
    """Train one model into its folder. Returns the seconds it took.

    resume: go on from the folder's checkpoint if it has one. stop: see `Stop`. log: a kind of
    tracker. Every process calls this and works on its share; the first one also prints and writes.
    """
    with one_line():
        s, data, model, optimizer, start = prepare(s, folder, resume, processes)
    parameters = optimizer.param_groups[0]["params"]
    first = processes.is_first
    if first:
        announce(s, folder, data, parameters, processes)
    wrapped = processes.wrap(model)
    began, stop.in_loop = time.perf_counter(), True
    with one_line(OSError), open_tracker(log if first else "none", folder, s) as tracker, \
            make_bar(s.steps, start, first) as bar:
        for step in range(start, s.steps):
            last = step == s.steps - 1
            report = step % s.log_every == 0 or last
            dropout_seed, rounding_seed = step_seeds(s, step, processes)

            wrapped.train()
            torch.manual_seed(dropout_seed)
            optimizer.zero_grad()
            batches = make_batches(s, data, step, processes)
            record = compute_gradients(s, wrapped, batches, report, processes)
            norm = torch.nn.utils.clip_grad_norm_(parameters, s.grad_clip)
            check_finite(folder, step, record, norm)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(s, step)
            torch.manual_seed(rounding_seed)
            optimizer.step()

            bar.update()
            if first and report:
                seconds = time.perf_counter() - began
                log_step(s, record, step, norm, seconds, folder, bar, tracker)
            if first:
                show_progress(s, data, model, step, folder, bar, tracker)
            stopping = bool(processes.add_up(int(stop.signal is not None)))
            if first and ((step + 1) % s.save_every == 0 or last or stopping):
                save_checkpoint(folder, model, optimizer, step + 1, processes.count)
                if model.backbone.has_lora:
                    write_adapter_card(s, folder, step + 1, processes.count)
            if stopping:
                bar.close()
                leave(folder, step, stop, first)
    stop.in_loop = False
    if first:
        with spare_the_run("loss.png"):
            draw_losses(folder)
    return time.perf_counter() - began


def prepare(s, folder, resume, processes):
    """All that the loop needs: settings, data, model, optimiser and the step to start from.

    ValueError, one line, where something does not fit.
    """
    data, model = build(s, device=processes.device, say=processes.say)
    if s.epochs:
        s = model.s = replace(s, steps=steps_of_epochs(s, data, processes))
    parameters = [p for p in model.parameters() if p.requires_grad]
    if parameters[0].dtype is torch.bfloat16 and s.optimizer == "adamw":
        raise ValueError("AdamW would round small updates of bfloat16 weights away: use --dtype "
                         "float32 (--lora-dtype for a LoRA) or --optimizer adamw8bit, which rounds "
                         "at random")
    optimizer, start = make_optimizer(s, parameters), 0
    if s.from_run and not s.toy_lora:
        load_checkpoint(s.from_run, model)
    if resume and (folder / "model.safetensors").exists():
        start = load_checkpoint(folder, model, optimizer, processes.count)
    if processes.is_first:
        write_settings(s, folder)
        trim_metrics(folder, start)
    return s, data, model, optimizer, start


def steps_of_epochs(s, data, processes):
    """The number of steps of --epochs passes over the training samples, rounded up."""
    if not data.pairs:
        raise ValueError(f"--epochs needs a data set with an end; {s.data} has none, use --steps")
    per_step = s.batch * s.accumulate * processes.count
    return max(1, math.ceil(s.epochs * len(data.pairs["train"]) / per_step))


def learning_rate(s, step):
    """Linear warm-up, then a cosine down to zero."""
    warm = s.warmup * s.steps
    if step < warm:
        return s.lr * min(1, (step + 1) / warm)  # a warm-up may be shorter than a step
    return s.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, s.steps - warm)))


def step_seeds(s, step, processes):
    """Seeds for what draws from the global generator in a step, so that a resumed run repeats it.

    Dropout is different on each process. Rounding at random is alike on all of them: each process
    takes the step by itself, and nobody compares their weights again.
    """
    dropout = crc32(f"{s.seed} {step} {processes.rank}".encode())
    rounding = crc32(f"{s.seed} {step} rounding".encode())
    return dropout, rounding


def check_finite(folder, step, record, norm):
    """End the program with one line if the gradient holds what is not a finite number."""
    if not norm.isfinite():
        refuse(f"step {step}: loss {float(record['loss'])} and gradient norm {norm.item()} are not "
               f"finite; the checkpoint in {folder} is from before. Try a smaller --lr or "
               "--inner-lr", Diverged)


class Diverged(SystemExit):
    """The end of a run whose loss did not stay finite."""


# ---- Batches ------------------------------------------------------------------------------------

def make_batches(s, data, step, processes):
    """The micro-batches that are this process's share of a step."""
    first = processes.rank * s.accumulate
    return [make_batch(s, data, step, part, s.accumulate * processes.count)
            for part in range(first, first + s.accumulate)]


def make_batch(s, data, step, part=0, parts=1):
    """Micro-batch `part` of the `parts` of a step.

    It follows from seed and step alone. So resuming needs no saved random state, and N processes
    see what one process with N times the accumulation would see. With a batch of 2 and 2 parts:

        step 0   samples 0 1 | 2 3        step 1   samples 4 5 | 6 7
    """
    before = step * parts * s.batch  # samples of earlier steps
    samples, names = [], []
    for place in range(part * s.batch, (part + 1) * s.batch):
        name = f"{s.seed} {step} {place}"
        rng = random.Random(f"data {name}")
        samples.append(data.train(rng, step / s.steps, before + place))
        names.append(name)
    batch = collate(samples, names, s.closed_book)
    return fill_with_ends(batch, data.tokenizer.eos_id) if s.eos_loss else batch


def fill_with_ends(batch, eos_id):
    """The batch with end tokens for padding, which are part of the response (--eos-loss)."""
    # Differs: the published code pads with end tokens. It masks and predicts them like the
    # response, which can see them. We do so only if asked to: a sample's loss then depends on the
    # samples that it shares a batch with.
    pad = ~batch.valid
    return replace(batch, x0=batch.x0.masked_fill(pad, eos_id), maskable=batch.maskable | pad,
                   valid=mark_response(batch.valid | pad, batch.valid.response_at))


# ---- Gradients ----------------------------------------------------------------------------------

def compute_gradients(s, model, batches, report, processes):
    """Gradients of one step, summed over micro-batches and processes. Returns the record.

    The loss of a micro-batch is a mean over its own maskable tokens. It is weighted by its share
    of all of them. So the sum is the loss of one large batch, however that is cut: the mean of
    Eq. 2 is over tokens.
    """
    counts = [int(batch.maskable.sum()) for batch in batches]
    all_tokens = max(1, int(processes.add_up(sum(counts))))
    sums = {}  # name -> [weighted sum, sum of the weights]
    for i, (batch, count) in enumerate(zip(batches, counts)):
        with processes.defer_exchange(model, last=i == len(batches) - 1):
            loss, record = model(batch, report)
            # The exchange takes the mean over processes, hence their count.
            (loss * (count * processes.count / all_tokens)).backward()
        masked = record.pop("masked")
        # What each number is a mean over: maskable tokens, masked tokens, samples; `skipped` is
        # a count.
        weights = {"loss": count, "ce": masked, "inner": len(batch.x0), "skipped": 1}
        for name, value in record.items():
            weight = weights[name.removesuffix("_without")]
            total, whole = sums.get(name, (0, 0))
            sums[name] = total + weight * value, whole + weight
    record = {}
    for name, (total, whole) in sums.items():
        total, whole = processes.add_up(total), processes.add_up(whole)
        record[name] = total if name == "skipped" else total / max(1, int(whole))
    return record


# ---- The optimiser ------------------------------------------------------------------------------

def make_optimizer(s, parameters):
    """AdamW, or the one of bitsandbytes with 8-bit moments. ValueError if that is missing."""
    if s.optimizer == "adamw":
        # Fused: the other kinds make temporary copies of all that is trained.
        return torch.optim.AdamW(parameters, lr=s.lr, weight_decay=s.weight_decay, fused=True)
    try:
        import bitsandbytes
    except ImportError:
        raise ValueError(f"--optimizer {s.optimizer} needs bitsandbytes, which is not installed: "
                         "pip install bitsandbytes") from None
    names = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit"}
    base = getattr(bitsandbytes.optim, names[s.optimizer])
    return with_random_rounding(base)(parameters, lr=s.lr, weight_decay=s.weight_decay)


def with_random_rounding(base):
    """A class of optimisers of bitsandbytes, which rounds bfloat16 weights at random.

    bfloat16 has 8 bits: an update of 2e-5 on a weight of 0.02 would be rounded away each time. So
    the step is taken in float32 and rounded up as often as it is near. The mean of many steps is
    right then.
    """
    class Rounding(base):
        def update_step(self, group, p, gindex, pindex):
            if p.dtype is not torch.bfloat16:
                return super().update_step(group, p, gindex, pindex)
            # A stand-in takes the step. A parameter that changes its type, even for a moment,
            # loses the hooks by which the processes exchange gradients.
            wide = torch.nn.Parameter(p.detach().float())
            wide.grad, p.grad = p.grad.float(), None
            self.state[wide] = self.state[p]
            super().update_step(group, wide, gindex, pindex)
            del self.state[wide]
            p.data.copy_(round_at_random(wide.detach()))

    return Rounding


def round_at_random(x):
    """float32 -> bfloat16: one of its two neighbours, the nearer one more often.

    bfloat16 is the upper half of float32's bits. A random number is added to the lower half, which
    is then cut off. It carries into the upper half as often as x is near the neighbour above.
    """
    low = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device)
    return ((x.view(torch.int32) + low) & -65536).view(torch.float32).to(torch.bfloat16)


# ---- Processes and signals ----------------------------------------------------------------------

class Processes:
    """One process, or those that `accelerate launch` started: each does its share of a step."""

    def __init__(self):
        self.accelerator, self.rank, self.count, self.device = None, 0, 1, None
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from accelerate import Accelerator
            from accelerate.utils import DistributedDataParallelKwargs
            # Experts that no token chose have no gradient. DDP has to be told that this happens.
            # The gradients lie in what is exchanged: apart they would take as much memory again.
            ours = DistributedDataParallelKwargs(find_unused_parameters=True,
                                                 gradient_as_bucket_view=True)
            # Precision is ours to set, whatever accelerate's own settings say.
            self.accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[ours])
            self.rank = self.accelerator.process_index
            self.count = self.accelerator.num_processes
            self.device = self.accelerator.device

    @property
    def is_first(self):
        return self.rank == 0

    def say(self, text):
        """Print once, not once per process."""
        if self.is_first:
            say(text)

    def wrap(self, model):
        """The model to call in training: itself, or in DDP, which exchanges gradients."""
        if not self.accelerator:
            return model
        self.accelerator.free_memory()  # of the run before this one
        return self.accelerator.prepare(model)

    def add_up(self, value):
        """The sum over processes of a number or tensor."""
        if not self.accelerator:
            return value
        return self.accelerator.reduce(torch.as_tensor(value, device=self.device), "sum")

    def defer_exchange(self, model, last):
        """A context for a backward pass. Gradients are exchanged at a step's last one only."""
        if last or not self.accelerator:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(model)


class Stop:
    """Ctrl-C, SIGTERM and SIGHUP ask for a stop, which the loop sees in `signal`: it saves, leaves.

    Outside the loop, and the second time, they end the program at once.
    """

    def __init__(self):
        self.signal, self.in_loop = None, False
        catch_signals(self)

    def __call__(self, number, frame):
        if not self.in_loop:
            end_work(number)
        self.signal = number
        signal.signal(number, signal.SIG_DFL)


def leave(folder, step, stop, first):
    """End the program after a signal, when everything is saved."""
    run = whole_run(folder)
    if first:
        say(f"stopped after step {step + 1} and saved; go on with: "
            f"python train.py --resume {run}")
    sys.exit(128 + (stop.signal or signal.SIGTERM))


# ---- What is logged and shown -------------------------------------------------------------------

def announce(s, folder, data, parameters, processes):
    """Print what is about to be trained."""
    if data.note:
        say(fold(data.note))
    weights = sum(p.numel() for p in parameters)
    memory = f"memory written from the {s.memory_from}" if s.memory else "no memory"
    book = "closed" if s.closed_book else "open"
    samples = s.batch * s.accumulate * processes.count
    share = f", {processes.count} processes" if processes.count > 1 else ""
    memory += ", second-order gradient" if s.order == "second" else ""
    book += f" book, objective {s.objective}" if s.objective != "mdlm" else " book"
    say(fold(f"{folder}: {weights:,} trained weights, {memory}, {book}, {s.steps} steps of "
             f"{samples} samples{share}"))
    sys.stdout.flush()


def write_metrics(folder, values, tracker):
    """Add a line to metrics.jsonl, and send it to the run's tracker."""
    append_line(folder / "metrics.jsonl", json.dumps(values))
    tracker.log(values)


def make_bar(steps, start, first):
    """The bar of a training. Where the output is a file, `show_numbers` prints lines instead."""
    form = "{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} steps, {remaining} left{postfix}"
    return tqdm(total=steps, initial=start, disable=None if first else True, bar_format=form,
                ncols=min(100, terminal_width()))


def log_step(s, record, step, norm, seconds, folder, bar, tracker):
    """Write one line of metrics.jsonl, and show what matters of it."""
    values = {name: torch.as_tensor(value).tolist() for name, value in record.items()}
    lr = learning_rate(s, step)
    line = {"step": step, **values, "lr": lr, "grad_norm": norm.item(), "seconds": seconds}
    write_metrics(folder, line, tracker)
    show_numbers(s, values, step, seconds, bar)


def show_numbers(s, values, step, seconds, bar):
    """Show the loss on the bar, in nats per masked token; or ten times a run as a line."""
    shown = f"loss {values['ce']:.3f}"
    if "ce_without" in values:
        shown += f" with memory, {values['ce_without']:.3f} without"
    if values.get("skipped"):
        shown += f", {values['skipped']} inner steps left out"
    bar.set_postfix_str(shown, refresh=False)
    tenth, done = max(1, s.steps // 10), step + 1
    if bar.disable and done // tenth > (done - s.log_every) // tenth:
        say(f"step {done} of {s.steps}: {shown}, {seconds:.0f} s")


def show_progress(s, data, model, step, folder, bar, tracker):
    """Show a sample every --sample-every steps, and the held-out loss every --eval-every."""
    if s.sample_every and step % s.sample_every == s.sample_every - 1:
        bar.write(describe_sample(s, data, model, step + 1))
    if s.eval_every and (step % s.eval_every == s.eval_every - 1 or step == s.steps - 1):
        values = measure_held_out(s, data, model)
        held_out = {f"held_out_{name}": value for name, value in values.items()}
        write_metrics(folder, {"step": step, **held_out}, tracker)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
        bar.write(f"  held out after step {step + 1}: {shown}")


def describe_sample(s, data, model, step):
    """A held-out sample, decoded: prompt, answer, and what is right. It is ready to be printed."""
    model.eval()
    columns = list(data.columns)
    batch = data.tests(columns[step % len(columns)], [step], s.closed_book, name="sample")
    batch = batch if s.model == "toy" else cut_reply(batch, 32)
    phi = None
    if s.memory and s.memory_from == "prompt":
        phi, _ = memdlm.adapt(model.backbone, s, batch.prompt, batch.prompt_valid, batch.seeds)
    canvas = batch.x0
    for canvas in model.backbone.decoder(model.backbone, s, batch.x0, batch.maskable, batch.valid,
                                         batch.seeds, phi):
        pass
    start, answer = 0 if s.closed_book else int(batch.prompt_valid[0].sum()), batch.maskable[0]
    own, truth = (visible_pieces(data.tokenizer.pieces(ids[0][start:].tolist()))
                  for ids in (canvas, batch.x0))
    asked = [piece if gap else None for piece, gap in zip(truth, answer[start:].tolist())]
    right = int((canvas[0] == batch.x0[0])[answer].sum())
    return "\n".join([
        f"sample at step {step}: {right} of {int(answer.sum())} right",
        show_end("prompt", data.tokenizer.decode(batch.prompt[0].tolist())),
        format_answers([("answer", own)], asked, data.words)])


def cut_reply(batch, most):
    """A batch of one sample, with only the first tokens of its reply, `most` of them."""
    first = batch.maskable & (batch.maskable.cumsum(1) <= most)
    end = int(first[0].nonzero().max()) + 1
    valid = mark_response(batch.valid[:, :end], batch.valid.response_at)
    return replace(batch, x0=batch.x0[:, :end], maskable=first[:, :end], valid=valid)


@torch.no_grad()
def measure_held_out(s, data, model):
    """Cross-entropy per masked token of held-out samples, under the same masks every time.

    Returns {"ce": nats, "ce_without": nats}, the second without memory, if there is one.
    """
    model.eval()
    column, sums, tokens = list(data.columns)[0], {}, 0
    for start in range(0, s.eval_samples, s.batch):
        numbers = range(start, min(start + s.batch, s.eval_samples))
        batch = data.tests(column, numbers, s.closed_book, name="held out")
        _, record = model(batch, report=True)
        masked = int(record["masked"])
        tokens += masked
        for name in ("ce", "ce_without"):
            if name in record:
                sums[name] = sums.get(name, 0) + float(record[name]) * masked
    return {name: total / max(1, tokens) for name, total in sums.items()}


# ---- The command --------------------------------------------------------------------------------

def main():
    parser = Parser(["--model", "--data", "--steps", "--batch", "--lr", "--seed", "--memory",
                     "--load-4bit", "--plan", "--out", "--resume"], description=__doc__)
    add = parser.add_argument
    add("--out", help="run folder [default runs/ and the name of the data]")
    add("--plan", action="store_true",
        help="print the memory that the run would take, and stop (real models)")
    add("--resume", nargs="?", const="latest", metavar="RUN",
        help="go on with a run [default the latest]")
    add("--anyway", action="store_true",
        help="resume although code, data or PyTorch have changed since")
    add("--log", choices=KINDS, help="also send the numbers to a tracker; a resumed run goes on "
        "with the one that it has [default none]")
    add_flags(parser, Settings.__dataclass_fields__)
    given = vars(parser.parse_args())
    out, plan = given.pop("out"), given.pop("plan")
    resume, anyway, log = (given.pop(name) for name in ("resume", "anyway", "log"))
    with one_line():
        if plan:
            return show_plan(settings_from_flags(given))
        if resume:
            s, folder = find_run_to_resume(resume, given, anyway)
            log = pick_tracker(log, folder)
        else:
            s, log = settings_from_flags(given), pick_tracker(log)
    stop, processes, made = Stop(), Processes(), []
    with contextlib.ExitStack() as held:
        with one_line():
            if not resume:
                folder, made = start_run(out, s, processes)
            if processes.is_first:  # the others write nothing
                held.enter_context(hold_run(whole_run(folder), made))
        with enough_memory():
            train_both(s, folder, resume, stop, processes, log)


def train_both(s, folder, resume, stop, processes, log):
    """Train a run and its control, and show what came out."""
    seconds = train(s, folder, resume, stop, processes, log)
    with last_words(f"stopped; the run is saved in {folder}"):
        if s.memory and s.control:
            processes.say(fold("\nnow its control: the same data and seed, without memory, with "
                               "sight of the prompt"))
            seconds += train(control_settings(s), folder / "control", resume, stop, processes, log)
        if processes.is_first:
            finish(s, folder, seconds)


def show_plan(s):
    """Print the memory that a run of a real model and its answers would take.

    Without a GPU the plan is one for a GPU of 24 GiB, unless the user says --device cpu.
    """
    from backbones.families import read_config
    from backbones.plan import answer_plan, plan_text
    if s.model == "toy":
        raise ValueError("--plan is for real models; the toy takes a few hundred megabytes")
    config, device = read_config(s.model), "cpu" if s.device == "cpu" else "cuda"
    print(plan_memory(config, s, device, room=24 * 2**30))
    parts = answer_plan(config, s, min(s.max_length, 2048), device)
    print(plan_text(parts, title="memory of one answer"))


def start_run(out, s, processes):
    """Make the folder of a new run. Returns it, and all folders that were made for it.

    ValueError if the folder holds a run already.
    """
    folder = Path(out or "runs")
    if not processes.is_first:
        return folder, []
    made = missing_folders(folder)
    if not out:
        folder = pick_folder(s)
        return folder, [folder, *made]
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give --out the name of a folder")
    if (folder / "settings.json").exists():
        raise ValueError(f"{folder} holds a run already: --resume {folder} goes on with it, "
                         "another --out starts anew")
    folder.mkdir(parents=True, exist_ok=True)
    return folder, made


@contextlib.contextmanager
def spare_the_run(what):
    """A finished run is saved. What cannot be drawn or written after it is told, no more."""
    try:
        yield
    except (OSError, ValueError) as error:
        say(f"no {what}: {' '.join(str(error).split())}")


def finish(s, folder, seconds):
    """Print the table of a finished run, and what one may do next."""
    if s.table_samples:
        with spare_the_run("table or panel.png"):
            print_comparison([folder], s.table_samples, save_to=folder / "panel.json",
                             picture=folder / "panel.png")
    ask = '--prompt "..."     answer with this run'
    if s.model == "toy":
        ask = "--show     answer a prompt from this run"
    say(f"trained in {seconds:.0f} s. Look at the pictures in {folder}; next:\n"
        f"  python generate.py --adapt {ask}\n"
        f"  python evaluate.py                    compare runs, with more samples")


if __name__ == "__main__":
    main()

"""Tasks of lm-evaluation-harness, answered by our models.

`Harness` is a model in the harness's sense: the harness sends it requests, and the decoder of
generate.py answers them, with or without memory of each prompt. `run_tasks` runs tasks from Python
and keeps their scores in scores.json, which paper/tables.py reads. `lm_eval_command` is the
harness's own command line with our models in it.

The tasks themselves are the harness's, unmodified. Three things around them are odd, and all three
come from RULER: its loader wants a tokenizer's repository and would run code from it, it wants to
download tables for splitting sentences, and it searches for ever when a sample does not fit into
the length. `copy_tokenizer`, `add_punctuation_tables` and `time_limit` deal with these.
"""
from __future__ import annotations

import contextlib
import io
import itertools
import os
import signal
import sys
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import memdlm
from backbones.block_diffusion import MODES
from data import Sample, collate
from files import write_json
from generate import reply_text
from runs import open_model


# ---- A model in the harness's sense -------------------------------------------------------------

class Job(NamedTuple):
    """A request to generate text."""
    room: int     # how many tokens to generate
    number: int   # place among the requests
    ids: list     # the prompt
    stops: list   # the text ends before the first of these strings


class Harness:
    """One of our models, with the methods that lm-evaluation-harness calls.

    run: a run folder; or model (with from_adapter, load_4bit, ...) as in generate.py. adapt: write
    each prompt into phi first, one phi per request, whatever the batch. batch_size: requests that
    are decoded together. seed: decides masks and noise. mc_samples: Monte Carlo samples of a
    likelihood. max_length: longer prompts are cut from the left, 0 for never. steps: forward
    passes per answer, 0 for one per token. mode: as in generate.py, for LLaDA2.x. settings: of
    the inner loop and of loading, by name.

    The harness passes max_batch_size and device on its own. They have no effect.
    """

    def __init__(self, run=None, model=None, adapt=False, batch_size=1, seed=0, mc_samples=128,
                 max_length=0, steps=0, mode="plain", max_batch_size=None, device=None,
                 **settings):
        super().__init__()
        run = Path(run) if run else None
        self.s, self.data, self.model = open_model(run, model, settings)
        if self.data.words:
            raise ValueError("the toy's word tasks have a vocabulary of their own and cannot read "
                             "text; train on bytes: --data python")
        self.backbone, self.tokenizer = self.model.backbone, self.data.tokenizer
        self.adapt, self.batch_size, self.seed = adapt, int(batch_size), seed
        self.mc_samples, self.max_length, self.steps = mc_samples, max_length, steps
        self.mode = mode
        self.cut = 0  # number of prompts that were longer than max_length

    @property
    def tokenizer_name(self):
        """The harness names its cache by this when it uses a chat template."""
        return str(self.backbone.name).replace("/", "__")

    def chat_template(self, chat_template=False):
        """The template's text for the harness's records, None if there is none."""
        return getattr(getattr(self.tokenizer, "hf", None), "chat_template", None)

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        """[{role, content}, ...] -> the text of a prompt. ValueError without a template."""
        if self.chat_template() is None:
            raise ValueError("this model has no chat template")
        return self.tokenizer.hf.apply_chat_template(
            chat_history, add_generation_prompt=add_generation_prompt, tokenize=False)

    def get_model_info(self):
        """What the harness's records say of the model."""
        return {"adapt": self.adapt, "settings": asdict(self.s)}

    def describe_method(self):
        """What a score belongs to: the model, the method, and what differs from the paper.

        memory: whether it was trained with memory. adapt: whether it adapts to each prompt. other:
        the method's settings that are not the paper's.
        """
        paper = memdlm.Settings()
        other = {}
        for f in fields(paper):
            value = getattr(self.s, f.name)
            if value != getattr(paper, f.name):
                other[f.name] = value
        return {"model": self.backbone.title, "memory": self.s.memory, "adapt": self.adapt,
                "other": other}

    # Generating text.

    def generate_until(self, requests, disable_tqdm=False):
        """Answer requests, in their order. An answer ends before the first of its stop strings."""
        signal.alarm(0)  # the task's samples are made: see `time_limit`
        jobs = []
        for number, request in enumerate(requests):
            context, options = request.args
            room = int(options.get("max_gen_toks", 256))
            stops = options.get("until") or []
            stops = [stops] if isinstance(stops, str) else stops
            jobs.append(Job(room, number, self.encode_prompt(context, room), stops))
        # Requests of one length come one after the other, so that a batch has little padding.
        jobs.sort(key=lambda job: (job.room, len(job.ids), job.number))
        answers = [""] * len(jobs)
        with tqdm(total=len(jobs), desc="generating", unit="request", disable=disable_tqdm) as bar:
            for batch in self.split_into_batches(jobs):
                for job, text in zip(batch, self.decode(batch)):
                    for stop in job.stops:
                        text = text.split(stop)[0] if stop else text
                    answers[job.number] = text
                    self.cache_hook.add_partial("generate_until", requests[job.number].args, text)
                bar.update(len(batch))
        if self.cut:
            print(f"{self.cut} prompts were cut to max_length {self.max_length}")
        return answers

    def encode_prompt(self, text, room):
        """The prompt's tokens; with max_length its last ones, so that `room` more fit."""
        ids = self.tokenizer.encode(text)
        keep = max(1, self.max_length - room) if self.max_length else len(ids)
        self.cut += len(ids) > keep
        return ids[-keep:] if ids else ids

    def split_into_batches(self, jobs):
        """Neighbours that ask for the same number of tokens, at most `batch_size` at a time."""
        for _, same in itertools.groupby(jobs, key=lambda job: job.room):
            same = list(same)
            for start in range(0, len(same), self.batch_size):
                yield same[start:start + self.batch_size]

    def decode(self, jobs):
        """The texts of jobs that ask for the same number of tokens, before any stop string."""
        samples = [Sample(job.ids, [0] * job.room, [True] * job.room) for job in jobs]
        batch = collate(samples, [f"{self.seed} {job.number}" for job in jobs], False)
        options = {"steps": self.steps or None}
        if self.backbone.decoder is not memdlm.denoise:
            options["threshold"], options["edit_threshold"] = MODES[self.mode]
        steps = self.backbone.decoder(self.backbone, self.s, batch.x0, batch.maskable, batch.valid,
                                      batch.seeds, self.write_phi(batch), **options)
        for canvas in steps:
            pass
        return [reply_text(self.tokenizer, ids[fill].tolist())
                for ids, fill in zip(canvas, batch.maskable)]

    def write_phi(self, batch):
        """phi of the batch's prompts; None if the model does not adapt or all prompts are empty."""
        if not self.adapt or not batch.prompt_valid.any():
            return None
        phi, _ = memdlm.adapt(self.backbone, self.s, batch.prompt, batch.prompt_valid, batch.seeds)
        return phi

    # Scoring text.

    def loglikelihood(self, requests, disable_tqdm=False):
        """Score continuations of contexts.

        Returns for each request log p(continuation | context), and whether greedy decoding would
        give the continuation.
        """
        signal.alarm(0)  # the task's samples are made: see `time_limit`
        scores = []
        bar = tqdm(requests, desc="scoring", unit="request", disable=disable_tqdm)
        for number, request in enumerate(bar):
            context, continuation = request.args
            prompt = self.tokenizer.encode(context)
            both = self.tokenizer.encode(context + continuation)
            # The harness cuts the tokens of both texts where the context alone would end, also if
            # a token there belongs to both. So do we.
            rest = both[len(prompt):]
            scores.append(self.score(prompt, rest, f"{self.seed} {number}"))
            self.cache_hook.add_partial("loglikelihood", request.args, scores[-1])
        return scores

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """log p of each request's text, without a context."""
        return [self.score([], self.tokenizer.encode(request.args[0]), f"{self.seed} {number}",
                           greedy=False)[0]
                for number, request in enumerate(requests)]

    @torch.no_grad()
    def score(self, prompt, rest, name, greedy=True):
        """Score the tokens `rest` after the tokens of a prompt.

        Returns their log-likelihood, and whether greedy decoding would give them; with
        greedy=False nothing is decoded and the second value is False. name: decides the masks.
        """
        if not rest:
            return 0.0, True
        batch = collate([Sample(prompt, rest, [True] * len(rest))], [name], False)
        phi = self.write_phi(batch)
        likelihood = self.estimate_likelihood(batch, phi, name)
        return likelihood, greedy and self.would_say(batch, phi)

    def estimate_likelihood(self, batch, phi, name):
        """A lower bound on log p of one sample's response, estimated like LLaDA's.

        Of its n tokens, mask k ~ U{1..n} at random, and weight the loss at these by n / k. The
        estimate is minus the mean over mc_samples such draws.
        """
        n, total = int(batch.maskable.sum()), 0.0
        for start in range(0, self.mc_samples, self.batch_size):
            stop = min(start + self.batch_size, self.mc_samples)
            seeds = [f"{name} {i}" for i in range(start, stop)]
            x0 = batch.x0.expand(len(seeds), -1)  # [b, L]
            maskable = batch.maskable.expand(len(seeds), -1)
            k = 1 + (memdlm.uniform(seeds, "mc", 1) * n).long()  # [b, 1]
            u = memdlm.uniform(seeds, "mc masks", x0.shape[1])
            masked = maskable & (memdlm.rank_of(maskable, u) < k)
            phi_of_each = phi and {key: tuple(w.expand(len(seeds), -1, -1) for w in pair)
                                   for key, pair in phi.items()}
            nll = memdlm.response_nll(self.backbone, self.s, x0, masked,
                                      torch.ones_like(maskable), phi_of_each)
            total += float((nll.sum(1) * n / k[:, 0]).sum())
        return -total / self.mc_samples

    def would_say(self, batch, phi):
        """Whether greedy decoding gives exactly the batch's response. It stops at an error."""
        steps = memdlm.denoise(self.backbone, self.s, batch.x0, batch.maskable, batch.valid,
                               batch.seeds, phi)
        for canvas in steps:
            decided = batch.maskable & (canvas != self.backbone.mask_id)
            if (canvas != batch.x0)[decided].any():
                return False
        return torch.equal(canvas, batch.x0)


def make_harness_class():
    """Harness as a class of lm_eval, which is imported only when it is wanted."""
    from lm_eval.api.model import LM
    return type("MemDLMHarness", (Harness, LM), {})


def lm_eval_command():
    """lm_eval's own command line, with our models under the name `memdlm`."""
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    register_model("memdlm")(make_harness_class())
    cli_evaluate()


# ---- Running tasks ------------------------------------------------------------------------------

# The suites of the paper: folder of the harness -> how the names of its tasks begin.
SUITES = {"ruler": ("ruler", "niah"), "babilong": ("babilong",), "longbench": ("longbench",)}


def find_suite(task):
    """The suite of a task, by how its name begins; "" if it is none of the paper's."""
    for suite, beginnings in SUITES.items():
        if task.startswith(beginnings):
            return suite
    return ""


def run_tasks(tasks, lengths, out, limit=None, num_fewshot=None, chat=False, include=None,
              wait=600, **model_args):
    """Run tasks of lm-evaluation-harness and print their scores. Returns the scores.

    lengths: in tokens. RULER and BABILong run at one length at a time, so that `limit` counts from
    the first sample of each. chat: use the model's chat template. include: a folder with task
    files of the user. wait: seconds that RULER may take to make its samples. model_args: arguments
    of Harness. The scores go to out/scores.json, the harness's own files to out/<length>.
    ValueError if lm-evaluation-harness or a task is missing.
    """
    try:
        harness_class = make_harness_class()
    except ImportError:
        raise ValueError("tasks need lm-evaluation-harness: "
                         "pip install 'lm-eval[ruler,longbench]'") from None
    model, scores, out = harness_class(**model_args), [], Path(out)
    given = {name: str(value) for name, value in model_args.items() if value is not None}
    options = dict(model=model, model_args=given, limit=limit, num_fewshot=num_fewshot,
                   apply_chat_template=chat)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = copy_tokenizer(model, Path(scratch) / "tokenizer")
        if any(find_suite(task) == "ruler" for task in tasks):
            add_punctuation_tables(Path(scratch) / "nltk")
        for task in tasks:
            has_length = find_suite(task) in ("ruler", "babilong")
            for length in lengths if has_length else [None]:
                manager = make_task_manager(task, task_metadata(task, length, tokenizer), include)
                seconds = wait if find_suite(task) == "ruler" else 0
                results = run_task(task, manager, out / f"{length or 'full'}", seconds, options)
                rows = [row | {"length": length, **model.describe_method()}
                        for row in read_scores(results, length)]
                print_scores(rows)
                scores += rows
                write_json(out / "scores.json", scores, indent=1)
    print(f"scores in {out / 'scores.json'}, the harness's own files beside it")
    return scores


def run_task(task, manager, folder, seconds, options):
    """Run one task, leave the harness's own files in the folder, and return its results."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    tracker = EvaluationTracker(output_path=str(folder))
    with time_limit(seconds):
        results = simple_evaluate(tasks=[task], task_manager=manager, evaluation_tracker=tracker,
                                  bootstrap_iters=0, log_samples=True, **options)
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for name, rows in samples.items():
        tracker.save_results_samples(task_name=name, samples=rows)
    return results


def task_metadata(task, length, tokenizer):
    """What a task's loader is told.

    RULER takes a list of lengths and a tokenizer's folder, BABILong one length as a string.
    """
    suite = find_suite(task)
    if suite == "babilong":
        return {"max_seq_lengths": f"{length // 1024}k"}
    if suite == "ruler":
        return {"max_seq_lengths": [length], "tokenizer": tokenizer}
    return {}


def make_task_manager(task, metadata, include):
    """The harness's index of tasks. ValueError if the task is not in it.

    The harness has 14,000 names. Only the paper's suites are read, unless the task is another:
    that takes a fifth of a second instead of twelve.
    """
    import lm_eval.tasks
    folder = Path(lm_eval.tasks.__file__).parent
    paths = [str(folder / suite) for suite in SUITES] + ([include] if include else [])
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=paths,
                                        metadata=metadata)
    if task not in manager.all_tasks:
        manager = lm_eval.tasks.TaskManager(include_path=include, metadata=metadata)
    if task not in manager.all_tasks:
        raise ValueError(f"lm-evaluation-harness has no task {task!r}; "
                         "python evaluate.py lm_eval ls tasks lists them")
    return manager


def read_scores(results, length):
    """The harness's results -> [{task, metric, value, samples}], samples being their number.

    RULER reports every length that it knows, -1 where it measured none. These are left out.
    """
    rows = []
    for task, values in results["results"].items():
        samples = results.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in values.items():
            metric, comma, _ = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            measured = isinstance(value, (int, float)) and value >= 0
            other_length = metric.isdecimal() and metric != str(length)
            if measured and not other_length:
                rows.append({"task": task, "metric": metric, "value": value, "samples": samples})
    return rows


def print_scores(rows):
    for row in rows:
        adapted = ", adapted to each prompt" if row["adapt"] else ""
        print(f"{row['task']:28} {row['length'] or '':>6} {row['metric']:22} {row['value']:8.4f}  "
              f"({row['samples']} samples{adapted})")


# ---- What RULER's loader needs ------------------------------------------------------------------

def copy_tokenizer(model, folder):
    """Save the model's tokenizer in the folder. Returns the folder as text.

    RULER's loader would run the code of a tokenizer's repository. The copy holds none.
    """
    hf = getattr(model.data.tokenizer, "hf", None)
    if hf is None:
        from backbones.tiny import byte_tokenizer
        hf = byte_tokenizer()
    hf.save_pretrained(folder)
    return str(folder)


def add_punctuation_tables(folder):
    """Give NLTK empty tables for splitting sentences, unless it has its own.

    RULER's needle tasks split essays into sentences with NLTK, which wants to download its tables.
    Empty ones know no abbreviations. They change where a needle may stand, not what is asked.
    """
    import nltk
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        tables = folder / "tokenizers" / "punkt_tab" / "english"
        tables.mkdir(parents=True)
        for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt",
                     "ortho_context.tab"):
            (tables / name).write_text("")
        nltk.data.path.append(str(folder))


@contextlib.contextmanager
def time_limit(seconds):
    """End the program if RULER takes longer to make its samples; 0 is no limit.

    The alarm is called off when the first request arrives. What is printed inside is dropped:
    RULER's loader prints every attempt.
    """
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        signal.alarm(0)


def give_up(number, frame):
    # RULER's loader catches every exception in the loop that never ends. This is the only way out.
    print("error: the task's samples were not made in time: probably the smallest does not fit "
          "into this length with this tokenizer, and RULER's loader then searches for ever; ask "
          "for more with --lengths, or --wait longer", file=sys.stderr)
    sys.stderr.flush()
    os._exit(2)

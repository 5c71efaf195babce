"""lm-evaluation-harness asks our models."""
from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import signal
import sys
import tempfile
from dataclasses import asdict, fields
from pathlib import Path

import torch
from tqdm import tqdm

import memdlm
from backbones.block_diffusion import MODES
from data import Sample, collate
from files import write_whole
from generate import reply_text
from runs import open_model


class Harness:
    """Through this lm-evaluation-harness asks our models.

    run: a run folder, or model (with adapter, load_4bit, ...) as in generate.py. adapt: write each prompt into phi
    first, one phi per request, whatever the batch. Settings of the inner loop may be given by name.
    """

    def __init__(self, run=None, model=None, adapt=False, batch_size=1, seed=0, mc_samples=128, max_length=0, steps=0,
                 mode="plain", max_batch_size=None, device=None, **settings):
        super().__init__()
        self.s, self.data, self.model = open_model(Path(run) if run else None, model, settings)
        self.adapt, self.batch, self.seed, self.mc, self.steps, self.mode = adapt, int(batch_size), seed, mc_samples, steps, mode
        if self.data.words:
            raise ValueError("the toy's word tasks have a vocabulary of their own and cannot read text; train on bytes: --data python")
        self.backbone, self.tokenizer, self.max_length = self.model.backbone, self.data.tokenizer, max_length
        self.cut = 0  # prompts that were longer than max_length

    # What the harness asks for when it uses a chat template, and for its cache and records.
    tokenizer_name = property(lambda self: str(getattr(self.backbone, "name", "toy")).replace("/", "__"))

    def chat_template(self, chat_template=False):
        return getattr(getattr(self.tokenizer, "hf", None), "chat_template", None)

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        if self.chat_template() is None:
            raise ValueError("this model has no chat template")
        return self.tokenizer.hf.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt, tokenize=False)

    def get_model_info(self):
        return {"adapt": self.adapt, "settings": asdict(self.s)}

    def method(self):
        """What a score belongs to: the model, trained with memory or not, adapted or not, and what is not the paper's default."""
        defaults = memdlm.Settings()
        other = {f.name: getattr(self.s, f.name) for f in fields(defaults) if getattr(self.s, f.name) != getattr(defaults, f.name)}
        return {"model": self.backbone.title, "memory": self.s.memory, "adapt": self.adapt, "other": other}

    def ids(self, text, room):
        """The prompt's tokens; with max_length its last ones, so that `room` more fit."""
        ids = self.tokenizer.encode(text)
        keep = max(1, self.max_length - room) if self.max_length else len(ids)
        self.cut += len(ids) > keep
        return ids[-keep:] if ids else ids

    def phi(self, batch):
        if not self.adapt or not batch.prompt_valid.any():
            return None
        return memdlm.adapt(self.backbone, self.s, batch.prompt, batch.prompt_valid, batch.seeds)[0]

    def generate_until(self, requests, disable_tqdm=False):
        """Greedy answers by the decoder of generate.py, cut at the task's stop strings."""
        signal.alarm(0)  # the task's samples are made: see `too_short`
        jobs = []
        for number, request in enumerate(requests):
            context, options = request.args
            room = int(options.get("max_gen_toks", 256))
            stops = options.get("until") or []
            jobs.append((room, number, self.ids(context, room), [stops] if isinstance(stops, str) else stops))
        answers = [""] * len(jobs)
        # Requests of one length after the other, so that a batch has little padding.
        jobs.sort(key=lambda job: (job[0], len(job[2]), job[1]))
        with tqdm(total=len(jobs), desc="generating", unit="request", disable=disable_tqdm) as bar:
            for group in self.batches(jobs):
                for (room, number, _, stops), text in zip(group, self.answer(group)):
                    for stop in stops:
                        text = text.split(stop)[0] if stop else text
                    answers[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                bar.update(len(group))
        if self.cut:
            print(f"{self.cut} prompts were cut to max_length {self.max_length}")
        return answers

    def batches(self, jobs):
        """Neighbours that ask for the same number of tokens, `batch_size` at a time."""
        for _, same in itertools.groupby(jobs, key=lambda job: job[0]):
            same = list(same)
            yield from (same[i:i + self.batch] for i in range(0, len(same), self.batch))

    def answer(self, group):
        samples = [Sample(ids, [0] * room, [True] * room) for room, _, ids, _ in group]
        batch = collate(samples, [f"{self.seed} {number}" for _, number, _, _ in group], False)
        options = dict(zip(("threshold", "edit_threshold"), MODES[self.mode])) if self.backbone.decoder is not memdlm.denoise else {}
        for x in self.backbone.decoder(self.backbone, self.s, batch.x0, batch.maskable, batch.valid, batch.seeds,
                                        self.phi(batch), steps=self.steps or None, **options):
            pass
        for row, fill in zip(x, batch.maskable):
            yield reply_text(self.tokenizer, row[fill].tolist())

    def loglikelihood(self, requests, disable_tqdm=False):
        """[(log p(continuation | context), would greedy decoding say it)], the former by Monte Carlo."""
        signal.alarm(0)
        results = []
        for number, request in enumerate(tqdm(requests, desc="scoring", unit="request", disable=disable_tqdm)):
            context, continuation = request.args
            both, prompt = self.tokenizer.encode(context + continuation), self.tokenizer.encode(context)
            prompt = both[:len(prompt)] if both[:len(prompt)] == prompt else prompt
            rest = both[len(prompt):]
            results.append(self.score(prompt, rest, f"{self.seed} {number}"))
            self.cache_hook.add_partial("loglikelihood", request.args, results[-1])
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        return [self.score([], self.tokenizer.encode(request.args[0]), f"{self.seed} {number}", False)[0]
                for number, request in enumerate(requests)]

    @torch.no_grad()
    def score(self, prompt, rest, name, greedy=True):
        """One continuation. Its likelihood is estimated as LLaDA's: mask k ~ U{1..n} of its n tokens, at random, and
        weight the loss at these by n / k; the mean over mc_samples such draws is a bound on log p."""
        if not rest:
            return 0.0, True
        n, batch = len(rest), collate([Sample(prompt, rest, [True] * len(rest))], [name], False)
        phi = self.phi(batch)
        total = 0.0
        for start in range(0, self.mc, self.batch):
            seeds = [f"{name} {i}" for i in range(start, min(start + self.batch, self.mc))]
            x0, open_ = batch.x0.expand(len(seeds), -1), batch.maskable.expand(len(seeds), -1)
            k = 1 + (memdlm.uniform(seeds, "mc", 1) * n).long()  # [b, 1]
            masked = open_ & (memdlm.rank_of(open_, memdlm.uniform(seeds, "mc masks", x0.shape[1])) < k)
            own = phi and {key: tuple(w.expand(len(seeds), -1, -1) for w in pair) for key, pair in phi.items()}
            nll = memdlm.response_nll(self.backbone, self.s, x0, masked, torch.ones_like(open_), own)
            total += float((nll.sum(1) * n / k[:, 0]).sum())
        said = False
        if greedy:
            for x in memdlm.denoise(self.backbone, self.s, batch.x0, batch.maskable, batch.valid, [name], phi):
                if (x != batch.x0)[batch.maskable & (x != self.backbone.mask_id)].any():
                    break
            said = torch.equal(x, batch.x0)
        return -total / self.mc, said


def harness():
    """Harness as a class of lm_eval, which is imported only when it is wanted."""
    from lm_eval.api.model import LM
    return type("MemDLMHarness", (Harness, LM), {})


SUITES = {"ruler": ("ruler", "niah"), "babilong": ("babilong",), "longbench": ("longbench",)}  # by how a task's name begins


def suite_of(task):
    return next((name for name, starts in SUITES.items() if task.startswith(starts)), "")


def task_metadata(task, length, tokenizer):
    """What a task's loader is told: RULER takes a list of lengths and a tokenizer, BABILong one length as a string."""
    if suite_of(task) == "babilong":
        return {"max_seq_lengths": f"{length // 1024}k"}
    return {"max_seq_lengths": [length], "tokenizer": tokenizer} if suite_of(task) == "ruler" else {}


def task_manager(tasks, metadata, include):
    """The harness's index of tasks. Of its 14,000 names only the paper's families are read, unless another is asked for:
    that takes a fifth of a second instead of twelve."""
    import lm_eval.tasks
    folder = Path(lm_eval.tasks.__file__).parent
    paths = [str(folder / name) for name in SUITES] + ([include] if include else [])
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=paths, metadata=metadata)
    known = set(manager.all_tasks)
    if not set(tasks) <= known:
        manager = lm_eval.tasks.TaskManager(include_path=include, metadata=metadata)
        known = set(manager.all_tasks)
    if unknown := sorted(set(tasks) - known):
        raise ValueError(f"lm-evaluation-harness has no task {unknown[0]!r}; python evaluate.py lm_eval ls tasks lists them")
    return manager


def plain_tokenizer(model, folder):
    """A copy of the model's tokenizer without anything to execute: RULER's loader would run a repository's code."""
    hf = getattr(model.data.tokenizer, "hf", None)
    if hf is None:
        from backbones.tiny import byte_tokenizer
        hf = byte_tokenizer()
    hf.save_pretrained(folder)
    return str(folder)


def punctuation_tables(folder):
    """RULER's needle tasks split essays into sentences with NLTK's tables, which it wants to download. Empty ones (no known
    abbreviations) do; they change where a needle may stand, not what is asked."""
    import nltk
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        tables = folder / "tokenizers" / "punkt_tab" / "english"
        tables.mkdir(parents=True)
        for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
            (tables / name).write_text("")
        nltk.data.path.append(str(folder))


def too_short(number, frame):
    # RULER's loaders catch every exception in the loop that never ends, so there is no other way out.
    print("error: the task's samples were not made in time: probably the smallest does not fit into this length with this "
          "tokenizer, and RULER's loader then searches for ever; ask for more with --lengths, or --wait longer", file=sys.stderr)
    sys.stderr.flush()
    os._exit(2)


@contextlib.contextmanager
def given_time(seconds):
    """RULER's loaders print every attempt, and some never end. The alarm is called off when the first request arrives."""
    signal.signal(signal.SIGALRM, too_short)
    signal.alarm(seconds)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        signal.alarm(0)


def run_tasks(tasks, lengths, out, limit=None, num_fewshot=None, chat=False, include=None, wait=600, **model_args):
    """Tasks of lm-evaluation-harness, one length at a time: --limit counts from the first sample of each. Prints a table, and
    leaves the harness's own files in out/<length> and the table in out/scores.json."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.loggers import EvaluationTracker
    except ImportError:
        raise ValueError("--tasks needs lm-evaluation-harness: pip install 'lm-eval[ruler,longbench]'") from None
    model, scores, out = harness()(**model_args), [], Path(out)
    given = {name: str(value) for name, value in model_args.items() if value is not None}
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = plain_tokenizer(model, Path(scratch) / "tokenizer")
        if any(suite_of(task) == "ruler" for task in tasks):
            punctuation_tables(Path(scratch) / "nltk")
        for task in tasks:
            for length in lengths if suite_of(task) in ("ruler", "babilong") else [None]:
                tracker = EvaluationTracker(output_path=str(out / f"{length or 'full'}"))
                manager = task_manager([task], task_metadata(task, length, tokenizer), include)
                with given_time(wait if suite_of(task) == "ruler" else 0):
                    results = simple_evaluate(
                        model=model, model_args=given, tasks=[task], task_manager=manager, limit=limit, num_fewshot=num_fewshot,
                        apply_chat_template=chat, bootstrap_iters=0, evaluation_tracker=tracker, log_samples=True)
                samples = results.pop("samples")
                tracker.save_results_aggregated(results=results, samples=samples)
                for name, rows in samples.items():
                    tracker.save_results_samples(task_name=name, samples=rows)
                rows = [row | {"length": length, **model.method()} for row in read_scores(results, length)]
                print_scores(rows)
                scores += rows
                write_whole(out / "scores.json", lambda path: path.write_text(json.dumps(scores, indent=1) + "\n"))
    print(f"scores in {out / 'scores.json'}, the harness's own files beside it")
    return scores


def read_scores(results, length):
    """Rows of the harness's result: task, metric, value and number of samples. RULER reports every length it knows, -1 where
    it measured none: these are left out."""
    rows = []
    for task, values in results["results"].items():
        for key, value in values.items():
            metric = key.partition(",")[0]
            if "," in key and not metric.endswith("_stderr") and isinstance(value, (int, float)) and value >= 0:
                if not metric.isdecimal() or metric == str(length):
                    n = results.get("n-samples", {}).get(task, {}).get("effective")
                    rows.append({"task": task, "metric": metric, "value": value, "samples": n})
    return rows


def print_scores(rows):
    for row in rows:
        print(f"{row['task']:28} {row['length'] or '':>6} {row['metric']:22} {row['value']:8.4f}  ({row['samples']} samples"
              f"{', adapted to each prompt' if row['adapt'] else ''})")


def lm_eval_command():
    """lm_eval's own command line, with our models under the name `memdlm`."""
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    register_model("memdlm")(harness())
    cli_evaluate()

"""Tasks of lm-evaluation-harness, answered by our models.

`Harness` is a model in the harness's sense: the harness sends it requests, and the decoder of
generate.py answers them, with or without memory of each prompt. `run_tasks` runs tasks from Python
and adds their scores to scores.json (see paper/scores.py). `lm_eval_command` is the harness's own
command line with our models in it.

The tasks themselves are the harness's, unmodified. Three things around them are odd, and all three
come from RULER: its loader wants a tokenizer's repository and would run code from it, it wants to
download tables for splitting sentences, and it searches for ever when a sample does not fit into
the length. `copy_tokenizer`, `add_punctuation_tables` and `time_limit` deal with these.
"""
from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
import re
import signal
import sys
import tempfile
from argparse import Namespace
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import memdlm
from backbones.block_diffusion import MODES
from console import say
from data import Sample, collate, mark_response
from generate import decoder_options, reply_text
from paper.scores import add_scores, load_scores, plain
from runs import KINDS, latest_run, open_model
from settings import Settings, names_of


# ---- What a request asks for --------------------------------------------------------------------

# The harness's names for the number of tokens to generate. The first that is given counts.
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
DEFAULT_LENGTH = 256  # the harness's own

# Options of decoders that sample or search. Ours has none of these. It does not need those in the
# first row as long as it takes the best token; those in the second row change nothing at this
# value.
SAMPLING = ("top_p", "top_k", "min_p", "typical_p")
WITHOUT_EFFECT = {"top_p": 1, "top_k": 0, "num_beams": 1, "repetition_penalty": 1,
                  "length_penalty": 1}


class Job(NamedTuple):
    """A request to generate text."""
    room: int     # how many tokens to generate
    number: int   # place among the requests
    ids: list     # the prompt
    stops: list   # the text ends before the first of these strings
    temperature: float = 0.0  # 0 takes the best token


class ChatPrompt(str):
    """A prompt that the chat template made. Its special tokens are meant; other texts have none."""


def check_number(name, value, low, high=10 ** 9):
    """A whole number between low and high. ValueError, with its name, if it is none."""
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]+\s*", value):
        value = int(value)
    whole = isinstance(value, (int, float)) and not isinstance(value, bool) and value % 1 == 0
    if not whole or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; it must be a whole number from {low} to {high}")
    return int(value)


def check_limit(value):
    """A number of samples, or a share of them between 0 and 1, as the harness takes it."""
    if value is not None and not 0 < value < 1:
        return check_number("limit (samples of each task; or a share of them, below 1)", value, 1)
    return value


def read_length(options):
    """How many tokens to generate at most, by whichever name the task calls it."""
    given = [name for name in LENGTH_NAMES if options.get(name) is not None]
    return check_number(given[0], options[given[0]], 1) if given else DEFAULT_LENGTH


def read_stops(until, end):
    """What a text ends before: a task's `until`, and the end of text if it is spelled out."""
    stops = [until] if isinstance(until, str) else until or []
    if not isinstance(stops, (list, tuple)) or any(not isinstance(s, str) for s in stops):
        raise ValueError(f"until is {until!r}; it must be a text or a list of texts")
    return [stop for stop in dict.fromkeys([*stops, end]) if stop]


def read_temperature(options):
    """The temperature to sample at, 0 to take the best token.

    As in the harness, do_sample=False wins over a temperature, and a temperature above 0 samples
    where do_sample is not given.
    """
    sample, temperature = options.get("do_sample"), options.get("temperature")
    try:
        number = 0.0 if temperature is None else float(temperature)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(temperature, bool) or not 0 <= number < math.inf:
        raise ValueError(f"temperature is {temperature!r}; it must be a number of 0 or more")
    if sample not in (None, True, False):
        raise ValueError(f"do_sample is {sample!r}; it must be True or False")
    if sample and not number:
        raise ValueError("do_sample is True, but the temperature is 0; give a temperature above "
                         "0, or leave do_sample out")
    return 0.0 if sample is False else number


def check_options(options, temperature):
    """ValueError if a task asks for something that our decoders do not have."""
    known = {*LENGTH_NAMES, "max_length", "until", "do_sample", "temperature"}
    for name, value in options.items():
        idle = name in SAMPLING and not temperature
        if name not in known and value is not None and not idle and (
                name not in WITHOUT_EFFECT or value != WITHOUT_EFFECT[name]):
            raise ValueError(f"the task generates with {name}={value!r}, which our decoders do not "
                             "have; change it with --gen_kwargs of evaluate.py lm_eval")


# ---- A model in the harness's sense -------------------------------------------------------------

class Harness:
    """One of our models, with the methods that lm-evaluation-harness calls.

    run: a run folder; or model (with from_adapter, load_4bit, ...) as in generate.py. adapt: write
    each prompt into phi first, one phi per request, whatever the batch. batch_size: requests that
    are decoded together. seed: decides masks and noise. mc_samples: Monte Carlo samples of a
    likelihood. max_length: longer prompts are cut from the left, 0 for never. steps: forward
    passes per answer, 0 for one per token. mode: as in generate.py, for LLaDA2.x. block_length (0
    for one block), threshold (0 for the decoder's own) and cache: as in generate.py. settings: of
    the inner loop and of loading, by name.

    The harness passes max_batch_size, device and trust_remote_code on its own. They have no
    effect.

    Texts become tokens as in the harness's own class for Hugging Face models
    (lm_eval.models.huggingface), and a test compares the two. Three things differ on purpose.
    The name of a special token in a benchmark's text is read as characters: their class would put
    a mask or an end into the prompt. A chat template that is chosen by name is also applied. And
    what our decoders cannot do is refused.
    """

    def __init__(self, run=None, model=None, adapt=False, batch_size=1, seed=0, mc_samples=128,
                 max_length=0, steps=0, mode="plain", block_length=0, threshold=0.0, cache="none",
                 max_batch_size=None, device=None, trust_remote_code=None, **settings):
        super().__init__()
        if adapt not in (True, False):
            raise ValueError(f"adapt is {adapt!r}; it must be True or False")
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(MODES)}")
        if str(batch_size).startswith("auto"):
            raise ValueError(f"batch_size is {batch_size!r}, which is not tried out here; give a "
                             "number")
        self.batch_size = check_number("batch_size", batch_size, 1)
        self.mc_samples = check_number("mc_samples", mc_samples, 1)
        self.max_length = check_number("max_length", max_length or 0, 0)
        self.steps = check_number("steps", steps or 0, 0)
        self.seed = check_number("seed", seed, -2 ** 63, 2 ** 63)
        self.block_length = check_number("block_length", block_length or 0, 0)
        self.threshold = threshold or 0.0
        if type(threshold) not in (int, float) or not 0 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold!r}; it must lie between 0 and 1")
        if cache not in ("none", "block"):
            raise ValueError(f"cache is {cache!r}; it must be none or block")
        self.adapt, self.mode, self.cache = bool(adapt), mode, cache
        self.template, self.left_out = None, False  # of chats: the template, if one was chosen
        check_settings_of_loading(settings)
        self.run = Path(run or latest_run()) if run or not model else None
        self.s, self.data, self.model = open_model(self.run, model, settings)
        if self.data.words:
            raise ValueError("the toy's word tasks have a vocabulary of their own and cannot read "
                             "text; train on bytes: --data python")
        self.backbone, self.tokenizer = self.model.backbone, self.data.tokenizer
        if mode != "plain" and self.backbone.decoder is memdlm.denoise:
            raise ValueError(f"mode {mode} is for LLaDA2.x, not for {self.backbone.title}")
        self.decoder_options()
        self.start_counting()

    def decoder_options(self, temperature=0.0):
        """The keyword arguments of the decoder. ValueError if it has no such option."""
        mode = None if self.backbone.decoder is memdlm.denoise else self.mode
        return decoder_options(Namespace(
            steps=self.steps or None, temperature=temperature, mode=mode, cache=self.cache,
            block_length=self.block_length or None, threshold=self.threshold or None,
            edit_threshold=None, cfg_scale=0.0, remasking="low_confidence"), self.model)

    def start_counting(self):
        """Start anew to count the prompts longer than max_length, and to measure the longest."""
        self.cut, self.longest = 0, 0

    @property
    def hf(self):
        """The tokenizer of the transformers library; None for the toy."""
        return getattr(self.tokenizer, "hf", None)

    @property
    def tokenizer_name(self):
        """The harness names its cache by this when it uses a chat template."""
        return str(self.backbone.name).replace("/", "__")

    # Text to tokens.

    @property
    def prefix_id(self):
        """What stands before a text without a context: the start of text, or else its end."""
        start = self.hf.bos_token_id if self.hf else None
        return self.tokenizer.eos_id if start is None else start

    def encode(self, text):
        """The tokens of a prompt, after the start of text if the tokenizer puts one there."""
        ids = self.tokenizer.encode(text)
        usual = self.hf("")["input_ids"][:1] if self.hf else []
        return ids if usual != [self.prefix_id] or ids[:1] == usual else usual + ids

    def shield(self, text):
        """A request's text as it is encoded. What no tokenizer can read becomes U+FFFD.

        Special tokens are broken into characters, unless the chat template put them there.
        """
        chat = isinstance(text, ChatPrompt)
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text if chat else self.tokenizer.shield(text)

    def encode_pair(self, context, continuation):
        """The tokens of a context, and those that a continuation adds to them.

        White space between the two belongs to the continuation: most tokenizers begin words with
        it. The texts are encoded together and cut where the context alone would end.
        """
        shown, continuation = continuation, self.shield(continuation)
        whole = self.shield(context)
        head = whole.rstrip()
        if isinstance(context, ChatPrompt):
            whole += continuation
        else:  # a name may also begin in the one and end in the other
            whole = self.shield(context + shown)
        if head:
            prompt = self.encode(head)
            rest = self.encode(whole)[len(prompt):]
        else:
            prompt, rest = [self.prefix_id], self.tokenizer.encode(whole)
        if not rest:
            raise ValueError(f"the continuation {shown[:40]!r} adds no token to its context "
                             f"{context[-40:]!r}, so it has no likelihood; mend the task")
        return self.cut_context(prompt, rest)

    def cut_context(self, prompt, rest):
        """Cut the prompt from the left, so that max_length tokens stand before the last of all."""
        self.longest = max(self.longest, len(prompt))
        if not self.max_length:
            return prompt, rest
        if len(rest) > self.max_length:
            raise ValueError(f"a continuation has {len(rest)} tokens, more than max_length "
                             f"{self.max_length}; raise it")
        keep = self.max_length + 1 - len(rest)
        self.cut += len(prompt) > keep
        return prompt[-keep:], rest

    def encode_prompt(self, text, room):
        """The prompt's tokens; with max_length its last ones, so that `room` more fit."""
        ids = self.encode(self.shield(text))
        self.longest = max(self.longest, len(ids))
        keep = self.max_length - room if self.max_length else len(ids)
        if self.max_length and keep < 1:
            raise ValueError(f"max_length is {self.max_length}, and the task generates {room} "
                             "tokens, which leaves no room for a prompt; raise max_length")
        self.cut += len(ids) > keep
        return ids[-keep:] if ids else ids

    def report_cut(self):
        """Say how many prompts were cut. What the harness runs may print nothing to stdout."""
        if self.cut:
            print(f"{self.cut} prompts were cut to max_length {self.max_length}", file=sys.stderr)

    # Chat templates.

    def chat_template(self, chat_template=False):
        """Choose a chat template: True for the tokenizer's own, or its name if there are several.

        Returns its text for the harness's records, None if there is none or none is wanted.
        """
        templates = getattr(self.hf, "chat_template", None)
        if chat_template in (False, None) or not templates:
            return None
        if isinstance(templates, dict):
            name = chat_template if isinstance(chat_template, str) else "default"
            if name not in templates:
                raise ValueError(f"this model has no chat template {name!r}; it has "
                                 f"{', '.join(sorted(templates))}: name one of these")
            templates = templates[name]
        elif isinstance(chat_template, str):
            print(f"note: this model has one chat template, none called {chat_template!r}; it is "
                  "used", file=sys.stderr)
        self.template = templates
        return templates

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        """[{role, content}, ...] -> the text of a prompt. ValueError without a template.

        Without add_generation_prompt the last turn is the assistant's and goes on: the prompt ends
        where its text ends. A system turn that the template refuses is left out.
        """
        if not getattr(self.hf, "chat_template", None):
            raise ValueError("this model has no chat template")
        turns = [{**turn, "content": self.shield(turn["content"])} for turn in chat_history]
        try:
            return self.render(turns, add_generation_prompt)
        except ValueError as error:
            others = [turn for turn in turns if turn["role"] != "system"]
            if len(others) == len(turns):
                raise
            text = self.render(others, add_generation_prompt)
            if not self.left_out:
                print(f"note: {error}; system turns are left out", file=sys.stderr)
            self.left_out = True
            return text

    def render(self, turns, add_generation_prompt):
        """Turns through the chat template, all of them. ValueError if it refuses them."""
        return ChatPrompt(self.tokenizer.render(
            turns, chat_template=self.template, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt))

    # What the harness and scores.json say of the model.

    def get_model_info(self):
        """What the harness's records say of the model."""
        return {"adapt": self.adapt, "settings": asdict(self.s)}

    def describe_method(self):
        """What a score belongs to: the model, the method, and what differs from the paper.

        model: the kind of model. weights, run, adapter: where it came from. memory: whether the
        run was trained with memory, None without a run. adapt: whether it adapts to each prompt.
        other: the method's settings that are not the paper's. options: what is not as usual in
        loading and decoding.
        """
        loading = {name: getattr(Settings, name) for name in names_of("loading")
                   if name not in ("from_adapter", "threads", "attention")}
        sight = getattr(self.backbone, "attention", "full")  # the toy has no other
        return {"model": self.backbone.title, "weights": self.s.model,
                "run": str(self.run) if self.run else None, "adapter": self.s.from_adapter or None,
                "memory": self.s.memory if self.run else None, "adapt": self.adapt,
                "other": changed(self.s, {**asdict(memdlm.Settings()),
                                          "objective": Settings.objective}),
                "options": changed(self, USUAL) | changed(self.s, loading)
                | ({} if sight == "full" else {"attention": sight})}

    # Generating text.

    def generate_until(self, requests, disable_tqdm=False):
        """Answer requests, in their order. An answer ends before the first of its stop strings."""
        signal.alarm(0)  # the task's samples are made: see `time_limit`
        jobs = [self.make_job(number, *request.args) for number, request in enumerate(requests)]
        # Requests of one length come one after the other, so that a batch has little padding.
        jobs.sort(key=lambda job: (job.room, job.temperature, len(job.ids), job.number))
        answers = [""] * len(jobs)
        with tqdm(total=len(jobs), desc="generating", unit="request", disable=disable_tqdm) as bar:
            for batch in self.split_into_batches(jobs):
                for job, text in zip(batch, self.decode(batch)):
                    for stop in job.stops:
                        text = text.split(stop)[0]
                    answers[job.number] = text
                    self.cache_hook.add_partial("generate_until", requests[job.number].args, text)
                bar.update(len(batch))
        self.report_cut()
        return answers

    def make_job(self, number, context, options):
        """A request's context and generation options -> Job. ValueError if they are not sound."""
        room, temperature = read_length(options), read_temperature(options)
        check_options(options, temperature)
        ids = self.encode_prompt(context, room)
        if options.get("max_length") is not None:  # of prompt and answer together
            total = check_number("max_length of the task", options["max_length"], 1)
            room = total - len(ids)
            if room < 1:
                raise ValueError(f"max_length of the task is {total}, but a prompt has {len(ids)} "
                                 "tokens, which leaves none to generate; give max_gen_toks instead")
        end = self.hf.eos_token if self.hf else None
        return Job(room, number, ids, read_stops(options.get("until"), end), temperature)

    def split_into_batches(self, jobs):
        """Neighbours of one length and temperature, at most `batch_size` at a time."""
        for _, same in itertools.groupby(jobs, key=lambda job: (job.room, job.temperature)):
            same = list(same)
            for start in range(0, len(same), self.batch_size):
                yield same[start:start + self.batch_size]

    def decode(self, jobs):
        """The texts of jobs that ask for the same length, before any stop string."""
        samples = [Sample(job.ids, [0] * job.room, [True] * job.room) for job in jobs]
        batch = collate(samples, [f"{self.seed} {job.number}" for job in jobs], False)
        options = self.decoder_options(jobs[0].temperature)
        if self.backbone.decoder is memdlm.denoise:
            options["stop_ids"] = self.tokenizer.stop_ids
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
        pairs = [self.encode_pair(*request.args) for request in requests]
        scores = []
        bar = tqdm(pairs, desc="scoring", unit="request", disable=disable_tqdm)
        for number, (prompt, rest) in enumerate(bar):
            scores.append(self.score(prompt, rest, f"{self.seed} {number}"))
            self.cache_hook.add_partial("loglikelihood", requests[number].args, scores[-1])
        self.report_cut()
        return scores

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """log p of each request's text, without a context.

        A text longer than max_length is scored in the harness's windows: the first tokens after
        the prefix, then each further window after the last token of the one before.
        """
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
        signal.alarm(0)  # the task's samples are made: see `time_limit`
        scores = []
        for number, request in enumerate(tqdm(requests, desc="scoring", unit="request",
                                              disable=disable_tqdm)):
            ids = self.encode(self.shield(request.args[0]))
            longest = self.max_length or len(ids) + 1
            windows = get_rolling_token_windows(ids, self.prefix_id, longest, context_len=1)
            parts = [self.score(*make_disjoint_window(window), f"{self.seed} {number} {i}",
                                greedy=False)[0] for i, window in enumerate(windows)]
            scores.append(sum(parts))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, scores[-1])
        return scores

    @torch.no_grad()
    def score(self, prompt, rest, name, greedy=True):
        """Score the tokens `rest` after the tokens of a prompt.

        Returns their log-likelihood, and whether greedy decoding would give them; with
        greedy=False nothing is decoded and the second value is False. name: decides the masks.
        """
        sample = Sample(prompt, rest, [True] * len(rest))
        if prompt == [self.prefix_id]:  # it is no prompt that phi could be written from
            sample = Sample([], prompt + rest, [False] + [True] * len(rest))
        batch = collate([sample], [name], False)
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
            valid = mark_response(torch.ones_like(maskable),
                                  batch.valid.response_at.expand(len(seeds)))
            k = 1 + (memdlm.uniform(seeds, "mc", 1) * n).long()  # [b, 1]
            u = memdlm.uniform(seeds, "mc masks", x0.shape[1])
            masked = maskable & (memdlm.rank_of(maskable, u) < k)
            phi_of_each = phi and {key: tuple(w.expand(len(seeds), *w.shape[1:]) for w in pair)
                                   for key, pair in phi.items()}
            nll = memdlm.response_nll(self.backbone, self.s, x0, masked, valid, phi_of_each)
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


# What does not change a method, where it is as usual.
USUAL = {"steps": 0, "mode": "plain", "block_length": 0, "threshold": 0.0, "cache": "none",
         "max_length": 0, "mc_samples": 128, "seed": 0}


def changed(settings, usual):
    """{name: value} of the settings that are not as usual. usual: {name: value}."""
    return {name: getattr(settings, name) for name, value in usual.items()
            if getattr(settings, name) != value}


def check_settings_of_loading(settings):
    """ValueError if one of Harness's settings is unknown, or not of its type."""
    types = {f.name: f.type for f in fields(Settings)}
    known = names_of("inner loop", "loading")
    for name, value in settings.items():
        if name not in known:
            raise ValueError(f"unknown argument {name!r}; known are run, model, adapt, batch_size, "
                             "seed, mc_samples, max_length, steps, mode, block_length, threshold, "
                             f"cache, {', '.join(known)}")
        if type(value) not in KINDS[types[name]]:
            raise ValueError(f"{name} is {value!r}, which is no {types[name]}")


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
    the first sample of each. limit: a number of samples, or a share below 1. chat: use the model's
    chat template. include: a folder with task files of the user. wait: seconds that RULER may take
    to make its samples. model_args: arguments of Harness. The scores are added to out/scores.json,
    the harness's own files go to out/<length>. ValueError if lm-evaluation-harness or a task is
    missing, or if a task has no such length.
    """
    try:
        harness_class = make_harness_class()
    except ImportError:
        raise ValueError("tasks need lm-evaluation-harness: "
                         "pip install 'lm-eval[ruler,longbench]'") from None
    # What is wrong is found before minutes of loading.
    lengths = [check_number("a length", length, 0, 1 << 20) for length in lengths]
    work = [(task, length) for task in tasks for length in lengths_of(task, lengths)]
    limit, wait = check_limit(limit), check_number("wait", wait, 1)
    if num_fewshot is not None:
        num_fewshot = check_number("num_fewshot", num_fewshot, 0)
    path, scores = Path(out) / "scores.json", []
    load_scores(path)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = Path(scratch) / "tokenizer"
        managers = [make_task_manager(task, task_metadata(task, length, str(tokenizer)), include)
                    for task, length in work]
        model = harness_class(**model_args)
        copy_tokenizer(model, tokenizer)
        if any(find_suite(task) == "ruler" for task in tasks):
            add_punctuation_tables(Path(scratch) / "nltk")
        given = {name: str(value) for name, value in model_args.items() if value is not None}
        options = dict(model=model, model_args=given, limit=limit, num_fewshot=num_fewshot,
                       apply_chat_template=chat)
        for (task, length), manager in zip(work, managers):
            seconds = wait if find_suite(task) == "ruler" else 0
            folder = Path(out) / ("full" if length is None else str(length))
            model.start_counting()
            results = run_task(task, manager, folder, seconds, options)
            name = name_scores(model, length, limit, num_fewshot, chat)
            rows = [row | name for row in read_scores(results, length)]
            print_scores(rows)
            add_scores(path, rows)
            scores += rows
    print(f"scores in {path}, the harness's own files beside it")
    return scores


def name_scores(model, length, limit, num_fewshot, chat):
    """What the rows of one task have in common: see paper/scores.py."""
    name = model.describe_method() | {"length": length, "limit": limit, "longest": model.longest,
                                      "cut": model.cut}
    if chat:
        name["options"]["chat_template"] = True
    if num_fewshot is not None:
        name["options"]["num_fewshot"] = num_fewshot
    return name


# BABILong's lengths in tokens. Its tasks from qa6 on have the first alone.
BABILONG = [0, *(1024 * 2 ** i for i in range(8))]


def lengths_of(task, lengths):
    """The lengths to run a task at: [None] if it has none. ValueError if it lacks one of these."""
    suite = find_suite(task)
    if suite not in ("ruler", "babilong"):
        return [None]
    known = set(lengths) - {0}
    if suite == "babilong":
        short = task == "babilong" or re.fullmatch(r"babilong_qa([6-9]|1\d|20)", task)
        known = BABILONG[:1] if short else BABILONG
    for length in lengths:
        if length not in known:
            some = ", ".join(map(str, known)) if suite == "babilong" else "any from 1 on"
            raise ValueError(f"{task} has no length {length}; it has {some}: choose with --lengths")
    return lengths


def run_task(task, manager, folder, seconds, options):
    """Run one task, leave the harness's own files in the folder, and return its results."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    tracker = EvaluationTracker(output_path=str(folder))
    with time_limit(seconds):
        results = simple_evaluate(tasks=[task], task_manager=manager, evaluation_tracker=tracker,
                                  bootstrap_iters=1000, log_samples=True, **options)
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
    """The harness's results -> a row for each score: of tasks and groups, by metric and filter.

    A row has task, metric, value and samples, their number; filter, unless it is "none"; and stderr
    if the harness computed it. Names and values are the harness's own. RULER reports every length
    that it knows, -1 where it measured none. These are no scores and are left out.
    """
    rows, numbers = [], results.get("n-samples", {})
    for task, values in results["results"].items():
        samples = numbers.get(task, {}).get("effective", values.get("sample_len"))
        for key, value in values.items():
            metric, comma, name = key.rpartition(",")
            is_stderr = f"{metric.removesuffix('_stderr')},{name}" in values
            unmeasured = find_suite(task) == "ruler" and metric.isdecimal() and value == -1
            if not comma or (metric.endswith("_stderr") and is_stderr) or (
                    unmeasured and metric != str(length)):
                continue
            row = {"task": task, "metric": metric, "value": plain(value), "samples": samples}
            if name != "none":
                row["filter"] = name
            stderr = plain(values.get(f"{metric}_stderr,{name}"))
            rows.append(row if stderr is None else row | {"stderr": stderr})
    return rows


def print_scores(rows):
    for row in rows:
        value, metric = row["value"], row["metric"]
        metric += "," + row["filter"] if "filter" in row else ""
        length = "" if row["length"] is None else row["length"]
        value = f"{value:8.4f}" if isinstance(value, (int, float)) else value
        adapted = ", adapted to each prompt" if row["adapt"] else ""
        cut = f", {row['cut']} prompts cut" if row["cut"] else ""
        say(f"{row['task']:28} {length:>6} {metric:22} {value}  "
            f"({row['samples']} samples{adapted}{cut})")


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

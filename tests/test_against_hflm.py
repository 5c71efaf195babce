"""Our model in lm-evaluation-harness's sense against the harness's own, HFLM. Offline.

Both have one tokenizer. It merges over the border between context and continuation, as real ones
do. The models themselves are not asked: what is compared are the tokens and the prompts that each
class would give its model.
"""
import copy
import json
from types import SimpleNamespace

import pytest
import torch

from backbones.tiny import TEMPLATE, write_tiny
from paper.harness import make_harness_class, read_scores

# Joins a space with the letter after it, words that begin elsewhere, and line ends.
MERGES = [("Ġ", "B"), ("Ġ", "C"), ("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ċ", "Ċ"), ("a", "n"),
          ("n", "s"), ("Ġ", "Ġ"), ("é", "é")]
STRICT = ("{% for m in messages %}{% if m['role'] == 'system' %}"
          "{{ raise_exception('no system role') }}{% endif %}{% endfor %}" + TEMPLATE)


def merging_tokenizer(start=None, template=TEMPLATE):
    """A byte-level BPE with merges, two tokens that end a text, and maybe one that starts it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [pair for pair in MERGES if {*"".join(pair)} <= {*alphabet}]
    vocab = {token: i for i, token in enumerate(alphabet + [a + b for a, b in merges])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    special = dict(eos_token="<|endoftext|>", pad_token="<|endoftext|>", mask_token="<|mask|>",
                   additional_special_tokens=["<|role_end|>", "<role>", "</role>"])
    if start:
        special["bos_token"] = start
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    if start:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, tokenizer.bos_token_id)])
    tokenizer.chat_template = template
    return tokenizer


def write_model(folder, tokenizer):
    """A tiny LLaDA-MoE with this tokenizer."""
    write_tiny("llada-moe", folder)
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"mask_token_id": tokenizer.mask_token_id, "eos_token_id": tokenizer.eos_token_id}
    (folder / "config.json").write_text(json.dumps(raw | {"pad_token_id": raw["eos_token_id"]}))
    return folder


def open_theirs(tokenizer, max_length=None):
    """HFLM with a Llama of one layer. It records what it would ask the model, in `asked`."""
    from lm_eval.models.huggingface import HFLM
    from transformers import LlamaConfig, LlamaForCausalLM

    class Recorder(HFLM):
        def _loglikelihood_tokens(self, requests, **options):
            self.asked += [(context, rest) for _, context, rest in requests]
            return [(0.0, True)] * len(requests)

        def _model_generate(self, context, max_length, stop, **options):
            self.asked.append((context[0].tolist(), max_length - context.shape[1], stop))
            said = self.tokenizer(self.said, add_special_tokens=False)["input_ids"]
            return torch.tensor([context[0].tolist() + said])

    config = LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                         intermediate_size=8, vocab_size=len(tokenizer))
    theirs = Recorder(LlamaForCausalLM(config), tokenizer=tokenizer, max_length=max_length or 4096)
    theirs.asked, theirs.said = [], ""
    return theirs


def open_ours(folder, **options):
    """Our class, which also records instead of asking the model."""
    ours = make_harness_class()(model=str(folder), rank=4, alpha=8.0, **options)
    ours.asked, ours.said = [], ""

    def score(prompt, rest, name, greedy=True):
        ours.asked.append((prompt, rest))
        return 0.0, True

    def decode(jobs):
        ours.asked += [(job.ids, job.room, job.stops) for job in jobs]
        return [ours.said] * len(jobs)

    ours.score, ours.decode = score, decode
    return ours


@pytest.fixture(scope="module", params=[None, "<|startoftext|>"])
def model(request, tmp_path_factory):
    """(folder, tokenizer); the second tokenizer puts a start of text before every text."""
    tokenizer = merging_tokenizer(request.param)
    return write_model(tmp_path_factory.mktemp("model") / "m", tokenizer), tokenizer


@pytest.fixture
def both(model):
    """Our class and theirs, without a limit on the length."""
    return open_ours(model[0]), open_theirs(copy.deepcopy(model[1]))  # tests change templates


def requests_of(*arguments):
    return [SimpleNamespace(args=a, task_name="t") for a in arguments]


def ask(method, harnesses, *arguments):
    """The answers of each harness to the same requests, and what each would ask its model."""
    answers = [getattr(each, method)(requests_of(*arguments), disable_tqdm=True)
               if method != "loglikelihood_rolling" else getattr(each, method)(
                   requests_of(*arguments)) for each in harnesses]
    return answers, [each.asked for each in harnesses]


PAIRS = [
    ("Which? Answer: ", "B"), ("Which? Answer: ", "C"), ("Which? Answer:", " B"),
    ("Which?\n\nAnswer:\n", "\nthe"), ("a", "nd"), ("", "B"), ("", " the end"), ("x  ", "  y"),
    ("The café\t\n ", "é"), ("x\u00a0", "B"), ("x\u2003", " C"), ("🙂 ", "🙂"),
    ("Q: the?\nA:", " " + "the " * 30), ("long " * 50, "B")]


def test_contexts_and_continuations_become_the_same_tokens(both):
    _, (ours, theirs) = ask("loglikelihood", both, *PAIRS)
    assert ours == theirs
    assert ours[0][1] == both[0].tokenizer.encode(" B") and len(ours[0][1]) == 1


def test_an_answer_that_merges_with_the_context_has_a_likelihood(model):
    """B1: the tiny random model finds one of about 300 tokens about as likely as another."""
    ours = make_harness_class()(model=str(model[0]), rank=4, alpha=8.0, mc_samples=2)
    scores = ours.loglikelihood(requests_of(*PAIRS[:2]), disable_tqdm=True)
    assert all(-6.5 < value < -5 for value, _ in scores)
    assert scores[0] != scores[1]


@pytest.mark.parametrize("pair", [("x", ""), ("", ""), ("th", "e")])
def test_a_continuation_without_a_token_is_refused_by_both(both, pair):
    """The last pair is one token, which the context alone has too."""
    ours, theirs = both
    with pytest.raises(ValueError, match=f"^the continuation '{pair[1]}' adds no token"):
        ours.loglikelihood(requests_of(pair))
    if pair[0]:
        ask("loglikelihood", [theirs], pair)
        assert theirs.asked[-1][1] == []  # which its own _loglikelihood_tokens refuses
    else:
        with pytest.raises(IndexError):
            ask("loglikelihood", [theirs], pair)


@pytest.mark.parametrize("max_length", [None, 5, 7, 64])
def test_rolling_windows_are_the_same(model, max_length):
    harnesses = open_ours(model[0], max_length=max_length), open_theirs(model[1], max_length)
    texts = ["the B the C", "", "a", "the\n\nthe" * 9, " " * 7, "Bé"]
    (ours, theirs), (own, other) = ask("loglikelihood_rolling", harnesses, *((t,) for t in texts))
    assert own == other and ours == theirs


def test_contexts_are_cut_alike(model):
    """Their model reads all tokens but the last: max_length of them."""
    ours, theirs = open_ours(model[0], max_length=20), open_theirs(model[1], 20)
    ask("loglikelihood", (ours, theirs), *PAIRS[:7], ("long " * 50, "B"), ("long " * 50, " the B"))
    assert ours.asked == [(context[-21 + len(rest):], rest) for context, rest in theirs.asked]
    assert ours.cut == 2 and ours.longest > 200
    with pytest.raises(ValueError, match="a continuation has 30 tokens, more than max_length 20"):
        ours.loglikelihood(requests_of(("x", "y" * 30)))


OPTIONS = [
    {}, {"max_gen_toks": 9}, {"max_new_tokens": 9}, {"max_tokens": 9},
    {"max_completion_tokens": 9}, {"max_gen_toks": None, "max_tokens": 9},
    {"max_completion_tokens": 3, "max_tokens": 4, "max_new_tokens": 5, "max_gen_toks": 6},
    {"max_tokens": 4, "max_completion_tokens": 3}, {"max_gen_toks": "12"}, {"max_length": 40},
    {"max_length": 40, "max_gen_toks": 7}, {"until": "\n"}, {"until": ["\n", "the"]},
    {"until": ""}, {"until": ["", "\n"]}, {"until": []}, {"until": ["<|endoftext|>"]},
    {"do_sample": False, "temperature": 0.0}, {"do_sample": False, "temperature": 1},
    {"temperature": 0}, {"temperature": "0.0"}, {"do_sample": None}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_generation_asks_for_the_same(both, options):
    """Prompt, length, stop strings, and the answer cut before the first of these."""
    for each in both:
        each.said = "One the B\nTwo<|endoftext|>Three"
    (ours, theirs), ((own,), (other,)) = ask("generate_until", both, ("Say: ", options))
    assert own[:2] == other[:2]
    assert own[2] == [stop for stop in other[2] if stop]
    assert ours == [cut_at(both[0].said, own[2])]


def cut_at(text, stops):
    """The text before the first of these strings."""
    return text[:min([text.index(stop) for stop in stops if stop in text], default=len(text))]


def test_no_stop_strings_at_all(both):
    """`until: null`, as tasks have it: their class puts None among its stop strings."""
    ask("generate_until", both[:1], ("Say: ", {"until": None}))
    assert both[0].asked[0][2] == ["<|endoftext|>"]


def test_prompts_are_cut_alike_and_the_answer_needs_room(model):
    ours, theirs = open_ours(model[0], max_length=30), open_theirs(model[1], 30)
    for options in ({"max_gen_toks": 10}, {"max_gen_toks": 29}, {"max_gen_toks": 1}):
        ask("generate_until", (ours, theirs), ("the long " * 9, options), ("B", options))
    assert sorted(ours.asked) == sorted(theirs.asked)
    assert ours.cut == sum(len(ours.encode(text)) > room for room in (20, 1, 29)
                           for text in ("the long " * 9, "B"))
    for harness, error in ((ours, ValueError), (theirs, AssertionError)):
        with pytest.raises(error, match="max"):
            harness.generate_until(requests_of(("x", {"max_gen_toks": 30})))


@pytest.mark.parametrize("options, name", [
    ({"max_gen_toks": 0}, "max_gen_toks"), ({"max_new_tokens": -3}, "max_new_tokens"),
    ({"max_tokens": "many"}, "max_tokens"), ({"max_completion_tokens": 2.5}, "max_completion"),
    ({"max_gen_toks": True}, "max_gen_toks"), ({"max_gen_toks": float("nan")}, "max_gen_toks"),
    ({"max_length": 2}, "max_length"), ({"until": 3}, "until"), ({"until": [None]}, "until"),
    ({"temperature": -1}, "temperature"), ({"temperature": "warm"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"do_sample": "yes"}, "do_sample"), ({"do_sample": True}, "do_sample"),
    ({"do_sample": True, "temperature": 0.5, "top_p": 0.9}, "top_p"), ({"num_beams": 4}, "beams"),
    ({"best_of": 2}, "best_of")])
def test_options_that_cannot_be_had_are_refused_by_name(both, options, name):
    with pytest.raises(ValueError, match=name) as error:
        both[0].generate_until(requests_of(("Say: ", options)))
    assert "\n" not in str(error.value)


def test_sampling_is_at_the_temperature_of_the_task(model):
    ours = make_harness_class()(model=str(model[0]), rank=4, alpha=8.0, batch_size=4)
    wish = {"max_gen_toks": 8}
    asked = requests_of(("Say: ", wish), ("Say: ", wish | {"temperature": 5.0}),
                        ("Say: ", wish | {"temperature": 5.0, "do_sample": False, "top_p": 0.9}),
                        ("Say: ", wish | {"temperature": 5.0, "do_sample": True, "top_p": 1.0}))
    best, hot, cold, warm = ours.generate_until(asked, disable_tqdm=True)
    assert best == cold and best not in (hot, warm) and hot != warm
    assert [hot, warm] == [text for text in ours.generate_until(asked, disable_tqdm=True)
                           if text != best]


# ---- Chat templates -----------------------------------------------------------------------------

SYSTEM = {"role": "system", "content": "Be brief. "}
USER, REPLY = ({"role": "user", "content": "the B?"}, {"role": "assistant", "content": "C "})
PREFIX = {"role": "assistant", "content": "The key is in"}


@pytest.mark.parametrize("template", [TEMPLATE, STRICT, "{{ bos_token }}" + TEMPLATE],
                         ids=["plain", "strict", "start"])
@pytest.mark.parametrize("turns, open_turn", [
    ([USER], True), ([SYSTEM, USER], True), ([SYSTEM, USER, REPLY, USER], True),
    ([USER, PREFIX], False), ([SYSTEM, USER, REPLY, USER, PREFIX], False)])
def test_chats_become_the_same_prompts(both, template, turns, open_turn):
    """B2: what the assistant's turn begins with ends the prompt; it is not a turn that is over."""
    ours, theirs = both
    ours.hf.chat_template = theirs.tokenizer.chat_template = template
    prompts = [each.apply_chat_template(turns, add_generation_prompt=open_turn) for each in both]
    assert prompts[0] == prompts[1]
    assert open_turn or prompts[0].endswith("<role>ASSISTANT</role>The key is in")
    asked = [ask("generate_until", [each], (prompt, {"max_gen_toks": 4}))[1][0]
             for each, prompt in zip(both, prompts)]
    asked += [ask("loglikelihood", [each], (prompt, " B"))[1][0]
              for each, prompt in zip(both, prompts)]
    assert asked[0] == asked[1] and asked[2] == asked[3]
    assert ours.hf.convert_tokens_to_ids("</role>") in ours.asked[0][0]


def test_a_template_is_chosen_by_name(both):
    ours, theirs = both
    several = {"default": TEMPLATE, "loud": TEMPLATE.replace("HUMAN", "HUMAN!")}
    for hf in (ours.hf, theirs.tokenizer):
        hf.chat_template = several
    for name in (True, "loud", False, None):
        assert ours.chat_template(name) == theirs.chat_template(name)
    ours.chat_template("loud")
    assert "HUMAN!" in ours.apply_chat_template([USER])  # theirs is the default's, and only named
    assert ours.chat_template(True) == theirs.chat_template(True)
    assert ours.apply_chat_template([USER]) == theirs.apply_chat_template([USER])
    for hf in (ours.hf, theirs.tokenizer):
        hf.chat_template = {"loud": TEMPLATE}
    for each in both:
        for name in (True, "low"):
            with pytest.raises(ValueError, match="loud"):
                each.chat_template(name)
        each.chat_template("loud")
    for each, hf in ((ours, ours.hf), (theirs, theirs.tokenizer)):
        hf.chat_template = TEMPLATE  # the only one, whatever it is called
        assert each.chat_template("loud") == each.chat_template(True) == TEMPLATE
        hf.chat_template = None
        assert each.chat_template(True) is None
    with pytest.raises(ValueError, match="no chat template"):
        ours.apply_chat_template([USER])


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ messages[9].content.x }}",
                                      "{{ raise_exception('no') }}", "{% for %}"])
def test_a_template_that_fails_is_one_line(both, template):
    both[0].hf.chat_template = template
    for turns in ([USER], [SYSTEM, USER]):
        with pytest.raises(ValueError, match="^the model's chat template refuses") as error:
            both[0].apply_chat_template(turns)
        assert "\n" not in str(error.value)


# ---- Whole tasks, through the harness ----------------------------------------------------------

COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}
test_split: test
fewshot_split: train
fewshot_config: {{sampler: first_n}}
description: "Be brief.\\n"
metadata: {{version: 1}}
"""
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}} Answer: "
doc_to_choice: ["B", "C", "the end"]
doc_to_target: label
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_mutual_info}]
""", "prefixed": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
gen_prefix: "The key is in"
generation_kwargs: {max_gen_toks: 7, until: ["\\n"], do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match}]
""", "next": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{answer}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""", "whole": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{answer}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""}
DOCS = [{"question": question, "answer": answer, "label": i % 3} for i, (question, answer) in
        enumerate([("Who is the B?", "Ann"), ("  Where\n\n", "the hall "), ("Is it é? 🙂", "no\n"),
                   ("?", "B"), ("Which of the two", "C")])]


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory):
    """A folder with a task of each kind, on documents of our own."""
    root = tmp_path_factory.mktemp("tasks")
    (root / "data.json").write_text(json.dumps(DOCS))
    for name, text in TASKS.items():
        common = COMMON.format(data=root / "data.json")
        (root / f"{name}.yaml").write_text(f"task: own_{name}\n{common}{text}")
    return root


def run_all(harness, folder, **options):
    """The harness's results of all tasks in a folder, for one of the two classes."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    manager = TaskManager(include_defaults=False, include_path=str(folder))
    names = [f"own_{name}" for name in TASKS]
    return simple_evaluate(harness, tasks=names, task_manager=manager, bootstrap_iters=0,
                           **options)


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {}, {"num_fewshot": 2}, {"apply_chat_template": True},
    {"apply_chat_template": True, "num_fewshot": 2, "fewshot_as_multiturn": True},
    {"apply_chat_template": True, "num_fewshot": 2, "fewshot_as_multiturn": False},
    {"system_instruction": "You know."},
    {"system_instruction": "You know.", "apply_chat_template": True, "num_fewshot": 1}], ids=str)
def test_tasks_of_every_kind_ask_for_the_same(both, task_folder, options):
    for each in both:
        each.said = "the hall\nB"
    results = [run_all(each, task_folder, **options) for each in both]
    ours, theirs = both
    jobs, others = (sorted(row for row in each.asked if len(row) == 3) for each in both)
    assert jobs == others and len(jobs) == len(DOCS)  # each class sorts them in its own way
    open_turn = "apply_chat_template" in options
    end = "<role>ASSISTANT</role>" * open_turn + "The key is in"
    assert all(ours.hf.decode(ids).endswith(end) for ids, _, _ in jobs)
    pairs, others = ([row for row in each.asked if len(row) == 2] for each in both)
    assert pairs == others and len(pairs) == (6 + 1 + 1) * len(DOCS)
    assert results[0]["results"] == results[1]["results"]
    assert {row["task"] for row in read_scores(results[0], None)} == {f"own_{n}" for n in TASKS}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"apply_chat_template": True}], ids=str)
def test_odd_documents_lose_no_score(model, task_folder, tmp_path, options):
    """Empty texts, names of special tokens, private characters, a Jinja expression."""
    odd = [{"question": text, "answer": text, "label": 0} for text in
           ("", " ", "<|mask|>", "a<|endoftext|>", "<role>x</role>", "🙂\u200d", "\ue000", "\x00",
            "{{ 7 }}", "\u2028", "é" * 50)]
    (tmp_path / "data.json").write_text(json.dumps(odd))
    for path in task_folder.glob("*.yaml"):
        text = path.read_text().replace(str(task_folder), str(tmp_path))
        (tmp_path / path.name).write_text(text)
    ours = make_harness_class()(model=str(model[0]), rank=4, alpha=8.0, mc_samples=1, adapt=True,
                                batch_size=4)
    results = run_all(ours, tmp_path, **options)
    numbers = results["n-samples"]
    assert numbers == {f"own_{name}": {"original": 11, "effective": 11} for name in TASKS}
    assert len(read_scores(results, None)) == 3 + 1 + 2 + 2


# ---- Special tokens in a benchmark's text, and texts that are odd -------------------------------

NAMES = ["<|mask|>", "<|endoftext|>", "<|role_end|>", "<role>", "</role>"]


def test_names_of_special_tokens_in_a_text_are_characters(both):
    """E3: nothing of the text is lost, and no special token comes from it."""
    ours = both[0]
    special = {ours.hf.convert_tokens_to_ids(name) for name in NAMES}
    start = len(ours.encode(""))
    for name in NAMES:
        text = f"a {name}{name} b{name}"
        ask("generate_until", [ours], (text, {"max_gen_toks": 4}))
        ask("loglikelihood", [ours], (text, name), (name[:4], name[4:] + " B"), ("", name))
        ask("loglikelihood_rolling", [ours], (text,))
        asked = [row[0][start:] + (row[1] if isinstance(row[1], list) else [])
                 for row in ours.asked]
        decode = ours.hf.decode
        assert [decode(ids) for ids in asked[:3]] == [text, text + name, name + " B"]
        for ids in asked[:3] + [row[1] for row in ours.asked[3:]]:
            assert not special & {*ids[start:]}
        prompt = ours.apply_chat_template([{"role": "user", "content": text}])
        ids = ours.encode_pair(prompt, name)[0][start:]
        assert sum(i in special for i in ids) == 5  # the template's own
        assert decode(ids) == f"<role>HUMAN</role>{text}<|role_end|><role>ASSISTANT</role>"
        ours.asked.clear()


@pytest.mark.parametrize("text", ["\ud83d", "a\udc00b", "\ud83d\ude42", "\x00", "", " ", "\ue000",
                                  "<\ue000|mask|>"])
def test_odd_texts_are_read(both, text):
    """What no tokenizer can read becomes U+FFFD."""
    ours = both[0]
    ask("generate_until", [ours], (text, {"max_gen_toks": 4}))
    ask("loglikelihood", [ours], (text, " B"), ("A", text + "B"), ("", text + "B"))
    ask("loglikelihood_rolling", [ours], (text,))
    assert all(rest for _, rest in ours.asked[1:4])
    if "\ud800" <= text[:1] <= "\udfff" and len(text) == 1:
        assert "�" in ours.hf.decode(ours.asked[0][0])

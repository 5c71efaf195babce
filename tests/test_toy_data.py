"""The toy data is checked by other means than it was made: by parsing the prompt's words."""

import json
import random
import re
import sys
from collections import Counter, defaultdict

import pytest

from data import Sample, collate
from toy import tasks, text, tokenizer
from toy.data import ToyData
from toy.tokenizer import EOS, MASK, PAD, SEP

LENGTHS = (16, 17, 18, 31, 32, 33, 64, 100, 333, 2048)
BYTES = tokenizer.Bytes()


def parts(sample):
    """(prompt words, visible words of the rest, answer words) of a sample of words."""
    rest = tasks.WORDS.pieces(sample.rest)
    return (
        tasks.WORDS.pieces(sample.prompt),
        [word for word, is_answer in zip(rest, sample.answer) if not is_answer],
        [word for word, is_answer in zip(rest, sample.answer) if is_answer],
    )


def samples(name, lengths=LENGTHS, **settings):
    """(length, sample) for several seeds at each length."""
    for length in lengths:
        for seed in range(3 if length > 500 else 20):
            yield length, tasks.TASKS[name](random.Random(seed), length, **settings)


# Tokenizers


def test_words_are_distinct_and_groups_have_40():
    words = tasks.WORDS.words
    assert len(set(words)) == len(words) == tasks.WORDS.vocab_size
    assert words[:4] == tokenizer.SPECIALS
    groups = (tokenizer.KEYS, tokenizer.VALUES, tokenizer.SYMBOLS)
    assert [len(group) for group in groups] == [40, 40, 40]


def test_fillers_share_no_word_with_facts():
    others = set(tasks.WORDS.words) - set(tokenizer.FILLER_WORDS)
    assert not others & set(" ".join(tokenizer.FILLER).split())


@pytest.mark.parametrize("bad", ["unicorn", "<mask>", "<sep>", "<pad>", "<eos>", "Fox"])
def test_words_reject_what_they_do_not_know(bad):
    with pytest.raises(ValueError) as error:
        tasks.WORDS.encode(f"fox {bad} ruby")
    assert repr(bad) in str(error.value) and "\n" not in str(error.value)


def test_words_round_trip_and_specials():
    ids = tasks.WORDS.encode(" fox\truby \n jade")
    assert tasks.WORDS.decode([PAD, *ids[:2], SEP, ids[2], MASK, EOS]) == "fox ruby jade"
    assert tasks.WORDS.pieces([SEP, ids[0], MASK]) == ["<sep>", "fox", "<mask>"]


@pytest.mark.parametrize("words", ["", "<mask><eos>", "naïve 日本 😀\u2028\x00\r\n\t", "e\u0301"])
def test_bytes_round_trip(words):
    ids = BYTES.encode(words)
    assert BYTES.decode([MASK, *ids, EOS, PAD]) == words
    assert len(BYTES.pieces(ids)) == len(ids) == len(words.encode())
    assert all(4 <= i < BYTES.vocab_size for i in ids)


def test_bytes_round_trip_of_random_unicode():
    rng = random.Random(0)
    for _ in range(200):
        points = [rng.randrange(rng.choice((128, 2048, 0x110000))) for _ in range(20)]
        words = "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)
        assert BYTES.decode(BYTES.encode(words)) == words
        assert len(BYTES.pieces(BYTES.encode(words))) == len(words.encode())


def test_bytes_of_all_values_and_broken_characters():
    every = BYTES.encode_bytes(bytes(range(256)))
    assert every == list(range(4, 260)) and BYTES.vocab_size == 260
    assert len(BYTES.pieces(every)) == 256
    euro = BYTES.encode("€")
    assert BYTES.decode(euro[:2]) == "\ufffd"
    with pytest.raises(ValueError, match="surrogate"):
        BYTES.encode("ab\ud800")


def test_bytes_pieces_are_readable():
    ids = BYTES.encode("aé\n€ ")
    assert BYTES.pieces(ids) == ["a", "é", "·", "⏎", "€", "·", "·", " "]
    ids[5] = MASK
    assert BYTES.pieces(ids) == ["a", "é", "·", "⏎", "\\xe2", "<mask>", "\\xac", " "]


# All tasks


@pytest.mark.parametrize("name", tasks.TASKS)
def test_lengths_are_exact(name):
    lengths = [length for length in LENGTHS if length >= 18]
    for length, sample in samples(name, lengths):
        # How far a dictionary may be shorter is checked below.
        assert len(sample.prompt) == length or name == "dictionary"
        assert len(sample.rest) == len(sample.answer) and any(sample.answer)
        assert min(sample.prompt + sample.rest) >= SEP and SEP not in sample.prompt
        assert SEP not in parts(sample)[2]


@pytest.mark.parametrize("name", tasks.TASKS)
def test_same_seed_same_sample_and_other_seed_other_sample(name):
    first, again, other = (tasks.TASKS[name](random.Random(seed), 32) for seed in (5, 5, 6))
    assert first == again != other


@pytest.mark.parametrize("name, low", [
    ("dictionary", 2), ("languages", 1), ("prose", 1), ("multivalue", 16), ("tracking", 16),
    ("commonwords", 18), ("location", 16),
])
def test_shortest_length_works_and_less_is_refused(name, low):
    tasks.TASKS[name](random.Random(0), low)
    with pytest.raises(ValueError, match=f"at least {low}$"):
        tasks.TASKS[name](random.Random(0), low - 1)


# Single tasks


@pytest.mark.parametrize("rep", [1, 2, 3, None])
def test_dictionary(rep):
    for length, sample in samples("dictionary", (8, 16, 30, 32, 64), rep=rep):
        prompt, visible, answer = parts(sample)
        times = rep or 1
        distinct = length // 2 // times
        assert len(prompt) == 2 * distinct * times
        stated = Counter(zip(prompt[::2], prompt[1::2]))
        assert len(stated) == distinct and set(stated.values()) == {times}
        found = dict(stated.keys())
        assert len(found) == distinct and set(found) <= set(tokenizer.KEYS)
        assert set(found.values()) <= set(tokenizer.VALUES)
        assert len(set(visible)) == len(visible) == 1 + min(4, distinct)
        assert answer == [found[key] for key in visible[1:]]
        assert sample.answer == [False] + [False, True] * len(answer)


def test_dictionary_values_are_uniform_and_order_is_shuffled():
    rng = random.Random(1)
    drawn = [parts(tasks.dictionary(rng, 32, rep=2)) for _ in range(1000)]
    values = Counter(value for _, _, answer in drawn for value in answer)
    assert len(values) == 40 and max(values.values()) < 2 * min(values.values())
    # Unshuffled repetition would make the second half equal to the first.
    assert sum(prompt[:16] == prompt[16:] for prompt, _, _ in drawn) == 0
    assert any(len(set(answer)) < len(answer) for _, _, answer in drawn)


def test_dictionary_rep_is_the_smallest_that_fits():
    for length in range(2, 400, 7):
        prompt = parts(tasks.dictionary(random.Random(0), length, rep=None))[0]
        rep = Counter(prompt[::2])[prompt[0]]
        assert length - 2 * rep < len(prompt) <= length
        if rep > 1:
            with pytest.raises(ValueError, match=f"use rep {rep} or more"):
                tasks.dictionary(random.Random(0), length, rep=rep - 1)


def test_languages_have_two_successors_of_three_quarters_and_one_quarter():
    usual = total = 0
    tables = set()
    for seed in range(10):
        prompt, visible, answer = parts(tasks.languages(random.Random(seed), 3000))
        assert len(answer) == 16 and not visible
        follow = defaultdict(Counter)
        for symbol, following in zip(prompt, prompt[1:]):
            follow[symbol][following] += 1
        assert len(follow) <= 12 and set(follow) <= set(tokenizer.SYMBOLS)
        for symbol, counts in follow.items():
            assert symbol not in counts and len(counts) <= 2
            usual += max(counts.values())
            total += sum(counts.values())
        for symbol, following in zip(prompt[-1:] + answer, answer):
            assert following in follow[symbol]
        tables.add(str(sorted(follow)))
    assert abs(usual / total - 0.75) < 0.02 and len(tables) == 10


def test_prose_is_one_language_for_all_samples():
    follow = defaultdict(Counter)
    for seed in range(40):
        prompt, visible, answer = parts(tasks.prose(random.Random(seed), 1000))
        assert len(answer) == 16 and not visible
        for word, following in zip(prompt, prompt[1:] + answer[:1]):
            follow[word][following] += 1
    assert set(follow) == set(tasks.WORDS.words[4:]) - set(tokenizer.SYMBOLS)
    usual = sum(max(counts.values()) for counts in follow.values())
    total = sum(sum(counts.values()) for counts in follow.values())
    assert abs(usual / total - 0.9) < 0.01
    # A permutation.
    assert len({counts.most_common(1)[0][0] for counts in follow.values()}) == len(follow)


def test_multivalue():
    repeated_distractors = 0
    for length, sample in samples("multivalue"):
        prompt, visible, answer = parts(sample)
        needles = re.findall(r"\bthe (\w+) is (\w+)", " ".join(prompt))
        key = visible[-1]
        assert visible == ["<sep>", "what", "is", "the", key] and len(set(answer)) == 4
        assert answer == [value for name, value in needles if name == key]
        if length >= 24:
            assert len(needles) > 4
        counts = Counter(name for name, _ in needles)
        repeated_distractors += length >= 64 and counts.most_common(2)[1][1] == 4
        assert max(counts.values()) == 4
    assert repeated_distractors > 20


def test_tracking():
    for length, sample in samples("tracking"):
        prompt, visible, answer = parts(sample)
        number = visible[-1]
        assert visible == ["<sep>", "which", "var", "=", number]
        given, chain = {}, []
        for name, source in re.findall(r"\bvar (\w+) = (\w+)", " ".join(prompt)):
            assert name not in given
            given[name] = given.get(source, source)
            chain += [name] if given[name] == number else []
        assert answer == chain and len(chain) == 1 + min(4, length // 8 - 1)
        # Every other variable must really be something else, and there must be some if room.
        assert set(given.values()) <= set(tokenizer.NUMBERS)
        assert len(given) > len(chain) or length < 24


def test_tracking_with_given_hops():
    sample = tasks.tracking(random.Random(0), 64, hops=12)
    assert len(parts(sample)[2]) == 13
    for length, hops in ((64, 13), (64, 0), (51, 12)):
        with pytest.raises(ValueError, match="at (least|most)"):
            tasks.tracking(random.Random(0), length, hops=hops)


@pytest.mark.parametrize("common", [1, 3, 10])
def test_commonwords(common):
    for _, sample in samples("commonwords", (60, 79, 139, 159, 160, 1000), common=common):
        prompt, visible, answer = parts(sample)
        ranked = Counter(prompt).most_common()
        assert visible == ["<sep>", "common", "words"]
        assert {word for word, _ in ranked[:common]} == set(answer)
        assert ranked[common - 1][1] >= 3 * ranked[common][1]
        assert len(answer) == common and answer == sorted(answer, key=prompt.index)


def test_location():
    people_seen, moved_on = set(), 0
    for length, sample in samples("location"):
        prompt, visible, answer = parts(sample)
        moves = re.findall(r"\b(\w+) went to the (\w+)", " ".join(prompt))
        person = visible[-1]
        assert visible == ["<sep>", "where", "is", person] and len(moves) == min(12, length // 8)
        places = [place for who, place in moves if who == person]
        assert answer == [places[-1]]
        people_seen |= {who for who, _ in moves}
        moved_on += len(set(places)) > 1
    assert people_seen == set(tokenizer.PEOPLE) and moved_on > 20


def test_facts_are_scattered_over_the_whole_prompt():
    starts = [parts(sample)[0].index("went") for _, sample in samples("location", [64] * 10)]
    assert len(set(starts)) > 5
    ends = [parts(sample)[0][::-1].index("went") for _, sample in samples("location", [64])]
    assert len(set(ends)) > 5


def shapes(name, progress):
    """The (prompt length, times the first key is stated) that a curriculum draws."""
    rng = random.Random(0)
    drawn = [tasks.curriculum(name, rng, progress).prompt for _ in range(100)]
    return {(len(prompt), prompt.count(prompt[0]) if name == "dictionary" else 0)
            for prompt in drawn}


def test_curriculum_grows():
    assert shapes("dictionary", 0.59) == {(16, 2)}
    assert shapes("dictionary", 0.6) == {(16, 1), (16, 2), (32, 1), (32, 2)}
    assert shapes("languages", 0.0) == shapes("languages", 0.999) == {(32, 0)}
    for name in ("multivalue", "tracking", "commonwords", "location"):
        assert shapes(name, 0.39) == {(32, 0)}
        assert shapes(name, 0.4) == {(32, 0), (64, 0)}


def test_curriculum_mixture_and_errors():
    rng = random.Random(0)
    signs = {"what": 0, "which": 0, "common": 0, "where": 0, "dictionary": 0}
    for _ in range(1000):
        visible = parts(tasks.curriculum("retrieval", rng, 0.5))[1]
        signs[visible[1] if visible[1] in signs else "dictionary"] += 1
    assert min(signs.values()) > 150
    with pytest.raises(ValueError, match="no task 'sums': use one of dictionary"):
        tasks.curriculum("sums", rng, 0.5)
    for progress in (-0.1, 1.0):
        with pytest.raises(ValueError, match="progress"):
            tasks.curriculum("dictionary", rng, progress)


# Real text


@pytest.fixture(scope="module")
def python_docs():
    return text.documents("python", "train"), text.documents("python", "test")


def long_lines(docs):
    return {line.strip() for _, data in docs for line in data.split(b"\n")
            if len(line.strip()) >= 40}


def test_python_documents(python_docs):
    train, test = ({name: data for name, data in docs} for docs in python_docs)
    assert not set(train) & set(test) and list(train) == sorted(train)
    assert 0.03 < len(test) / (len(train) + len(test)) < 0.2
    for name, data in {**train, **test}.items():
        assert len(data) >= 2000 and data.decode("utf-8")
        assert name.endswith(".py") and not name.startswith("/")
        assert not re.search(r"(^|/)(site-packages|tests?|idle_test|encodings|pydoc_data)/", name)
    assert "argparse.py" in {**train, **test}


def test_pydoc_documents_are_held_out_in_content_too():
    train, test = text.documents("pydoc", "train"), text.documents("pydoc", "test")
    assert train and test and not {name for name, _ in train} & {name for name, _ in test}
    assert all(len(data) >= 600 for _, data in train + test)
    known = long_lines(train)
    for document in test:
        lines = long_lines([document])
        assert len(lines & known) <= 0.2 * len(lines)


def test_documents_errors(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="no source 'books'"):
        text.documents("books", "train")
    with pytest.raises(ValueError, match="no split 'dev'"):
        text.documents("pydoc", "dev")
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ValueError, match="without pydoc_data"):
        text.documents("pydoc", "train")
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "short.py").write_bytes(b"#" * 1999)
    (tmp_path / "latin.py").write_bytes(b"\xe9" * 5000)
    with pytest.raises(ValueError, match="no Python source files"):
        text.documents("python", "train")


def test_cut_is_inside_one_document_and_proportional_to_length():
    docs = [("a", b"a" * 10), ("b", b"b" * 109), ("c", bytes(range(100, 200)) * 2 + b"c" * 9)]
    rng = random.Random(0)
    names, starts = Counter(), set()
    for _ in range(3000):
        sample = text.cut(rng, docs, 7, 3)
        data = bytes(i - 4 for i in sample.prompt + sample.rest)
        assert (len(sample.prompt), sample.answer) == (7, [True] * 3)
        name = next(name for name, document in docs if data in document)
        names[name] += 1
        starts |= {docs[1][1].find(data)} if name == "b" else {docs[2][1].find(data) + 1000}
    # Windows: 1, 100 and 200.
    assert 0 < names["a"] < 40 and 1.7 < names["c"] / names["b"] < 2.3
    assert {1000, 1199} <= starts


def test_cut_is_deterministic_and_refuses_short_documents(python_docs):
    first, again = (text.cut(random.Random(3), python_docs[0], 64, 16) for _ in range(2))
    assert first == again
    with pytest.raises(ValueError, match="none of the 1 documents has 6 \\+ 5 bytes"):
        text.cut(random.Random(0), [("a", b"0123456789")], 6, 5)


GOOD = {"prompt": "p", "response": "r"}


def write(path, *records, end="\n"):
    """Write records (or raw lines) as a JSONL file; returns its path."""
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_bytes((end.join(lines) + end).encode("utf-8"))
    return path


def test_read_pairs_formats(tmp_path):
    records = [
        {"prompt": "é\u2028p", "question": "q?", "response": "r\n"},
        {"instruction": "sum", "input": "1 2", "output": "3"},
        {"instruction": "sing", "input": "", "output": "la"},
        {"instruction": "sing", "output": "la", "extra": 1},
    ]
    expected = [("é\u2028p", "q?", "r\n"), ("sum\n\n1 2", "", "3"), ("sing", "", "la")]
    expected.append(expected[-1])
    path = tmp_path / "pairs"
    plain = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    for content in (plain, "\ufeff" + plain, plain.replace("\n", "\r\n"), plain + "\n \n",
                    json.dumps(records, indent=2), "\ufeff\r\n" + json.dumps(records)):
        path.write_bytes(content.encode("utf-8"))
        assert text.read_pairs(path) == (expected, 0)
        assert text.read_pairs(str(path), skip_bad=True) == (expected, 0)


BAD_RECORDS = [
    ('{"prompt": "p", ', "Expecting"),
    ("not json", "Expecting value"),
    ('["p", "r"]', "not list"),
    ("3", "not int"),
    ("[" * 100_000, "recursion"),
    ({"prompt": "p"}, "no 'response'"),
    ({"response": "r"}, "no 'prompt'"),
    ({"instruction": "p"}, "no 'output'"),
    ({"prompt": 5, "response": "r"}, "'prompt' must be text, not int"),
    ({"prompt": "p", "response": ["r"]}, "'response' must be text, not list"),
    ({**GOOD, "question": 4}, "'question' must be text"),
    ({"instruction": "p", "input": 1, "output": "r"}, "'input' must be text"),
    ({"prompt": " \n", "response": "r"}, "'prompt' is empty"),
    ({"prompt": "p", "response": ""}, "'response' is empty"),
    ({"instruction": "p", "output": ""}, "'output' is empty"),
    ('{"prompt": "\\ud800", "response": "r"}', "surrogate"),
]


@pytest.mark.parametrize("bad, words", BAD_RECORDS, ids=range(len(BAD_RECORDS)))
def test_read_pairs_names_the_line_of_a_bad_record(tmp_path, bad, words):
    path = write(tmp_path / "pairs", GOOD, "", GOOD, bad, GOOD)
    with pytest.raises(ValueError) as error:
        text.read_pairs(path)
    message = str(error.value)
    assert "line 4: " in message and words in message and "\n" not in message
    assert "line 1" not in message
    assert text.read_pairs(path, skip_bad=True) == ([("p", "", "r")] * 3, 1)
    if isinstance(bad, dict):
        path.write_text(json.dumps([GOOD, bad]))
        with pytest.raises(ValueError, match="record 2: "):
            text.read_pairs(path)


@pytest.mark.parametrize("content, words", [
    (b"", "no usable records"),
    (b"\n \r\n", "no usable records"),
    (b"[]", "no usable records"),
    (b'{"prompt": "p", "response": "r"}\n{"prompt": "\xff"}', "line 2: not UTF-8"),
    ("[]".encode("utf-16"), "line 1: not UTF-8"),
    (b'[{"prompt": "p",\n"response" "r"}]', "line 2: JSON array"),
    (b'[{"prompt": "p", "response": "r"}', "line 1: JSON array"),
    (b"[" * 100_000, "unusable JSON array"),
])
def test_read_pairs_refuses_bad_files(tmp_path, content, words):
    path = tmp_path / "pairs"
    path.write_bytes(content)
    for skip_bad in (False, True):
        with pytest.raises(ValueError) as error:
            text.read_pairs(path, skip_bad)
        assert words in str(error.value) and "\n" not in str(error.value)


def test_read_pairs_refuses_missing_files_and_all_bad_records(tmp_path):
    for path, words in ((tmp_path / "nothing", "no such file"), (tmp_path, "cannot read")):
        with pytest.raises(ValueError, match=words):
            text.read_pairs(path)
    with pytest.raises(ValueError, match="2 skipped"):
        text.read_pairs(write(tmp_path / "pairs", "x", "y"), skip_bad=True)


def test_pair_sample():
    sample = text.pair_sample(("pé", "q?", "ab"), 3, 5)
    assert BYTES.decode(sample.prompt) == "pé"
    assert BYTES.pieces(sample.rest) == ["<sep>", "q", "?", "<sep>", "a", "b", *["<eos>"] * 3]
    assert sample.answer == [False] * 4 + [True] * 5
    plain = text.pair_sample(("p", "", "abcd"), 1, 5)
    assert BYTES.pieces(plain.rest) == ["<sep>", "a", "b", "c", "d", "<eos>"]
    assert plain.answer == [False] + [True] * 5
    with pytest.raises(ValueError, match="prompt has 3 bytes but at most 2"):
        text.pair_sample(("pé", "", "ab"), 2, 5)
    with pytest.raises(ValueError, match="response has 5 bytes but at most 4"):
        text.pair_sample(("p", "", "abcde"), 2, 5)


def test_split_pairs():
    pairs = [(str(i), "", "r") for i in range(100)]
    for count, held_out in ((2, 1), (3, 1), (4, 2), (19, 2), (20, 2), (100, 10)):
        train, test = text.split_pairs(pairs[:count], seed=0)
        assert len(test) == held_out and sorted(train + test) == sorted(pairs[:count])
    assert text.split_pairs(pairs, 0) == text.split_pairs(pairs, 0) != text.split_pairs(pairs, 1)
    assert pairs == [(str(i), "", "r") for i in range(100)]
    assert text.split_pairs(pairs[:1], 0) == (pairs[:1], pairs[:1])
    with pytest.raises(ValueError, match="no pairs"):
        text.split_pairs([], 0)


# The door to all data


TABLE = {"dictionary": "accuracy", "retrieval": "accuracy", "languages": "nats", "prose": "nats"}


@pytest.mark.parametrize("kind", TABLE)
def test_held_out_samples_hang_on_name_column_and_number(kind):
    data = ToyData(kind)
    assert data.metric == TABLE[kind]
    drawn = {}
    for name in ("test", "held out"):
        for column in list(data.columns)[:2]:
            for number in range(3):
                drawn[name, column, number] = str(data.test(column, name, number))
                assert drawn[name, column, number] == str(ToyData(kind).test(column, name, number))
    assert len(set(drawn.values())) == len(drawn)


def test_a_column_has_the_length_that_it_says():
    for kind, label, length in (("dictionary", "64 x2", 64), ("languages", "128", 128),
                                ("retrieval", "location 64", 64)):
        assert len(ToyData(kind).test(label, "test", 0).prompt) == length


def test_training_samples_grow_harder():
    """The last stage of the dictionary has prompts of 16 and of 32, the first only of 16."""
    data, rng = ToyData("dictionary"), random.Random(0)
    for progress, lengths in ((0.0, {16}), (0.99, {16, 32})):
        assert {len(data.train(rng, progress).prompt) for _ in range(50)} == lengths


@pytest.fixture(scope="module")
def python_data():
    return ToyData("python", 40, 10)


def test_held_out_text_comes_from_held_out_documents(python_data, python_docs):
    def found_in(sample, docs):
        window = bytes(i - 4 for i in sample.prompt + sample.rest)
        return any(window in data for _, data in docs)

    train, test = python_docs
    rng, split = random.Random(0), []
    for number in range(20):
        for sample, home in ((python_data.test("40", "test", number), test),
                             (python_data.train(rng, 0.5), train)):
            assert found_in(sample, home)
            split.append(found_in(sample, train if home is test else test))
    assert sum(split) < 10  # what stands in both, such as blank lines, is rare


def test_pairs_that_are_held_out_are_never_trained_on(tmp_path):
    records = [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(30)]
    path = write(tmp_path / "pairs.jsonl", *records)
    data, rng = ToyData(str(path), 10, 8), random.Random(0)
    trained = {tuple(data.train(rng, 0.5).prompt) for _ in range(600)}
    tested = [tuple(data.test("10", "test", number).prompt) for number in range(6)]
    assert len(trained) == 27 and len(set(tested[:3])) == 3 and tested[:3] == tested[3:]
    assert not trained & set(tested)
    # A question and a reply stand behind separators, as in training.
    asked = data.ask("p", "q", 2)
    assert BYTES.pieces(asked.rest)[:3] == ["<sep>", "q", "<sep>"]
    assert asked.answer == [False, False, False, True, True]
    assert data.ask("p").rest[0] == SEP and data.ask("p").answer == [False] + [True] * 8


def test_what_a_user_asks():
    """Each ? is a gap. Without one, as many gaps follow as the data is used to."""
    data = ToyData("dictionary")
    asked = data.ask("fox ruby owl jade", "owl ? fox ?")
    assert tasks.WORDS.pieces(asked.prompt) == ["fox", "ruby", "owl", "jade"]
    assert tasks.WORDS.pieces(asked.rest) == ["<sep>", "owl", "<pad>", "fox", "<pad>"]
    assert asked.answer == [False, False, True, False, True]
    for kind, gaps in (("dictionary", 1), ("languages", 16), ("prose", 16), ("retrieval", 1)):
        word = "ba" if kind == "languages" else "fox"
        assert ToyData(kind).ask(word).answer == [True] * gaps
        assert ToyData(kind).ask(word, length=5).answer == [True] * 5


def test_a_batch_by_hand():
    """The two samples in the docstring of `collate`: prompt "a b", rest "? c d"; "a" and "? c"."""
    a, b, c, d, ask = 11, 12, 13, 14, 15
    samples = [Sample([a, b], [ask, c, d], [False, True, True]),
               Sample([a], [ask, c], [False, True])]
    batch = collate(samples, ["x", "y"], closed_book=False)
    assert batch.x0.tolist() == [[a, b, ask, c, d], [a, ask, c, PAD, PAD]]
    assert batch.maskable.int().tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 0, 0]]
    assert batch.valid.int().tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.prompt.tolist() == [[a, b], [a, PAD]] and batch.seeds == ["x", "y"]
    assert batch.prompt_valid.int().tolist() == [[1, 1], [1, 0]]
    closed = collate(samples, ["x", "y"], closed_book=True)
    assert closed.x0.tolist() == [[ask, c, d], [ask, c, PAD]]
    assert closed.maskable.int().tolist() == [[0, 1, 1], [0, 1, 0]]
    assert closed.valid.int().tolist() == [[1, 1, 1], [1, 1, 0]]
    assert closed.prompt.tolist() == batch.prompt.tolist()


def test_held_out_batches_are_their_samples_with_seeds_of_their_own():
    """However a column is cut into batches, a sample and its masks are the same."""
    data = ToyData("dictionary")
    whole = data.tests("16 x2", range(4), False, "held out")
    parts = [data.tests("16 x2", numbers, False, "held out") for numbers in ([0], [1, 2], [3])]
    assert [seed for part in parts for seed in part.seeds] == whole.seeds
    assert len(set(whole.seeds)) == 4
    assert [x for part in parts for x in part.x0.tolist()] == whole.x0.tolist()
    others = data.tests("32 x1", [0], False, "held out"), data.tests("16 x2", [0], False)
    assert len({whole.seeds[0], *(other.seeds[0] for other in others)}) == 3

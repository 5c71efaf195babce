"""Synthetic tasks whose answer stands nowhere but in the prompt.

Everything is drawn anew for each sample, so a model cannot know the answer from training: it
must read the prompt or, closed-book, remember it. That makes the share of right answers a
measure of memory. All randomness comes from the `random.Random` that the caller passes.

Lengths are counted in tokens, which here are words.
"""

import random

from data import Sample
from toy.tokenizer import (
    FILLER, KEYS, NUMBERS, PEOPLE, PLACES, SEP, SPECIALS, SYMBOLS, VALUES, VARIABLES, Words,
)

WORDS = Words()


def dictionary(rng, length, rep=None, queries=4):
    """Shuffled pairs "fox ruby owl jade ...", then for some keys: what was the value?

    The length // 2 places for a pair hold length // 2 // rep distinct pairs, each stated `rep`
    times, so the prompt has the largest multiple of 2 * rep tokens that is <= length.
    rep=None takes the smallest rep for which the keys suffice, which is 1 up to length 81. If
    fewer than `queries` pairs were stated, all are asked. Values repeat freely, which keeps
    chance at exactly 1 in 40.
    """
    places = length // 2
    smallest = places // (len(KEYS) + 1) + 1
    rep = smallest if rep is None else rep
    _within("dictionary: rep", rep, 1)
    _within("dictionary: length", length, 2 * rep)
    _within("dictionary: queries", queries, 1)
    if rep < smallest:
        raise ValueError(
            f"dictionary: length {length} with rep {rep} needs {places // rep} distinct keys but "
            f"there are {len(KEYS)}: use rep {smallest} or more, or rep=None"
        )
    pairs = [(key, rng.choice(VALUES)) for key in rng.sample(KEYS, places // rep)]
    stated = pairs * rep
    rng.shuffle(stated)
    asked = rng.sample(pairs, min(queries, len(pairs)))
    rest = [SEP] + WORDS.encode(" ".join(f"{key} {value}" for key, value in asked))
    # The keys stay visible between the answers, so all queries can be answered in parallel.
    answer = [False] + [False, True] * len(asked)
    return Sample(WORDS.encode(" ".join(f"{key} {value}" for key, value in stated)), rest, answer)


def languages(rng, length, response=16):
    """A walk through a random language, to be continued for `response` symbols.

    A language is 12 of the symbols and, for each, a usual successor (probability .75) and a
    rare one (.25). So even who knows the language is right about the next symbol only .75 of
    the time; who does not has a chance of 1 in 40.
    """
    _within("languages: length", length, 1)
    _within("languages: response", response, 1)
    symbols = rng.sample(SYMBOLS, 12)
    # No symbol follows itself: a usual successor that does would trap the walk.
    successors = {s: rng.sample([t for t in symbols if t != s], 2) for s in symbols}
    walk = [rng.choice(symbols)]
    while len(walk) < length + response:
        usual, rare = successors[walk[-1]]
        walk.append(usual if rng.random() < 0.75 else rare)
    ids = WORDS.encode(" ".join(walk))
    return Sample(ids[:length], ids[length:], [True] * response)


# What follows what in `prose`: one language for all samples, so that it can be learned by heart.
_PROSE_WORDS = [word for word in WORDS.words[len(SPECIALS):] if word not in SYMBOLS]
_AFTER = dict(zip(_PROSE_WORDS, random.Random("prose").sample(_PROSE_WORDS, len(_PROSE_WORDS))))


def prose(rng, length, response=16):
    """Text to fine-tune on: a walk through one fixed language that uses the words of all tasks.

    Each word has one usual successor (.9), otherwise any word follows. The prompt says nothing
    about the language; only its last word counts. Learning the language disturbs what the model
    knew of these words.
    """
    _within("prose: length", length, 1)
    _within("prose: response", response, 1)
    walk = [rng.choice(_PROSE_WORDS)]
    while len(walk) < length + response:
        walk.append(_AFTER[walk[-1]] if rng.random() < 0.9 else rng.choice(_PROSE_WORDS))
    ids = WORDS.encode(" ".join(walk))
    return Sample(ids[:length], ids[length:], [True] * response)


def multivalue(rng, length, values=4):
    """Several needles "the fox is ruby" about one key; name all its values, in order.

    Half of the room that the needles leave, up to all the other keys, goes to needles about
    other keys. They too have up to `values` values each: if only the asked key were repeated,
    the question would not be needed. Shortest length: 4 tokens per value.
    """
    _within("multivalue: values", values, 1, len(VALUES))
    _within("multivalue: length", length, 4 * values)
    keys = rng.sample(KEYS, len(KEYS))
    facts = [(key, value) for key in keys for value in rng.sample(VALUES, values)]
    distractors = (length - 4 * values) // 2 // 4
    facts = facts[:values + distractors]
    rng.shuffle(facts)
    prompt = _scatter(rng, [f"the {key} is {value}" for key, value in facts], length)
    return _ask(prompt, f"what is the {keys[0]}", [v for key, v in facts if key == keys[0]])


def tracking(rng, length, hops=None):
    """A chain "var x = seven", "var y = x", ...; name all variables that are seven, in order.

    A chain of `hops` hops has hops + 1 variables of 4 tokens each. hops=None takes as many as
    fill half of the prompt, from 1 up to 4 (which RULER uses). Half of the remaining room, up
    to the same size, goes to a second chain with another number. Shortest length: 16, or just
    the chain if hops is given.
    """
    if hops is None:
        _within("tracking: length", length, 16)
        hops = min(4, length // 8 - 1)
    _within("tracking: hops", hops, 1, len(VARIABLES) // 2 - 1)
    size = hops + 1
    _within("tracking: length", length, 4 * size)
    names = rng.sample(VARIABLES, 2 * size)
    number, other = rng.sample(NUMBERS, 2)
    distractors = min(size, (length - 4 * size) // 2 // 4)
    chain = iter(_assignments(names[:size], number))
    second = iter(_assignments(names[size:], other))
    # Each turn takes the next assignment of its chain, so both stay in order when mixed.
    turns = [chain] * size + [second] * distractors
    rng.shuffle(turns)
    prompt = _scatter(rng, [next(turn) for turn in turns], length)
    return _ask(prompt, f"which var = {number}", names[:size])


def commonwords(rng, length, common=3):
    """A list of words; name the `common` words that appear much more often, by first appearance.

    The common words share half of the list; all the other keys and values share the rest
    evenly. That is 3 times against 1 at the shortest length, 6 * common, never less, and nears
    25 to 1 in long lists if common is 3 (RULER: 30 times against 3).
    """
    # RULER has 10; with many more of the 80 words common, the others would be frequent as well.
    _within("commonwords: common", common, 1, 10)
    _within("commonwords: length", length, 6 * common)
    pool = rng.sample(KEYS + VALUES, len(KEYS + VALUES))
    often, seldom = pool[:common], pool[common:]
    words = often * (length // (2 * common))
    words += [seldom[i % len(seldom)] for i in range(length - len(words))]
    rng.shuffle(words)
    return _ask(WORDS.encode(" ".join(words)), "common words", sorted(often, key=words.index))


def location(rng, length):
    """"anna went to the attic" for three people who move about; where is one of them now?

    One fact of 5 tokens per 8 tokens of the prompt, 12 at most. Shortest length: 16. The
    asked person is one who moved; the chance is 1 in 12.
    """
    _within("location: length", length, 16)
    people = rng.sample(PEOPLE, 3)
    moves = [(rng.choice(people), rng.choice(PLACES)) for _ in range(min(12, length // 8))]
    person = rng.choice([person for person, _ in moves])
    prompt = _scatter(rng, [f"{who} went to the {place}" for who, place in moves], length)
    # dict() keeps the last place of each person, which is where they are.
    return _ask(prompt, f"where is {person}", [dict(moves)[person]])


TASKS = {
    task.__name__: task
    for task in (dictionary, languages, prose, multivalue, tracking, commonwords, location)
}
RETRIEVAL = ("dictionary", "multivalue", "tracking", "commonwords", "location")

# Training goes from easy to hard: short and repeated first. For each task, the stages as
# (progress at which the stage ends, the settings it draws from).
_GROWING = [(0.4, [{"length": 32}]), (1.0, [{"length": 32}, {"length": 64}])]
CURRICULUM = {
    "dictionary": [
        (0.6, [{"length": 16, "rep": 2}]),
        (1.0, [{"length": length, "rep": rep} for length in (16, 32) for rep in (1, 2)]),
    ],
    "languages": [(1.0, [{"length": 32}])],
    "prose": [(1.0, [{"length": 32}])],
    "multivalue": _GROWING,
    "tracking": _GROWING,
    "commonwords": _GROWING,
    "location": _GROWING,
}


def curriculum(name, rng, progress):
    """A training sample of a task, or of 'retrieval', a mixture; progress goes from 0 to 1."""
    if name != "retrieval" and name not in CURRICULUM:
        raise ValueError(f"no task {name!r}: use one of {', '.join([*TASKS, 'retrieval'])}")
    if not 0 <= progress < 1:
        raise ValueError(f"progress is {progress}, but must be at least 0 and less than 1")
    task = rng.choice(RETRIEVAL) if name == "retrieval" else name
    settings = next(settings for end, settings in CURRICULUM[task] if progress < end)
    return TASKS[task](rng, **rng.choice(settings))


def _within(what, number, low, high=None):
    """ValueError unless low <= number, and number <= high if there is a limit."""
    if number < low:
        raise ValueError(f"{what} is {number}, but must be at least {low}")
    if high is not None and number > high:
        raise ValueError(f"{what} is {number}, but must be at most {high}")


def _scatter(rng, facts, length):
    """Ids of exactly `length` words: the facts in their order, at random places in filler."""
    room = length - sum(len(fact.split()) for fact in facts)
    filler = []
    while len(filler) < room:
        filler += rng.choice(FILLER).split()
    places = sorted(rng.randint(0, room) for _ in facts)
    words, start = [], 0
    for fact, place in zip(facts, places):
        words += filler[start:place] + fact.split()
        start = place
    return WORDS.encode(" ".join(words + filler[start:room]))


def _assignments(names, number):
    """"var x = seven", "var y = x", ...: each variable is given the one before it."""
    return [f"var {name} = {source}" for name, source in zip(names, [number, *names])]


def _ask(prompt, question, answers):
    """The sample that shows `question` after a separator and expects the words `answers`."""
    visible = [SEP] + WORDS.encode(question)
    rest = visible + WORDS.encode(" ".join(answers))
    return Sample(prompt, rest, [i >= len(visible) for i in range(len(rest))])

"""Two tokenizers with nothing to download: fixed words for synthetic tasks, bytes for real text.

Both give the same four ids to the special tokens, so a model or a decoder never has to ask
which tokenizer it works with.
"""

from data import PAD, clean_text

MASK, EOS, SEP = PAD + 1, PAD + 2, PAD + 3
SPECIALS = ("<pad>", "<mask>", "<eos>", "<sep>")

# No word may stand in two of the groups below: the tasks (and their tests) tell a key from a
# value by the word alone.
KEYS = tuple(
    "ant bat bear bee cat cow crab crow deer dog dove duck eel elk emu fox frog goat hare hawk "
    "hen ibex lamb lion lynx mole moth mule newt owl pig puma ram seal swan toad wasp wolf wren "
    "yak".split()
)
VALUES = tuple(
    "amber apple basil beige blue cherry clove cocoa coral fig garnet ginger gold grape honey "
    "ivory jade kiwi lemon mango melon mint olive onyx opal papaya peach pearl pink plum quartz "
    "red ruby saffron scarlet silver teal topaz vanilla violet".split()
)
# Syllables mean nothing, so nothing but the prompt can say which one follows which.
SYMBOLS = tuple(consonant + vowel for consonant in "bdfgklmz" for vowel in "aeiou")
VARIABLES = tuple("abcdefghijklmnopqrstuvwxyz")
NUMBERS = tuple(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen".split()
)
PEOPLE = tuple("anna ben carl dora emil frida gus hana ivan june kurt lena".split())
PLACES = tuple(
    "attic bakery cellar garden harbor kitchen library market office park school station".split()
)
FUNCTION_WORDS = tuple("the is what where which went to var = common words".split())
# Filler shares no word with any fact, so a fact stays readable even where it is dropped into
# the middle of a filler sentence.
FILLER = (
    "rain falls on quiet hills",
    "small boats drift slowly home",
    "old clocks tick all night",
    "warm bread cools near windows",
    "children count passing trains",
    "leaves turn when autumn comes",
)
FILLER_WORDS = tuple(dict.fromkeys(" ".join(FILLER).split()))


class Words:
    """One token per word of a small fixed vocabulary (`words`, specials first)."""

    mask_id, eos_id = MASK, EOS
    stop_ids = (EOS,)  # what ends a reply

    def __init__(self):
        self.words = (
            SPECIALS + KEYS + VALUES + SYMBOLS + VARIABLES + NUMBERS
            + PEOPLE + PLACES + FUNCTION_WORDS + FILLER_WORDS
        )
        self.vocab_size = len(self.words)
        # The specials are left out on purpose: text typed by a user must not be able to
        # produce a mask or an end of text, so a literal "<mask>" is just an unknown word.
        self._ids = {word: i for i, word in enumerate(self.words) if i >= len(SPECIALS)}

    def encode(self, text):
        """Ids of the words of `text`, split at white space; ValueError names an unknown word."""
        for word in text.split():
            if word not in self._ids:
                some = ", ".join(list(self._ids)[:6])
                raise ValueError(
                    f"unknown word {word!r}: use one of the {len(self._ids)} known words, such as "
                    f"{some} (all of them: python -c \"from toy import tokenizer; "
                    f"print(*tokenizer.Words().words[{len(SPECIALS)}:])\")"
                )
        return [self._ids[word] for word in text.split()]

    def decode(self, ids):
        """The content words joined by spaces; special tokens are skipped."""
        return " ".join(self.words[i] for i in ids if i >= len(SPECIALS))

    def pieces(self, ids):
        """One display string per token, special tokens by name."""
        return [self.words[i] for i in ids]


class Bytes:
    """One token per UTF-8 byte of any text.

    Byte b is id 4 + b. So no text, not even a literal "<mask>", can produce a special id.
    """

    mask_id, eos_id = MASK, EOS
    stop_ids = (EOS,)  # what ends a reply
    vocab_size = len(SPECIALS) + 256

    def encode(self, text):
        """Ids of the UTF-8 bytes of `text`; ValueError if it is not valid Unicode."""
        return self.encode_bytes(clean_text(text).encode("utf-8"))

    def shield(self, text):
        """The text itself: no text of bytes can hold a special token."""
        return text

    def encode_bytes(self, data):
        """Ids of raw bytes; a window cut from a file may start inside a character."""
        return [len(SPECIALS) + byte for byte in data]

    def decode(self, ids):
        """Text of the byte tokens, special tokens skipped, broken characters shown as U+FFFD."""
        data = bytes(i - len(SPECIALS) for i in ids if i >= len(SPECIALS))
        return data.decode("utf-8", errors="replace")

    def pieces(self, ids):
        """One display string per token.

        A character of several bytes is shown whole at its first byte and as '·' at the others,
        a line end as '⏎'. Bytes that form no printable character, such as those of a character
        that is still partly masked, are shown as \\xNN.
        """
        shown = []
        while len(shown) < len(ids):
            shown += self._next_pieces(ids[len(shown):len(shown) + 4])
        return shown

    def _next_pieces(self, ids):
        """Pieces of the one special token or character that starts at ids[0]."""
        if ids[0] < len(SPECIALS):
            return [SPECIALS[ids[0]]]
        for size in range(1, len(ids) + 1):
            if ids[size - 1] < len(SPECIALS):
                break
            try:
                character = bytes(i - len(SPECIALS) for i in ids[:size]).decode("utf-8")
            except UnicodeDecodeError:
                continue
            if character == "\n":
                return ["⏎"]
            if not character.isprintable():
                break
            return [character] + ["·"] * (size - 1)
        return [f"\\x{ids[0] - len(SPECIALS):02x}"]

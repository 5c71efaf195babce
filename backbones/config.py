"""config.json -> Config: what the blocks need to know, whatever the file calls it.

Fields are required, not defaulted: the published classes' defaults (no rotation, biases, dropout
of 0.1) are not what the checkpoints hold. Which fields a family reads stands in its row in
families.py.

A field of the file is taken if the family reads it, if its value is what the blocks compute, or if
it changes nothing. Any other field is named and refused: it may ask for other mathematics. A field
that is null says nothing.
"""
from __future__ import annotations

import re
from dataclasses import dataclass, field
from reprlib import Repr

from files import MOST_TENSORS

MOST_WIDE = 1 << 24  # numbers in a row or a column of a matrix

# Fields that change nothing of what is computed here: names and versions, ids of tokens, how
# weights begin, dropout of a training that is not ours, and what the library's own generation asks.
HARMLESS = frozenset("""
    model_type architectures auto_map transformers_version tokenizer_class prefix
    name_or_path _name_or_path _commit_hash _attn_implementation _attn_implementation_autoset
    _experts_implementation _moe_implementation attn_implementation unsloth_fixed unsloth_version
    initializer_range use_cache return_dict use_return_dict torchscript use_bfloat16
    tf_legacy_loss gradient_checkpointing chunk_size_feed_forward output_attentions
    output_hidden_states output_scores output_router_logits router_aux_loss_coef
    attention_dropout embedding_dropout output_dropout residual_dropout hidden_dropout
    bos_token_id eos_token_id pad_token_id mask_token_id sep_token_id decoder_start_token_id
    finetuning_task task_specific_params problem_type num_labels id2label label2id
    max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups
    temperature top_k top_p typical_p repetition_penalty length_penalty diversity_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    """.split())
# What the library may say of any model, and the values that are computed here.
PRECISIONS = (None, "float32", "float16", "bfloat16", "float64")
NEUTRAL = dict(
    dtype=PRECISIONS, torch_dtype=PRECISIONS,
    is_encoder_decoder=(None, False), is_decoder=(None, False), is_causal=(None, False),
    add_cross_attention=(None, False), tie_encoder_decoder=(None, False), pruned_heads=(None, {}))
# Where a file says that its weights are quantised.
QUANTISED = ("quantization_config", "quantization", "compression_config")

# What Llama 3's scaling of the rotation asks; see blocks.scale_frequencies.
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

# How a token may look at the others; see --attention.
ATTENTION = re.compile(r"full|block|causal-prompt|causal(:[1-9][0-9]{0,3})?")

_short = Repr()
_short.maxstring = _short.maxother = _short.maxlong = 100


def show(value):
    """A value from a stranger's file, short and on one line."""
    return _short.repr(value)


@dataclass(frozen=True)
class Config:
    """The sizes of a model."""
    family: str            # key of families.FAMILIES
    vocab_size: int
    width: int             # D
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int        # channels of a head that are rotated
    rope_theta: float
    eps: float             # of the norms
    ffn: int               # inner width of a dense feed-forward, 0 where there is none
    dense_layers: int      # this many layers, the first ones, are dense
    experts: int = 0
    top_k: int = 0
    expert_ffn: int = 0
    shared: int = 0        # inner width of the shared expert
    groups: int = 1        # groups of experts; a token chooses among the best `top_groups`
    top_groups: int = 1
    routed_scale: float = 1.0
    tied: bool = False     # the head is the embedding
    rope_scaling: tuple = ()  # numbers of Llama 3's scaling, as LLAMA3 names them
    shift: bool = False    # the logits of a token come from the hidden state before it
    block_length: int = 0  # of a block, which sees itself and those before; 0: the family's
    attention: str = ""    # how tokens look at each other, where config.json says so
    left_to_right: bool = False  # trained to say what comes next: there is no mask yet
    max_length: int = 0    # positions the model was made for
    stored: str | None = field(default=None, compare=False)  # precision of the files' numbers
    mask_id: int | None = None
    eos_ids: tuple = ()    # all tokens that end a text

    @property
    def eos_id(self):
        """The end that is written after a text."""
        return self.eos_ids[0] if self.eos_ids else None

    def check(self, name):
        """ValueError, with `name` for the file, if the sizes do not fit together."""
        self.check_size(name)
        odd_rotation = self.rotary_dim % 2 or not 2 <= self.rotary_dim <= self.head_dim
        if self.heads % self.kv_heads or odd_rotation or self.top_k > self.experts:
            raise ValueError(
                f"{name}: heads {self.heads}, key-value heads {self.kv_heads}, rotated channels "
                f"{self.rotary_dim}, top-k {self.top_k} do not fit together")
        open_experts = self.experts // self.groups * self.top_groups
        if (self.experts % self.groups or self.top_groups > self.groups
                or self.top_k > open_experts):
            raise ValueError(
                f"{name}: {self.experts} experts in {self.groups} groups, {self.top_groups} of "
                f"them chosen, do not leave {self.top_k} experts for a token")
        if self.dense_layers > self.layers:
            raise ValueError(f"{name}: {self.dense_layers} dense layers are more than all "
                             f"{self.layers} layers")

    def check_size(self, name):
        """ValueError if the model is too large to be one: each size may be in its range, and
        their product not."""
        tensors = self.layers * (3 * self.experts + 12)
        if tensors > MOST_TENSORS:
            raise ValueError(f"{name}: {self.layers:,} layers with {self.experts:,} experts are "
                             f"about {tensors:,} tensors; at most {MOST_TENSORS:,} are read")
        widest = max(self.heads * self.head_dim, self.ffn, self.shared, self.vocab_size)
        if widest > MOST_WIDE:
            raise ValueError(f"{name}: a matrix of {widest:,} rows; at most {MOST_WIDE:,} are read")


class Fields:
    """The fields of a config.json, checked when they are asked for. Errors are one-line
    ValueErrors that name the file."""

    def __init__(self, raw, name):
        if not isinstance(raw, dict):
            raise ValueError(f"{name} is not a model's configuration")
        self.raw, self.name, self.known = dict(raw), name, set(HARMLESS)

    def read_common(self, may_scale=False):
        """The fields that any model of the library may have.

        may_scale: the rotation may be Llama 3's. Returns its numbers, () if it is the usual one.
        """
        self.refuse_quantised()
        said = [self.read_rotation(place, may_scale) for place in ("rope_parameters",
                                                                  "rope_scaling")]
        said = [scaling for scaling in said if scaling is not None]
        if any(scaling != said[0] for scaling in said):
            raise ValueError(f"{self.name}: rope_parameters and rope_scaling do not agree; which "
                             "of them is right?")
        self.only(**NEUTRAL)
        return said[0] if said else ()

    def get(self, key):
        """The value of a field, which is known from now on."""
        self.known.add(key)
        return self.raw.get(key)

    def number(self, key, *others, low=1, high=1 << 20, kind=int):
        """The number under `key`, or under the first of `others` that is given."""
        given = [name for name in (key, *others) if self.get(name) is not None]
        key = given[0] if given else key
        value = self.raw.get(key)
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not low <= value <= high or kind(value) != value:
            raise ValueError(
                f"{self.name}: {key} is {show(value)}; it must be a number from {low} to {high}")
        return kind(value)

    def read_conversion(self):
        """What export.py writes of a model that was trained left to right first."""
        attention = self.get("attention")
        if attention is not None and not ATTENTION.fullmatch(str(attention)):
            self.refuse("attention", attention)
        self.only(shift=(None, False, True))
        return dict(attention=attention or "", shift=bool(self.get("shift")))

    def ignore(self, *keys):
        """These fields change nothing of what this family's blocks compute."""
        self.known.update(keys)

    def share(self, width, heads):
        """The width of a head, where no field says it."""
        if width % heads:
            raise ValueError(f"{self.name}: {heads} heads do not share a width of {width}")
        return width // heads

    def only(self, **allowed):
        """Refuse a field that asks for mathematics that the blocks do not compute."""
        for key, values in allowed.items():
            if self.get(key) not in values:
                self.refuse(key, self.raw.get(key))

    def refuse(self, key, value):
        raise ValueError(f"{self.name}: {key} is {show(value)}, a variant that this code does not "
                         "compute")

    def read_rotation(self, place, may_scale):
        """Take rope_theta and the like out of rope_parameters or rope_scaling.

        The library has called the same thing by both names, and rope_theta may stand beside it.
        Returns the numbers of Llama 3's scaling, () for none, None if nothing is said of it.
        """
        inner = self.get(place)
        if inner is None:
            return None
        if not isinstance(inner, dict):
            self.refuse(place, inner)
        kinds = [inner[key] for key in ("rope_type", "type") if inner.get(key) is not None]
        is_scaled = may_scale and kinds != [] and all(kind == "llama3" for kind in kinds)
        for key, value in inner.items():
            if key in ("rope_theta", "partial_rotary_factor"):
                before = self.raw.get(key)
                if before is not None and value is not None and before != value:
                    raise ValueError(f"{self.name}: {key} is {show(before)}, but {show(value)} in "
                                     f"{place}; which of them is right?")
                self.raw[key] = value if before is None else before
            elif is_scaled and key in ("rope_type", "type", *LLAMA3):
                continue
            elif value is not None and (key, value) not in (("rope_type", "default"),
                                                            ("type", "default")):
                self.refuse(f"{place}: {show(key)}", value)
        if is_scaled:
            return read_scaling(inner, f"{self.name}: {place}")
        return () if kinds else None

    def refuse_quantised(self):
        for key in QUANTISED:
            value = self.raw.get(key)
            if value is not None:
                raise ValueError(f"{self.name}: {key} is {show(value)}, but quantised weights are "
                                 "not read; take the model's own files, which --load-4bit "
                                 "quantises")

    def refuse_unknown(self):
        """ValueError if a field is left that nobody has asked for."""
        for key, value in self.raw.items():
            if key not in self.known and value is not None:
                raise ValueError(f"{self.name}: {show(key)} is {show(value)}. This code does not "
                                 "know the field, which may ask for other mathematics; remove it "
                                 "if it changes nothing")

    def special_ids(self, vocab_size):
        """The ids of mask and ends, as far as the file names them."""
        mask = self.get("mask_token_id")
        if mask is not None:
            check_id(mask, vocab_size, "mask", "mask_token_id", self.name)
        return dict(mask_id=mask, eos_ids=read_ends(self.raw, vocab_size, self.name))


def read_scaling(inner, name):
    """The numbers of Llama 3's scaling in the order of LLAMA3. ValueError if one does not do."""
    number = Fields(inner, name).number
    factor = number("factor", kind=float)
    low, high = (number(key, low=1e-6, kind=float) for key in LLAMA3[1:3])
    if low >= high:
        raise ValueError(f"{name}: low_freq_factor is {low}, but it must be below "
                         f"high_freq_factor, {high}")
    return factor, low, high, number(LLAMA3[3], high=1 << 30)


def read_ends(raw, vocab_size, name, before=()):
    """The ids of all ends: those `before`, then those that a config.json or
    generation_config.json names, as one id, a list or none.

    The token that pads is no end unless it is named as one.
    """
    ends = raw.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    for i in ends:
        check_id(i, vocab_size, "end", "eos_token_id", name)
    return tuple(dict.fromkeys([*before, *ends]))


def check_id(i, vocab_size, what, key, name):
    """ValueError unless i is the id of a token. key: where it stands in the file `name`."""
    if type(i) is not int or not 0 <= i < vocab_size:
        raise ValueError(f"{name}: the {what} token's id is {show(i)}, outside the vocabulary of "
                         f"{vocab_size}; correct {key}")

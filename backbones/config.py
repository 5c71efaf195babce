"""config.json -> Config: what the blocks need to know, whatever the file calls it.

Fields are required, not defaulted: the published classes' defaults (no rotation, biases, dropout
of 0.1) are not what the checkpoints hold. Which fields a family reads stands in its row in
families.py.
"""
from __future__ import annotations

from dataclasses import dataclass


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
    max_length: int = 0    # positions the model was made for
    mask_id: int | None = None
    eos_id: int | None = None
    eos_ids: tuple = ()    # every token that config.json calls an end

    def check(self, name):
        """ValueError, with `name` for the file, if the sizes do not fit together."""
        if self.heads % self.kv_heads or self.rotary_dim % 2 or self.top_k > self.experts:
            raise ValueError(
                f"{name}: heads {self.heads}, key-value heads {self.kv_heads}, rotated channels "
                f"{self.rotary_dim}, top-k {self.top_k} do not fit together")
        open_experts = self.experts // self.groups * self.top_groups
        if (self.experts % self.groups or self.top_groups > self.groups
                or self.top_k > open_experts):
            raise ValueError(
                f"{name}: {self.experts} experts in {self.groups} groups, {self.top_groups} of "
                f"them chosen, do not leave {self.top_k} experts for a token")


class Fields:
    """The fields of a config.json, checked when they are asked for. Errors are one-line
    ValueErrors that name the file."""

    def __init__(self, raw, name):
        if not isinstance(raw, dict):
            raise ValueError(f"{name} is not a model's configuration")
        # transformers 5 puts rope_theta and the like into rope_parameters.
        self.raw, self.name = {**(raw.get("rope_parameters") or {}), **raw}, name

    def number(self, key, *others, low=1, high=1 << 20, kind=int):
        """The number under `key`, or under the first of `others` that is given."""
        for name in (key, *others):
            if self.raw.get(name) is not None:
                key = name
                break
        value = self.raw.get(key)
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not low <= value <= high or kind(value) != value:
            raise ValueError(
                f"{self.name}: {key} is {value!r}; it must be a number from {low} to {high}")
        return kind(value)

    def only(self, **allowed):
        """Refuse a field that asks for mathematics that the blocks do not compute."""
        for key, values in allowed.items():
            if self.raw.get(key) not in values:
                raise ValueError(f"{self.name}: {key} is {self.raw.get(key)!r}, a variant that "
                                 "this code does not compute")

    def special_ids(self):
        """The ids of mask and ends as the file has them; None and () where it names none."""
        ends = end_ids(self.raw, self.name)
        return dict(mask_id=self.raw.get("mask_token_id"), eos_id=ends[0] if ends else None,
                    eos_ids=ends)


def end_ids(raw, name):
    """The ids that a config.json or generation_config.json calls ends: one, a list, or none."""
    if not isinstance(raw, dict):
        raise ValueError(f"{name} is not a model's configuration")
    ends = raw.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends] * (ends is not None)
    if not all(type(i) is int for i in ends):
        raise ValueError(f"{name}: eos_token_id is {raw['eos_token_id']!r}; it must be an id in "
                         "the vocabulary, or a list of ids")
    return tuple(ends)

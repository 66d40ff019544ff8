"""What a student shall look like: which layers and how many units of each axis; what its configuration says then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from limbeck.compression.anatomy import Anatomy
from limbeck.compression.layers import count_of
from limbeck.compression.skeletons import bare, configure
from limbeck.compression.vocabulary import Vocabulary, renamed_tokens
from limbeck.core.errors import ConfigError
from limbeck.models.describe import parameters

Count = int | float | None


@dataclass(frozen=True)
class Plan:
    """What a student shall look like.

    Args:
        layers: Which of the teacher's layers stay, by stack.
        sizes: Units that stay, of the axes that are cut.
        words: The tokens that stay; ``None``: all.
        tie: Whether output and input embeddings are one; ``None``: as the teacher's.
    """

    layers: Mapping[str, tuple[int, ...]]
    sizes: Mapping[str, int] = field(default_factory=dict)
    words: Vocabulary | None = None
    tie: bool | None = None

    def with_sizes(self, **sizes: int) -> Plan:
        """A copy with other sizes."""
        return replace(self, sizes={**self.sizes, **sizes})

    def config(self, anatomy: Anatomy) -> Any:
        """The student's configuration.

        Raises:
            ModelError: The family refuses these numbers.
            ConfigError: A token that the configuration names is dropped.
        """
        changes = anatomy.changes(self.sizes)
        for stack in anatomy.stacks:
            stay = self.layers[stack.field]
            changes[stack.field] = len(stay)
            changes |= {name: [listed[i] for i in stay] for name, listed in anatomy.layer_lists(stack.depth).items()}
        if self.words is not None:
            changes[str(anatomy.field("vocabulary"))] = len(self.words)
            changes |= renamed_tokens(anatomy.config, self.words)
        if self.tie is not None:
            changes["tie_word_embeddings"] = self.tie
        return configure(anatomy.config, changes)

    def parameters(self, anatomy: Anatomy) -> int:
        """How many parameters such a student has."""
        return parameters(bare(anatomy.teacher, self.config(anatomy)))


def asked_sizes(anatomy: Anatomy, heads: Count, kv_heads: Count, hidden: Count, ffn: Count) -> dict[str, int]:
    """How many units of each axis stay, of those that are cut. Numbers are taken as they are, shares are rounded.

    Where heads are together as wide as the model, ``hidden`` says how many heads stay.

    Raises:
        ConfigError: Numbers that do not fit each other, or the teacher.
        ModelError: This family's weights cannot be cut so.
    """
    found: dict[str, int] = {}
    if ffn is not None:
        found["ffn"] = count_of(ffn, anatomy.size("ffn"), "ffn")
    if hidden is not None:
        found["hidden"] = count_of(hidden, anatomy.size("hidden"), "hidden")
    if heads is not None or kv_heads is not None or hidden is not None:
        found |= (
            _asked_coupled(anatomy, heads, kv_heads, hidden)
            if anatomy.coupled
            else _asked_heads(anatomy, heads, kv_heads)
        )
    found = {axis: units for axis, units in found.items() if units != anatomy.size(axis)}
    if {"heads", "kv_heads"} & found.keys() and anatomy.field("kv_heads") is not None:
        found = {"heads": anatomy.size("heads"), "kv_heads": anatomy.size("kv_heads"), **found}  # they are cut together
    anatomy.layouts(list(found))
    return found


def _asked_coupled(anatomy: Anatomy, heads: Count, kv_heads: Count, hidden: Count) -> dict[str, int]:
    """Heads and hidden units of a family in which heads are together as wide as the model."""
    width, whole = anatomy.head_dim, anatomy.size("hidden")
    if kv_heads is not None and anatomy.field("kv_heads") is None:
        raise ConfigError(f"{anatomy.kind!r} has no heads for keys and values alone", where="kv_heads", found=kv_heads)
    if hidden is None:
        number = None if heads is None else count_of(heads, anatomy.size("heads"), "heads")
        if number in (None, anatomy.size("heads")):
            return {}
        raise ConfigError(
            f"heads of {anatomy.kind!r} are together as wide as the model: their number cannot change alone",
            where="heads",
            found=heads,
            remedy=f"give hidden={number * width if number else whole} too, or cut ffn",
        )
    units = count_of(hidden, whole, "hidden")
    if isinstance(hidden, float):
        units = max(width, round(units / width) * width)
    number = units // width
    asked = number if heads is None else count_of(heads, anatomy.size("heads"), "heads")
    if units % width or asked != number:
        raise ConfigError(
            f"heads of {anatomy.kind!r} are together as wide as the model, {width} each",
            where="hidden",
            found=f"hidden={units}, heads={asked}",
            wanted=f"a multiple of {width}, and as many heads",
        )
    return {"hidden": units, "heads": number}


def _asked_heads(anatomy: Anatomy, heads: Count, kv_heads: Count) -> dict[str, int]:
    """Heads, and heads of keys and values, of a family in which their number is free."""
    all_heads = anatomy.size("heads")
    number = None if heads is None else count_of(heads, all_heads, "heads")
    if anatomy.field("kv_heads") is None:
        if kv_heads is not None:
            raise ConfigError(f"{anatomy.kind!r} has no heads for keys and values alone", where="kv_heads")
        return {} if number is None else {"heads": number}
    groups = anatomy.size("kv_heads")
    kv = None if kv_heads is None else count_of(kv_heads, groups, "kv_heads")
    if number is None and kv is None:
        return {}
    each = all_heads // groups
    if number is None:
        number = kv * each if kv is not None else all_heads
    if kv is None:
        kv = number if each == 1 else groups
    if number % kv or number // kv > each:
        raise ConfigError(
            "heads must share the heads of keys and values evenly, and no group can grow",
            where="heads",
            found=f"heads={number}, kv_heads={kv}",
            wanted=f"heads a multiple of kv_heads, at most {each} times as many",
            remedy="give both heads and kv_heads",
        )
    return {"heads": number, "kv_heads": kv}

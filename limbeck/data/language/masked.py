"""Texts with gaps, for masked language models: a model tells the tokens that were hidden from it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError
from limbeck.core.hashing import below, draw_bits, key, key_tensor, uniform
from limbeck.data.language.rows import Rows
from limbeck.data.language.source import language_source
from limbeck.data.language.split import LanguageSplit
from limbeck.data.language.tokens import Tokens
from limbeck.data.sources.source import SPLITS, DataSource

_MASKS = ("[MASK]", "<mask>", "<|mask|>")
_DRAW, _LONGEST = 16, 1 << 20  # keeps these draws apart from others; tokens of a row


@dataclass(frozen=True)
class Masking:
    """How tokens are hidden; BERT's ways.

    Args:
        mask: The id that stands for a hidden token.
        size: How many ids there are.
        special: Ids that are never hidden.
        share: Of a text's tokens, hidden.
        random: Of the hidden, those that another token stands for.
        kept: Of the hidden, those that stand as they are.
    """

    mask: int
    size: int
    special: tuple[int, ...] = ()
    share: float = 0.15
    random: float = 0.1
    kept: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or min(self.random, self.kept) < 0 or self.random + self.kept > 1:
            found = f"share {self.share}, random {self.random}, kept {self.kept}"
            raise ConfigError("these are no shares", where="data.options", found=found, wanted="from 0 to 1")

    def candidates(self, ids: Tensor, there: Tensor) -> Tensor:
        """Tokens ``[B, L]`` that may be hidden: those that are there and stand for text."""
        special = torch.tensor(self.special, device=ids.device, dtype=ids.dtype)
        return there & ~torch.isin(ids, special)

    def hide(self, ids: Tensor, candidates: Tensor, dice: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Ids with gaps, and which tokens were chosen.

        Args:
            ids: ``[B, L]``.
            candidates: The same, booleans.
            dice: ``[B, L, 2]`` numbers from 0 to 1: whether, and in what way.
            words: ``[B, L]`` random ids.

        >>> masking = Masking(mask=9, size=10, share=0.5)
        >>> dice = torch.tensor([[[0.1, 0.5], [0.9, 0.5], [0.2, 0.95], [0.3, 0.05]]])
        >>> ids, chosen = masking.hide(torch.arange(4)[None], torch.ones(1, 4) > 0, dice, torch.full((1, 4), 7))
        >>> ids.tolist(), chosen.tolist()
        ([[9, 1, 2, 7]], [[True, False, True, True]])
        """
        chosen = candidates & (dice[..., 0] < self.share)
        way = dice[..., 1]
        said = torch.where(way < self.random, words.to(ids.dtype), torch.full_like(ids, self.mask))
        return torch.where(chosen & (way < 1 - self.kept), said, ids), chosen


@dataclass
class MaskedRows(Rows):
    """Rows with gaps, which are the same whenever a row is read.

    Batches have ``labels [B, L]``, the hidden tokens and -1 elsewhere, and ``mask``, where these are. ``extras`` hold
    what a scheme hides anew: ``whole`` ids, the ``candidates`` and what is ``attended``; and of a teacher's own tokens
    ``teacher_whole``. Its tokens have gaps where the characters under them have.

    Args:
        masking: How.
        teacher_masking: The same of the teacher's tokens, where these are others.
    """

    masking: Masking = field(kw_only=True)
    teacher_masking: Masking | None = field(default=None, kw_only=True)

    def of(self, rows: Tensor) -> MaskedRows:
        return masked_rows(super().of(rows), self.masking, self.teacher_masking)

    def batch(self, index: Tensor) -> Batch:
        batch = super().batch(index)
        ids = batch.inputs["input_ids"]
        place = index.unsqueeze(1) * _LONGEST + torch.arange(ids.shape[1])
        bits = draw_bits(key_tensor([key(_DRAW, n) for n in range(3)]), place)
        there = batch.inputs["attention_mask"] > 0
        extras = {**batch.extras, "whole": ids, "attended": there, "candidates": self.masking.candidates(ids, there)}
        if batch.teacher_inputs is not None:
            extras["teacher_whole"] = batch.teacher_inputs["input_ids"]
        batch = batch.replace(extras=extras)
        return self.hidden(batch, uniform(bits[..., :2]), below(bits[..., 2], self.masking.size))

    def hidden(self, batch: Batch, dice: Tensor, words: Tensor) -> Batch:
        """A batch of these rows with other gaps; see :meth:`Masking.hide`."""
        whole, extras = batch.extras["whole"], batch.extras
        ids, chosen = self.masking.hide(whole, extras["candidates"], dice, words)
        beside = {}
        if batch.teacher_inputs is not None and self.teacher_masking is not None:
            gaps = covered(extras["offsets"], ids != whole, extras["teacher_offsets"])
            said = extras["teacher_whole"].masked_fill(gaps, self.teacher_masking.mask)
            beside["teacher_inputs"] = {**batch.teacher_inputs, "input_ids": said}
        labels = whole.masked_fill(~chosen, -1)
        return batch.replace(inputs={**batch.inputs, "input_ids": ids}, labels=labels, mask=chosen, **beside)


def masked_rows(rows: Rows, masking: Masking, teacher_masking: Masking | None = None) -> MaskedRows:
    """Rows with gaps of rows without."""
    known = (rows.student, rows.first, rows.layout, rows.teacher, rows.tag)
    return MaskedRows(*known, masking=masking, teacher_masking=teacher_masking)


def covered(spans: Tensor, which: Tensor, other: Tensor) -> Tensor:
    """Tokens of another tokenizer that cover a character of chosen ones, ``[B, M]``.

    Args:
        spans: ``[B, L, 2]``, the characters of each token.
        which: ``[B, L]``, the chosen.
        other: ``[B, M, 2]``.

    >>> spans = torch.tensor([[[0, 2], [2, 5]]])
    >>> covered(spans, torch.tensor([[False, True]]), torch.tensor([[[0, 1], [1, 3], [3, 5], [5, 9]]]))
    tensor([[False,  True,  True, False]])
    """
    length = int(max(spans.max(), other.max())) + 1 if spans.numel() and other.numel() else 1
    edges = torch.zeros(len(spans), length + 1, dtype=torch.long, device=spans.device)
    size = which.long()
    edges.scatter_add_(1, spans[..., 0], size).scatter_add_(1, spans[..., 1], -size)
    chars = (edges.cumsum(dim=1) > 0).long().cumsum(dim=1)  # chosen characters up to each one
    chars = torch.nn.functional.pad(chars, (1, 0))
    return chars.gather(1, other[..., 1]) - chars.gather(1, other[..., 0]) > 0


def masked_source(
    source: Any,
    *,
    tokenizer: Any,
    mask: int | str | None = None,
    teacher_mask: int | str | None = None,
    share: float = 0.15,
    random: float = 0.1,
    kept: float = 0.1,
    **options: Any,
) -> DataSource:
    """Texts with gaps: as :func:`~limbeck.data.language.language_source`, for masked language models.

    In a recipe: ``source: limbeck.data.language.masked:masked_source, options: {source: texts.txt, tokenizer: ...}``.

    Args:
        source: Texts.
        tokenizer: Of the models.
        mask: The token or id that stands for what is hidden; default the tokenizer's.
        teacher_mask: The same of ``teacher_tokenizer``.
        share, random, kept: See :class:`Masking`.
        options: Of ``language_source``; rows are no packs.

    Raises:
        ConfigError: A tokenizer has no token for what is hidden; packs.

    >>> found = masked_source(["To be, or not to be"] * 20, tokenizer="bytes", mask=1, length=16)
    >>> batch = found.train.rows.batch(torch.arange(2))
    >>> bool((batch.extras["whole"][batch.mask] == batch.labels[batch.mask]).all())
    True
    """
    if options.get("pack"):
        raise ConfigError("gaps are made in one text a row", where="data.options.pack", found=True, wanted=False)
    found = language_source(source, tokenizer=tokenizer, **options)
    parts: dict[str, Any] = {}
    for name in SPLITS:
        split = getattr(found, name)
        if not isinstance(split, LanguageSplit):
            continue
        own = masking_of(split.tokens, mask, "mask", share=share, random=random, kept=kept)
        other = split.teacher_tokens
        second = None if other is None else masking_of(other, teacher_mask, "teacher_mask")
        settings = {**split.settings, "masked": {"share": share, "random": random, "kept": kept, "mask": own.mask}}
        parts[name] = replace(split, rows=masked_rows(split.rows, own, second), settings=settings)
    return replace(found, **parts)


def masking_of(tokens: Tokens, mask: int | str | None = None, where: str = "mask", **shares: float) -> Masking:
    """How tokens of a tokenizer are hidden.

    Raises:
        ConfigError: It has no such token.
    """
    table = tokens.table()
    known = mask if isinstance(mask, int) else table.get(mask or next((m for m in _MASKS if m in table), ""))
    if known is None or not 0 <= known < tokens.size:
        raise ConfigError(
            "the tokenizer has no token for what is hidden",
            where=f"data.options.{where}",
            found=f"{mask!r} of {tokens.name}",
            wanted=f"a token, or an id below {tokens.size}",
        )
    marks = {known, tokens.pad, tokens.bos, tokens.eos, *tokens.front, *tokens.back}
    return Masking(known, tokens.size, tuple(sorted(m for m in marks if m is not None)), **shares)

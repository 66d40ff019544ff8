"""Texts for a student that reads with an encoder and writes with a decoder, and a teacher that only decodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, DataError
from limbeck.data.language.rows import Rows
from limbeck.data.language.source import language_source
from limbeck.data.language.split import LanguageSplit
from limbeck.data.language.written import prompts_of
from limbeck.data.sources.source import SPLITS, DataSource


def seq2seq_source(
    texts: Any,
    *,
    tokenizer: Any,
    start: int | None = None,
    source_length: int = 1024,
    target_length: int = 256,
    prompt: int = 1,
    **options: Any,
) -> DataSource:
    """Prompts for an encoder, what follows them for a decoder.

    Batches are those of :func:`side_by_side`. Recipes name it ``limbeck.data.language.pairs:seq2seq_source``.

    Args:
        texts: As ``source`` of :func:`~limbeck.data.language.language_source`.
        tokenizer: Of both models; see :func:`~limbeck.data.language.load_tokens`.
        start: The token with which a decoder begins, the model's ``decoder_start_token_id``; default the one that
            begins a text, or else fills it up.
        source_length: Tokens of a prompt at most; the rest is cut off. 1024 is Mu's.
        target_length: Tokens of what follows at most; 256 is Mu's.
        prompt: Tokens of a prompt at least; of whole texts, where everything is learned, the first so many.
        options: More of :func:`~limbeck.data.language.language_source`.

    Raises:
        ConfigError: Packs, another tokenizer for the teacher, or no length.

    >>> source = seq2seq_source([{"prompt": "2+2=", "completion": "4"}] * 20, tokenizer="bytes")
    >>> batch = source.train.rows.batch(torch.tensor([0]))
    >>> batch.inputs["decoder_input_ids"].tolist(), batch.labels.tolist()
    ([[1, 54]], [[54, 1]])
    """
    for name, value in (("pack", options.get("pack")), ("teacher_tokenizer", options.get("teacher_tokenizer"))):
        if value:
            why = "an encoder reads one text" if name == "pack" else "student and teacher have to read the same tokens"
            raise ConfigError(why, where=f"data.options.{name}", found=repr(value), remedy=f"leave {name} out")
    for name, value in (("source_length", source_length), ("target_length", target_length), ("prompt", prompt)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError("must be a whole number, 1 or more", where=f"data.options.{name}", found=repr(value))
    made = language_source(texts, tokenizer=tokenizer, **options)
    parts: dict[str, Any] = {}
    for key in SPLITS:
        split = getattr(made, key)
        if split is not None:
            tokens = split.tokens
            first = start if start is not None else tokens.bos if tokens.bos is not None else tokens.pad
            parts[key] = _paired(split, first, source_length, target_length, prompt)
    return replace(made, **parts)


@dataclass
class PairRows(Rows):
    """Rows whose batches are prompts with what follows them apart.

    Args:
        start: The token with which a decoder begins.
        source_length, target_length: Tokens at most.
        prompt: Tokens of a prompt at least.
    """

    start: int = 0
    source_length: int = 1024
    target_length: int = 256
    prompt: int = 1

    def of(self, rows: Tensor) -> PairRows:
        """Some rows, numbered anew from 0."""
        return _as_pairs(super().of(rows), self.start, self.source_length, self.target_length, self.prompt)

    def batch(self, index: Tensor) -> Batch:
        """Rows as :func:`side_by_side` lays them out."""
        found, pad = super().batch(index), self.student.pad
        prompts, own = prompts_of(found, self.prompt, pad)
        target, kept, counted = _after(found, own.sum(dim=1), pad)
        source, there = _moved(prompts, own, pad, left=False)
        source, there = source[:, : self.source_length], there[:, : self.source_length]
        target, kept = target[:, : self.target_length], kept[:, : self.target_length]
        made = side_by_side(source, there, target, kept, start=self.start, pad=pad, mask=counted[:, : target.shape[1]])
        extras = {**made.extras, **{name: found.extras[name] for name in ("tag",) if name in found.extras}}
        return made.replace(index=found.index, extras=extras)


def side_by_side(
    source: Tensor,
    there: Tensor,
    target: Tensor,
    kept: Tensor,
    *,
    start: int,
    pad: int = 0,
    mask: Tensor | None = None,
) -> Batch:
    r"""What an encoder-decoder reads, and the same for a decoder, so that the two predict the same token.

    The student's decoder reads ``[start, y_1 ... y_{T-1}]``; place j predicts ``y_j``. The teacher reads the source,
    padded on the left to the width S, and then y: its place :math:`S - 1 + j` predicts :math:`y_j` too, whatever the
    source's length.

    Args:
        source, there: ``[B, S]``, padded on the right; True where there is a token.
        target, kept: ``[B, T]``, padded on the right.
        start: The token with which a decoder begins.
        pad: The id that fills up.
        mask: ``[B, T]``, which places count; ``None``: those with a token.

    Returns:
        ``inputs`` of the student, ``teacher_inputs``, ``labels [B, T]`` (-1 without a token) and ``mask``. ``extras``
        hold ``teacher_labels`` and ``teacher_mask [B, S + T]``.

    Source: Return of the Encoder, arXiv 2501.16273, and microsoft/encoder-decoder-slm.

    >>> x, y = torch.tensor([[5, 6, 7], [5, 0, 0]]), torch.tensor([[8, 9], [8, 0]])
    >>> batch = side_by_side(x, x > 0, y, y > 0, start=1)
    >>> batch.teacher_inputs["input_ids"].tolist()
    [[5, 6, 7, 8, 9], [0, 0, 5, 8, 0]]
    """
    left, left_there = _moved(source, there, pad, left=True)
    shifted = torch.cat([torch.full_like(target[:, :1], start), target[:, :-1]], dim=1)
    decodes = torch.cat([torch.ones_like(kept[:, :1]), kept[:, :-1]], dim=1)
    inputs = {
        "input_ids": source,
        "attention_mask": there.long(),
        "decoder_input_ids": shifted.masked_fill(~decodes, pad),
        "decoder_attention_mask": decodes.long(),
    }
    whole = torch.cat([left_there, kept], dim=1)
    teacher = {
        "input_ids": torch.cat([left, target], dim=1),
        "attention_mask": whole.long(),
        "position_ids": (whole.cumsum(dim=1) - 1).clamp(min=0),
    }
    mask, labels = kept if mask is None else mask, target.masked_fill(~kept, -1)
    width = source.shape[1]
    extras = {
        "teacher_labels": torch.nn.functional.pad(labels, (width - 1, 1), value=-1),
        "teacher_mask": torch.nn.functional.pad(mask, (width - 1, 1), value=False),
    }
    return Batch(inputs, labels, mask=mask, teacher_inputs=teacher, extras=extras)


def beside(batch: Batch) -> Mapping[str, Tensor]:
    """The inputs of a batch that :func:`side_by_side` made.

    Raises:
        DataError: It is another one.
    """
    inputs = batch.inputs
    if not isinstance(inputs, Mapping) or "decoder_input_ids" not in inputs or batch.teacher_inputs is None:
        found = f"keys {', '.join(map(str, inputs))}" if isinstance(inputs, Mapping) else type(inputs).__name__
        raise DataError(
            "these are no prompts for an encoder with texts for a decoder",
            where="data",
            found=found,
            remedy="name the source 'limbeck.data.language.pairs:seq2seq_source'",
        )
    return inputs


def _paired(split: LanguageSplit, *numbers: int) -> LanguageSplit:
    names = ("start", "source_length", "target_length", "prompt")
    settings = {**split.settings, **dict(zip(names, numbers, strict=True))}
    return replace(split, rows=_as_pairs(split.rows, *numbers), settings=settings)


def _as_pairs(rows: Rows, *numbers: int) -> PairRows:
    return PairRows(rows.student, rows.first, rows.layout, rows.teacher, rows.tag, *numbers)


def _after(batch: Batch, prompt: Tensor, pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """What stands behind so many tokens of each row, ``[B, T]``: tokens, where there is one, and which count."""
    ids, mask = batch.inputs["input_ids"], batch.require("mask")
    there = batch.inputs["attention_mask"] > 0
    size, first = there.sum(dim=1) - prompt, there.int().argmax(dim=1) + prompt
    place = torch.arange(max(1, int(size.max())), device=ids.device)
    kept, column = place < size.unsqueeze(1), (first.unsqueeze(1) + place).clamp(max=ids.shape[1] - 1)
    counted = mask.gather(1, (column - 1).clamp(min=0)) & kept  # the place before a token predicts it
    return ids.gather(1, column).masked_fill(~kept, pad), kept, counted


def _moved(ids: Tensor, there: Tensor, pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """With all padding on one side."""
    order = (there if left else ~there).int().argsort(dim=1, stable=True)
    there = there.gather(1, order)
    return ids.gather(1, order).masked_fill(~there, pad), there

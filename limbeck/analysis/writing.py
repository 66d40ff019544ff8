"""What language models write: held-out prompts gone on with by student and teacher, side by side and measured."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.teacher import teacher_mask
from limbeck.data.language.answers import answer_of
from limbeck.data.language.loader import LanguageLoader
from limbeck.data.language.tokens import Tokens
from limbeck.data.language.written import prompts_of
from limbeck.models.answering import answer
from limbeck.models.generating import Decoding, endings, write


def exact_match(written: list[str], references: list[str]) -> float:
    """The share of texts that are right: by their final answers where the references have such (``####``), else alike.

    >>> exact_match(["so it is 18", "7"], ["#### 18", "#### 8"])
    0.5
    """
    worked = all("####" in reference for reference in references)
    said = [
        (answer_of(a), answer_of(b)) if worked else (a.strip(), b.strip())
        for a, b in zip(written, references, strict=True)
    ]
    return sum(a == b for a, b in said) / len(said)


def rouge_l(written: list[str], references: list[str]) -> float:
    """Mean ROUGE-L: F of the longest common subsequence of words, as torchmetrics counts it (Lin, 2004).

    >>> rouge_l(["the cat sat"], ["the cat sat"])
    1.0
    """
    from torchmetrics.functional.text import rouge_score

    return float(rouge_score(written, references, rouge_keys="rougeL")["rougeL_fmeasure"])


@dataclass(frozen=True)
class _Texts:
    prompts: list[str]
    references: list[str]
    written: list[str]
    per_second: float


def assess_writing(
    student: nn.Module,
    teacher: nn.Module | None,
    loader: LanguageLoader,
    *,
    prompts: int = 16,
    max_new_tokens: int = 64,
) -> dict[str, Any] | None:
    """Have both models go on with held-out prompts, the likeliest token every time.

    A prompt is what stands before a row's completion; of whole texts it is the first half, and what follows is only
    shown beside what is written.

    Args:
        student: A causal language model of transformers, or an encoder-decoder, to which prompts are the source.
        teacher: The same, with tokens of its own where the loader says so; or ``None``.
        loader: Of held-out rows, which are no packs.
        prompts: How many rows, the first.
        max_new_tokens: Of what is written.

    Returns:
        ``tokens_per_second`` in one batch; of completions ``rouge_l`` and ``exact_match``; ``teacher`` with the same;
        ``texts``, a list of ``prompt``, ``reference``, ``student`` and ``teacher``. ``None`` where there is nothing to
        go on with: packs, or a student that does not write.
    """
    if loader.rows.layout.pack or not callable(getattr(student, "generate", None)):
        return None
    device = next((p.device for p in student.parameters()), torch.device("cpu"))
    batch = loader.example(prompts).to(device)
    whole = not _reads(student) and bool((prompts_of(batch)[1].sum(1) <= 1).any())
    own = _written(student, batch, loader.split.tokens, max_new_tokens, whole)
    found: dict[str, Any] = _figures(own, whole)
    columns = {"prompt": own.prompts, "reference": own.references, "student": own.written}
    if callable(getattr(teacher, "generate", None)):
        assert teacher is not None
        tokens = loader.split.teacher_tokens or loader.split.tokens
        other = _written(teacher, _as_teacher_sees(batch), tokens, max_new_tokens, whole)
        found["teacher"] = _figures(other, whole)
        columns["teacher"] = other.written
    found["texts"] = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return found


def _reads(model: nn.Module) -> bool:
    """Whether it has an encoder for prompts."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _as_teacher_sees(batch: Batch) -> Batch:
    if batch.teacher_inputs is None:
        return batch
    return batch.replace(
        inputs=batch.teacher_inputs,
        labels=batch.extras["teacher_labels"],
        mask=teacher_mask(batch),
        teacher_inputs=None,
    )


def _figures(texts: _Texts, whole: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"tokens_per_second": texts.per_second}
    if not whole:
        found["rouge_l"] = rouge_l(texts.written, texts.references)
        found["exact_match"] = exact_match(texts.written, texts.references)
    return found


def _written(model: nn.Module, batch: Batch, tokens: Tokens, most: int, whole: bool) -> _Texts:
    ids, mask = batch.inputs["input_ids"], batch.inputs.get("attention_mask", batch.inputs["input_ids"] >= 0) > 0
    if not _reads(model):
        ids, mask = prompts_of(batch, least=max(1, ids.shape[1] // 2) if whole else 1, pad=tokens.pad)
    ends = endings(tokens, model) if tokens.eos is not None else []
    room = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    room = most if not isinstance(room, int) else min(most, room - ids.shape[1])
    how, began = Decoding(max(1, room), temperature=0.0), time.perf_counter()
    if _reads(model):
        start = int(batch.inputs["decoder_input_ids"][0, 0])
        made = answer(model, ids, mask, how, start=start, ends=ends, pad=tokens.pad)
    else:
        made = write(model, ids, mask, how, ends=ends, pad=tokens.pad)
    seconds = time.perf_counter() - began
    marks = {tokens.bos, tokens.eos, tokens.pad, *ends}

    def said(row: torch.Tensor) -> str:
        return tokens.decode([i for i in row.tolist() if i not in marks])

    labels = batch.require("labels")
    counts = labels >= 0 if batch.mask is None else batch.mask
    places = counts.cumsum(1) - 1  # of each learned token in its row
    skip = (mask.sum(1) - (counts.int().argmax(1) + 1)).clamp(min=0) if whole else torch.zeros_like(mask.sum(1))
    learned = [row[own & (place >= s)] for row, own, place, s in zip(labels, counts, places, skip, strict=True)]
    return _Texts(
        [said(row[there]) for row, there in zip(ids, mask, strict=True)],
        [said(row) for row in learned],
        [said(row[:n]) for row, n in zip(made.ids, made.lengths.tolist(), strict=True)],
        float(made.lengths.sum()) / seconds,
    )

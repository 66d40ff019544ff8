"""Logits over one vocabulary as logits over another, and places of two tokenizers that stand for one another."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.reduction import check_positive
from limbeck.data.language.translate import Translation
from limbeck.objectives.parts.paired_tokens import Chunks, chunk_sums, partners

Alignment = Literal["match", "reduce", "reduce_map"]
Combine = Literal["sum", "logsumexp"]


def check_options(alignment: str, combine: str, temperature: float) -> None:
    """Refuse options that are not there."""
    for name, value, known in (("alignment", alignment, get_args(Alignment)), ("combine", combine, get_args(Combine))):
        if value not in known:
            raise ConfigError("no such choice", where=name, found=repr(value), wanted=", ".join(known))
    check_positive(temperature, "temperature")


def check_translation(translation: Translation, student: Tensor, teacher: Tensor) -> None:
    """Refuse logits of fewer tokens than the vocabularies have. Values are looked at on the CPU only."""
    if student.device.type != "cpu" or torch.compiler.is_compiling():
        return
    for name, logits, ids in (
        ("student_logits", student, translation.pieces),
        ("teacher_logits", teacher, translation.source),
    ):
        if ids.numel() and int(ids.max()) >= logits.shape[-1]:
            wanted = f"{int(ids.max()) + 1} or more"
            raise TensorError("fewer logits than tokens", where=name, found=logits.shape[-1], wanted=wanted)


def matched_places(
    student: Tensor, teacher: Tensor, counts: Tensor, chunks: Chunks, translation: Translation, *, single: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of the student's logits over the places of a chunk, and the teacher's at its one place in it.

    Args:
        student: ``[B, L, C]``.
        teacher: ``[B, L', C']``.
        counts: ``[B, L]``, which of the student's places count.
        chunks: Which places are of which chunk.
        translation: What the logits are compared by; there has to be one for each of its tokens.
        single: Only chunks in which the student has one place, too.

    Returns:
        ``[B, L, C]``, ``[B, L, C']`` and ``[B, L]`` booleans, at the student's first place of each chunk: where there
        is such a pair.
    """
    check_translation(translation, student, teacher)
    known = chunks.labels >= 0
    place = torch.arange(teacher.shape[1], device=teacher.device).expand(len(teacher), -1)
    number, places, whole = chunk_sums(counts.long(), counts, place, known, chunks)
    summed, ones, _ = chunk_sums(student, counts, known.long(), known, chunks)
    paired = whole & (ones == 1) & ((number == 1) if single else True)
    return summed, partners(teacher, torch.where(paired, places, -1)), paired


def written(logits: Tensor, translation: Translation, combine: Combine = "sum") -> Tensor:
    """Logits ``[*, C]`` of the student's tokens as logits ``[*, N]`` of the teacher's that are written with them.

    >>> ids = torch.arange(2)
    >>> words = Translation(ids, ids, torch.tensor([2, 0, 1]), torch.tensor([[0, 1], [0, -1], [1, -1]]))
    >>> written(torch.tensor([3.0, 5.0]), words)
    tensor([8., 3., 5.])
    """
    pieces = translation.pieces
    found = logits[..., pieces[:, 0]]
    for depth in range(1, pieces.shape[1]):
        ids = pieces[:, depth]
        there = ids >= 0
        more = logits[..., ids.clamp(min=0)]
        longer = found + more if combine == "sum" else torch.logaddexp(found, more)
        found = torch.where(there, longer, found)
    return found

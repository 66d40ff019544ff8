"""Chunks of text that two tokenizers cut into whole tokens, and which predictions of either tell of each."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

_NONE = torch.iinfo(torch.int64).max  # stands for no character


def aligned_chunks(ends: Tensor, counts: Tensor, teacher_ends: Tensor, teacher_counts: Tensor) -> tuple[Tensor, Tensor]:
    """Number the shortest chunks of text that begin and end with a token in both tokenizers.

    A position belongs to the chunk that the token it predicts lies in. Where a chunk is not predicted as a whole on
    both sides, its positions belong to none.

    Args:
        ends: ``[B, L]``, how many characters of its row are read up to each position, rising where ``counts``.
        counts: ``[B, L]`` booleans: the position predicts a token that counts; the next position has read it.
        teacher_ends: ``[B, L']``, the same of the teacher.
        teacher_counts: ``[B, L']``.

    Returns:
        For each position of the student ``[B, L]`` and of the teacher ``[B, L']`` the number of its chunk in the row,
        which is the student's first position in it; -1 where there is none.

    >>> ends, teacher_ends = torch.tensor([[0, 1, 2, 3, 5]]), torch.tensor([[0, 2, 3, 4, 5]])
    >>> counts = torch.tensor([[True, True, True, True, False]])
    >>> own, other = aligned_chunks(ends, counts, teacher_ends, counts)
    >>> own.tolist(), other.tolist()
    ([[0, 0, 2, 3, -1]], [[0, 2, 3, 3, -1]])
    """
    ends, teacher_ends = ends.long(), teacher_ends.long()
    begun, order = torch.where(counts, ends, _NONE).sort(dim=1, stable=True)
    other_begun = _ordered(teacher_ends, teacher_counts)
    ended = _ordered(pad(ends[:, 1:], (0, 1)), counts)
    other_ended = _ordered(pad(teacher_ends[:, 1:], (0, 1)), teacher_counts)

    def opens(at: Tensor) -> Tensor:
        return _has(begun, at) & _has(other_begun, at)

    def closes(at: Tensor) -> Tensor:
        return _has(ended, at) & _has(other_ended, at)

    shared = torch.where(opens(begun), begun, _NONE), torch.where(closes(ended), ended, _NONE)
    borders = pad(torch.cat(shared, dim=1).sort(dim=1).values, (1, 1), value=_NONE)
    borders[:, 0] = -1

    def numbers(read: Tensor, counted: Tensor) -> Tensor:
        behind = torch.searchsorted(borders, read.contiguous(), right=True).clamp(max=borders.shape[1] - 1)
        begin, end = borders.gather(1, behind - 1), borders.gather(1, behind)
        first = order.gather(1, torch.searchsorted(begun, begin).clamp(max=begun.shape[1] - 1))
        return torch.where(counted & opens(begin) & closes(end), first, -1)

    return numbers(ends, counts), numbers(teacher_ends, teacher_counts)


def _ordered(values: Tensor, counts: Tensor) -> Tensor:
    return torch.where(counts, values, _NONE).sort(dim=1).values


def _has(ordered: Tensor, wanted: Tensor) -> Tensor:
    """Whether values stand in the row of their batch."""
    place = torch.searchsorted(ordered, wanted).clamp(max=ordered.shape[1] - 1)
    return (ordered.gather(1, place) == wanted) & (wanted < _NONE)

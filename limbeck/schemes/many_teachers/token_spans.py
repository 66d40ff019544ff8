"""Tokens of two tokenizers over the same text: which cover the same characters, and pieces that both cut alike."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.divergences import kl_rows, soften
from limbeck.core.relations import unit


def same_spans(spans: Tensor, other: Tensor, counts: Tensor, other_counts: Tensor) -> Tensor:
    """The place of the other tokenizer that covers the same characters, ``[B, L]``; -1 where there is none.

    Args:
        spans: ``[B, L, 2]``, the characters of each token.
        other: ``[B, M, 2]``.
        counts: ``[B, L]`` booleans, the tokens that stand for text.
        other_counts: ``[B, M]``.

    >>> spans, other = torch.tensor([[[0, 2], [2, 5]]]), torch.tensor([[[0, 1], [1, 2], [2, 5]]])
    >>> same_spans(spans, other, torch.ones(1, 2) > 0, torch.ones(1, 3) > 0)
    tensor([[-1,  2]])
    """
    real, theirs = counts & (spans[..., 1] > spans[..., 0]), other_counts & (other[..., 1] > other[..., 0])
    length = _length(spans, other)
    places = torch.arange(other.shape[1], device=other.device).expand(other.shape[:2])
    table = torch.full((len(spans), length), -1, device=spans.device)
    ends = torch.where(theirs, other[..., 1], length - 1)  # nothing ends there
    table.scatter_(1, ends, torch.where(theirs, places, -1))
    found = table.gather(1, spans[..., 1])
    start = other[..., 0].gather(1, found.clamp(min=0))
    return torch.where(real & (found >= 0) & (start == spans[..., 0]), found, -1)


def pieces(spans: Tensor, other: Tensor, counts: Tensor, other_counts: Tensor) -> tuple[Tensor, Tensor]:
    """The number of each token's piece, ``[B, L]`` and ``[B, M]``: the least stretches of text that both cut off alike.

    Tokens behind the last common end, and those of no text, have -1.

    >>> spans, other = torch.tensor([[[0, 2], [2, 5], [5, 6]]]), torch.tensor([[[0, 1], [1, 2], [2, 6]]])
    >>> pieces(spans, other, torch.ones(1, 3) > 0, torch.ones(1, 3) > 0)
    (tensor([[0, 1, 1]]), tensor([[0, 0, 1]]))
    """
    length, marks = _length(spans, other), []
    for own, there in ((spans, counts), (other, other_counts)):
        real = there & (own[..., 1] > own[..., 0])
        mark = torch.zeros(len(own), length, dtype=torch.long, device=own.device)
        mark.scatter_reduce_(1, own[..., 1], real.long(), "amax")
        marks.append((mark > 0, real))
    common = (marks[0][0] & marks[1][0]).long()
    before, total = common.cumsum(dim=1) - common, common.sum(dim=1, keepdim=True)
    found = []
    for own, (_, real) in zip((spans, other), marks, strict=True):
        number = before.gather(1, own[..., 1])
        found.append(torch.where(real & (number < total), number, -1))
    return found[0], found[1]


def piece_means(states: Tensor, piece: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The mean state of each piece, ``[B, count, D]``, and which pieces there are, ``[B, count]``.

    >>> piece_means(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[0, 0, -1]]), 2)
    (tensor([[[2.],
             [0.]]]), tensor([[ True, False]]))
    """
    flat = torch.arange(len(states), device=states.device).unsqueeze(1) * (count + 1)
    flat = (flat + torch.where(piece >= 0, piece, count)).flatten()
    size = len(states) * (count + 1)
    sums = states.new_zeros(size, states.shape[-1]).index_add(0, flat, states.flatten(0, 1))
    number = states.new_zeros(size).index_add(0, flat, states.new_ones(len(flat)))
    sums, number = (x.view(len(states), count + 1, *x.shape[1:])[:, :count] for x in (sums, number))
    return sums / number.clamp(min=1).unsqueeze(-1), number > 0


def shared_kl(student: Tensor, teacher: Tensor, own: Tensor, other: Tensor, temperature: float) -> Tensor:
    r"""Divergence of predictions ``[n, V]`` and ``[n, W]`` over tokens that both vocabularies have, times T squared.

    Args:
        student, teacher: Logits; the teacher's are detached.
        own, other: ``[M]``, these tokens' ids in either vocabulary.
        temperature: T.

    >>> z = torch.tensor([[0.0, 1.0, 5.0]])
    >>> shared_kl(z, z[:, :2], torch.tensor([0, 1]), torch.tensor([0, 1]), 2.0)
    tensor([0.])
    """
    first, second = soften(teacher.detach()[:, other], temperature), soften(student[:, own], temperature)
    return temperature**2 * kl_rows(first, second)


def apart(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine of states ``[*, D]``; the teacher's are detached.

    >>> apart(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
    tensor([1.])
    """
    return 1 - (unit(student) * unit(teacher.detach().to(student.dtype))).sum(dim=-1)


def _length(spans: Tensor, other: Tensor) -> int:
    """One more than any end, and a place where nothing ends."""
    return int(max(spans.max(), other.max())) + 2 if spans.numel() and other.numel() else 2

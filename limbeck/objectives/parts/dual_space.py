"""Two models' predictions in each other's space: hidden states mapped across, places matched by attention."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from limbeck.core.divergences import kl_rows, soften
from limbeck.core.errors import TensorError
from limbeck.core.reduction import check_floating, widen
from limbeck.core.relations import project


class Side(NamedTuple):
    """What one model says, and knows of its tokens.

    Args:
        feature: ``[B, L, D]``, what enters the layer that makes the logits.
        logits: ``[B, L, C]``.
        head: ``[C, D]``, the weight of that layer.
        read: ``[B, L, E]``, the embedding of the token that each place reads.
        table: ``[V, E]``, the embedding of every token.
        labels: ``[B, L]``, the token that each place predicts.
        counts: ``[B, L]`` booleans, True where that counts; the label is a token there.
    """

    feature: Tensor
    logits: Tensor
    head: Tensor
    read: Tensor
    table: Tensor
    labels: Tensor
    counts: Tensor


def checked(side: Side, name: str) -> Side:
    """A side with labels that can be looked up, in which nothing that does not count has a value.

    Raises:
        TensorError: What does not fit together.
    """
    tensors = {"feature": side.feature, "logits": side.logits, "embedding": side.read}
    for kind, tensor in tensors.items():
        check_floating(tensor, f"{name}_{kind}", least=3)
        if tensor.shape[:2] != side.counts.shape:
            found, wanted = list(tensor.shape), f"{list(side.counts.shape)} places"
            raise TensorError("other places than labels", where=f"{name}_{kind}", found=found, wanted=wanted)
    widths = {"head": (side.head, (side.logits.shape[-1], side.feature.shape[-1])), "embeddings": (side.table, None)}
    for kind, (tensor, shape) in widths.items():
        check_floating(tensor, f"{name}_{kind}", least=2)
        wanted_shape = shape or (tensor.shape[0], side.read.shape[-1])
        if tuple(tensor.shape) != wanted_shape:
            found = list(tensor.shape)
            raise TensorError("does not belong to these", where=f"{name}_{kind}", found=found, wanted=wanted_shape)
    hidden = ~side.counts.unsqueeze(-1)
    return side._replace(
        feature=side.feature.masked_fill(hidden, 0.0),
        read=side.read.masked_fill(hidden, 0.0),
        labels=side.labels.clamp(0, min(len(side.table), side.logits.shape[-1]) - 1),
    )


def scaled(values: Tensor, counts: Tensor) -> Tensor:
    """Values over their standard deviation, taken over all entries ``[B, L, D]`` of the places that count.

    >>> scaled(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[True, True, False]])).flatten()
    tensor([0.7071, 2.1213, 6.3640])
    """
    number = counts.sum() * values.shape[-1]
    inside = counts.unsqueeze(-1)
    mean = values.masked_fill(~inside, 0.0).sum() / number.clamp(min=1)
    variance = (values - mean).masked_fill(~inside, 0.0).square().sum() / (number - 1).clamp(min=1)
    return values / variance.masked_fill(variance == 0, 1.0).sqrt()


def cross_attention(student: Side, teacher: Side, query: nn.Module) -> Tensor:
    r"""How well each place of the student matches each of the teacher's, by token read and token predicted.

    .. math:: A_{ij} = Q([e_i; e_{i+1}]) \cdot [f_j; f_{j+1}] / \sigma \sqrt{2 E}

    Returns:
        ``[B, L, L']``; hardly anything where either does not count.
    """
    own, other = (torch.cat([s.read, nn.functional.embedding(s.labels, s.table)], dim=-1) for s in (student, teacher))
    queries = widen(project(query, own.detach(), "student_embedding"))
    keys = scaled(widen(other), teacher.counts).to(queries.dtype)
    scores = queries @ keys.transpose(1, 2) / math.sqrt(keys.shape[-1])
    both = student.counts.unsqueeze(2) & teacher.counts.unsqueeze(1)
    return scores.masked_fill(~both, -1e5)


def dual_space_parts(
    student: Side, teacher: Side, maps: nn.ModuleDict, temperature: float, aligned: bool
) -> dict[str, Tensor]:
    """The three parts of DSKD, each over the number of the student's places that count.

    Args:
        student, teacher: Both sides; the teacher's, and the student's embeddings and head, carry no gradient.
        maps: ``"t2s"`` and ``"s2t"``; ``"query"`` where places are not ``aligned``.
        temperature: Of the two divergences.
        aligned: Both read the same tokens, so each place is its own partner.
    """
    student, teacher = checked(student, "student"), checked(teacher, "teacher")
    number = student.counts.sum().clamp(min=1)
    if not aligned:  # a sample of which one side says nothing has no partners
        pairs = (student.counts.any(dim=1) & teacher.counts.any(dim=1)).unsqueeze(1)
        student, teacher = (s._replace(counts=s.counts & pairs) for s in (student, teacher))
    counts, other_counts, there = student.counts, teacher.counts, teacher.feature
    own = project(maps["s2t"], student.feature, "student_feature")
    if not aligned:
        scores = cross_attention(student, teacher, maps["query"])
        target = nn.functional.embedding(teacher.labels, teacher.table)
        there = scaled(widen(there), other_counts) + scaled(widen(target), other_counts)
    there = project(maps["t2s"], there, "teacher_feature")
    if not aligned:
        own, there = scores.transpose(1, 2).softmax(-1) @ own.to(scores), scores.softmax(-1) @ there.to(scores)
    seen = there @ student.head.detach().to(there).T
    labels = student.labels.unsqueeze(-1)
    entropy = -widen(seen).log_softmax(-1).gather(-1, labels).squeeze(-1)
    right = counts if aligned else counts & (seen.argmax(dim=-1) == student.labels)
    learned = kl_rows(soften(seen.detach(), temperature), soften(student.logits, temperature))
    said = own @ teacher.head.to(own).T
    taught = kl_rows(soften(teacher.logits, temperature), soften(said, temperature))
    parts = {"projected": (entropy, counts), "student_space": (learned, right), "teacher_space": (taught, other_counts)}
    return {name: values.masked_fill(~which, 0.0).sum() / number for name, (values, which) in parts.items()}

"""What a chunk's logits go through on the CPU, and on devices without Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.reduction import widen
from limbeck.kernels.arguments import Settings
from limbeck.kernels.bucket_rows import Buckets, Labels, bucket_rows
from limbeck.kernels.divergence_rows import DIVERGENCES
from limbeck.kernels.loop import blocks


def dense_rows(
    student: Tensor, teacher: Tensor, labels: Labels | None, settings: Settings
) -> tuple[Tensor, Tensor | None]:
    """Divergence and cross-entropy of each row of logits ``[c, V]``; the gradient goes where the student's were.

    The teacher's are written over as well.
    """
    divergence, cross_entropy = _values(student, labels)
    for rows in blocks(student.shape[0], student.shape[1], divergence.dtype, student.device):
        z = student[rows].to(divergence.dtype)
        part = None if labels is None else labels.at(rows)
        by_labels = None
        if part is not None and cross_entropy is not None:
            log_sum = z.logsumexp(dim=-1)
            cross_entropy[rows] = part.cross_entropy(log_sum, _at(z, part.target))
            if settings.gradient:
                by_labels = (z - log_sum.unsqueeze(-1)).exp_().mul_(part.factor.unsqueeze(-1))
        log_p = _softened(teacher[rows].to(divergence.dtype), settings.temperature)
        log_q = _softened(z, settings.temperature)
        value, gradient = DIVERGENCES[settings.divergence](log_p, log_q, settings.share, settings.gradient)
        divergence[rows] = value.mul_(settings.temperature**2)
        if gradient is None:
            continue
        if settings.weight * settings.temperature != 1:
            gradient.mul_(settings.weight * settings.temperature)
        if part is not None and by_labels is not None:
            gradient.add_(by_labels)
            _take_labels_off(gradient, part)
        student[rows] = gradient
    return divergence, cross_entropy


def sparse_rows(
    student: Tensor, teacher: Buckets, labels: Labels | None, settings: Settings
) -> tuple[Tensor, Tensor | None]:
    """As ``dense_rows``, of a sparse teacher."""
    divergence, cross_entropy = _values(student, labels)
    warm = settings.temperature != 1
    for rows in blocks(student.shape[0], student.shape[1], divergence.dtype, student.device):
        z = student[rows].to(divergence.dtype)  # the memory of the logits itself, unless they are in half precision
        buckets, part = teacher.at(rows), None if labels is None else labels.at(rows)
        label_logits = None if part is None else _at(z, part.target)
        logits = z.gather(1, buckets.ids)
        z.scatter_(1, buckets.ids, float("-inf"))
        raw_tail, raw_sum, raw_powers = _powers(z.clone()) if warm and part is not None else (None, None, None)
        tail, total, powers = _powers(z.div_(settings.temperature) if warm else z)
        found = bucket_rows(logits, tail, raw_tail, buckets, part, label_logits, settings)
        divergence[rows] = found.divergence
        if cross_entropy is not None and found.cross_entropy is not None:
            cross_entropy[rows] = found.cross_entropy
        if found.kept is None or found.share is None:
            continue
        powers.mul_(_over(found.share, total))
        if raw_powers is not None and raw_sum is not None and found.raw_share is not None:
            powers.addcmul_(raw_powers, _over(found.raw_share, raw_sum))
        powers.scatter_(1, buckets.ids, found.kept)
        if part is not None:
            _take_labels_off(powers, part)
        if powers.dtype != student.dtype:
            student[rows] = powers
    return divergence, cross_entropy


def _values(student: Tensor, labels: Labels | None) -> tuple[Tensor, Tensor | None]:
    """Room for the values of both."""
    divergence = widen(student.new_empty(0)).new_empty(student.shape[0])
    return divergence, None if labels is None else torch.empty_like(divergence)


def _softened(z: Tensor, temperature: float) -> Tensor:
    """Log-probabilities; the logits' memory is theirs to use, which on the CPU spares most of the time."""
    if temperature != 1:
        z.div_(temperature)
    return torch.log_softmax(z, dim=-1, out=z) if z.device.type == "cpu" else z.log_softmax(dim=-1)


def _powers(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logarithm of the sum of exponentials ``[r]``; and, over the highest, their sum ``[r, 1]`` and they, in place."""
    top = z.amax(dim=-1, keepdim=True).clamp_(min=torch.finfo(z.dtype).min)  # where no class is left out
    powers = z.sub_(top).exp_()
    total = powers.sum(dim=-1, keepdim=True)
    return (total.log() + top).squeeze(-1), total, powers


def _over(share: Tensor, total: Tensor) -> Tensor:
    """Their quotient, and 0 where there is nothing to share."""
    return (share / total).masked_fill_(total == 0, 0.0)


def _at(logits: Tensor, target: Tensor) -> Tensor:
    return logits.gather(1, target.unsqueeze(-1)).squeeze(-1)


def _take_labels_off(gradient: Tensor, labels: Labels) -> None:
    """The cross-entropy's gradient at the label itself."""
    gradient.scatter_add_(1, labels.target.unsqueeze(-1), -labels.factor.unsqueeze(-1))

"""A sparse teacher's buckets: its k classes, and all others together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from limbeck.kernels.arguments import Settings
from limbeck.kernels.divergence_rows import DIVERGENCES


class Labels(NamedTuple):
    """Labels of places ``[r]``: the class (0 where there is none), whether there is one, and the gradient's weight."""

    target: Tensor
    known: Tensor
    factor: Tensor

    def at(self, index: slice | Tensor) -> Labels:
        """Those of some of these places."""
        return Labels(*(part[index] for part in self))

    def cross_entropy(self, log_sum: Tensor, logits: Tensor) -> Tensor:
        """From the logarithm of the sum of exponentials ``[r]`` and the target's logit ``[r]``; 0 without a label."""
        return (log_sum - logits).masked_fill(~self.known, 0.0)


class Buckets(NamedTuple):
    r"""What a sparse teacher says of some places.

    Args:
        ids: ``[r, k]`` classes.
        log_probs: ``[r, k]``, at the temperature.
        log_tail: ``[r]``.
    """

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor

    def at(self, index: slice | Tensor) -> Buckets:
        """Those of some of these places."""
        return Buckets(*(part[index] for part in self))


class BucketRows(NamedTuple):
    r"""Values of some rows, and their gradient by the logits.

    The gradient is ``kept`` at the teacher's classes, and :math:`a\, u_c + b\, v_c` at the others, where u and v are
    the student's probabilities among these others, at the temperature and at 1. The weight of a label is still to be
    taken off at its class.
    """

    divergence: Tensor  # [r]
    cross_entropy: Tensor | None
    kept: Tensor | None  # [r, k]
    share: Tensor | None  # a, [r, 1]
    raw_share: Tensor | None  # b, [r, 1]; None where it is part of a


def bucket_rows(
    logits: Tensor,
    tail: Tensor,
    raw_tail: Tensor | None,
    teacher: Buckets,
    labels: Labels | None,
    label_logits: Tensor | None,
    settings: Settings,
) -> BucketRows:
    r"""Divergence over k + 1 buckets, cross-entropy over all classes, and the gradient of both.

    The student's tail is summed over the logits outside the teacher's classes, so that it keeps its digits however
    little probability it has.

    Args:
        logits: ``[r, k]``, the student's at the teacher's classes, wide.
        tail: ``[r]``, :math:`\log \sum e^{z / T}` over the others.
        raw_tail: ``[r]``, :math:`\log \sum e^z` over the others; ``None`` at T = 1.
        teacher: Its buckets.
        labels: Where a cross-entropy is wanted.
        label_logits: ``[r]``, the student's at the labels.
        settings: As for all chunks.
    """
    student = torch.cat([logits / settings.temperature, tail.unsqueeze(-1)], dim=-1)
    log_p = torch.cat([teacher.log_probs, teacher.log_tail.unsqueeze(-1)], dim=-1).to(student.dtype)
    cross_entropy = by_labels = None
    if labels is not None and label_logits is not None:
        raw = student if raw_tail is None else torch.cat([logits, raw_tail.unsqueeze(-1)], dim=-1)
        log_sum = raw.logsumexp(dim=-1)
        cross_entropy = labels.cross_entropy(log_sum, label_logits)
        by_labels = (raw - log_sum.unsqueeze(-1)).exp_().mul_(labels.factor.unsqueeze(-1))
    rows = DIVERGENCES[settings.divergence]
    value, gradient = rows(log_p, student.log_softmax(dim=-1), settings.share, settings.gradient)
    value = value * settings.temperature**2
    if gradient is None:
        return BucketRows(value, cross_entropy, None, None, None)
    gradient.mul_(settings.weight * settings.temperature)
    kept, share = gradient[:, :-1], gradient[:, -1:]
    if by_labels is None:
        return BucketRows(value, cross_entropy, kept, share, None)
    kept = kept + by_labels[:, :-1]
    if raw_tail is None:
        return BucketRows(value, cross_entropy, kept, share + by_labels[:, -1:], None)
    return BucketRows(value, cross_entropy, kept, share, by_labels[:, -1:])

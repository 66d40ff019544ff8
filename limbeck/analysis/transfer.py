"""What a trained model gained and lost when it learned from another."""

from __future__ import annotations

import torch  # noqa: F401  for the examples
from torch import Tensor

from limbeck.core.reduction import check_logits


def flips(before: Tensor, after: Tensor, labels: Tensor) -> dict[str, float]:
    r"""Shares of samples that two predictions differ on, and agree on.

    Args:
        before, after: Logits ``[B, C]`` of one model earlier and later, or of two models.
        labels: ``[B]`` classes; negative ones do not count.

    Returns:
        ``gain``, wrong before and right after; ``loss``, right before and wrong after; ``both``, right in both;
        ``neither``: in all 1. ``delta`` is the change of the accuracy, gain less loss.

    Raises:
        TensorError: Shapes do not fit.

    Source: Fantastic Gains and Where to Find Them, arXiv 2310.17653.

    >>> right, wrong = torch.eye(2), 1 - torch.eye(2)
    >>> flips(wrong, torch.stack([right[0], wrong[1]]), torch.tensor([0, 1]))
    {'gain': 0.5, 'loss': 0.0, 'both': 0.0, 'neither': 0.5, 'delta': 0.5}
    """
    check_logits(after, before, labels)
    known = labels >= 0
    was, is_now = ((said.argmax(-1) == labels)[known] for said in (before, after))
    shares = {"gain": ~was & is_now, "loss": was & ~is_now, "both": was & is_now, "neither": ~was & ~is_now}
    found = {name: float(value.float().mean()) for name, value in shares.items()}
    return {**found, "delta": float((is_now.float() - was.float()).mean())}


def complementary_knowledge(teacher: Tensor, student: Tensor, labels: Tensor) -> float:
    """The share of samples that a teacher gets right and a student wrong: what there is to be transferred.

    Args:
        teacher, student: Logits ``[B, C]``.
        labels: ``[B]`` classes.

    Source: Fantastic Gains and Where to Find Them, arXiv 2310.17653.

    >>> complementary_knowledge(torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
    0.5
    """
    return flips(student, teacher, labels)["gain"]


def success_rate(deltas: Tensor) -> float:
    """The share of pairs of teacher and student whose student got better.

    >>> success_rate(torch.tensor([0.1, 0.0, -0.2, 0.3]))
    0.5
    """
    return float((deltas > 0).float().mean())

"""Losses of what is made instead of data: by what the teacher, and the student, say about it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.divergences import jensen_shannon_rows, soften
from limbeck.core.reduction import widen


def one_hot_loss(logits: Tensor, targets: Tensor | None = None) -> Tensor:
    r"""Cross entropy of the teacher's prediction, :math:`-\frac 1 B \sum_i \log p_{i, t_i}`.

    Args:
        logits: The teacher's, ``[B, C]``.
        targets: ``[B]`` classes; ``None``: each sample's own likeliest, as in DAFL.

    >>> one_hot_loss(torch.zeros(2, 4))
    tensor(1.3863)
    """
    return F.cross_entropy(widen(logits), logits.detach().argmax(dim=1) if targets is None else targets)


def information_entropy_loss(logits: Tensor, base: float = 10.0) -> Tensor:
    r"""The negative entropy of the batch's mean prediction, :math:`\sum_c \bar p_c \log \bar p_c`: least where all
    classes occur alike, :math:`-\log C`; 0 where there is one alone.

    Args:
        logits: The teacher's, ``[B, C]``.
        base: Of the logarithm; 10 in DAFL's code, so that its weight of 5 is one of 2.2 nats.

    >>> information_entropy_loss(torch.zeros(2, 10))
    tensor(-1.0000)
    """
    # By log-sum-exp over the batch: a class that nobody expects has a logarithm all the same.
    log_mean = soften(logits).logsumexp(dim=0) - math.log(len(logits))
    return (log_mean.exp() * log_mean).sum() / math.log(base)


def activation_loss(feature: Tensor) -> Tensor:
    r"""What excites the teacher looks like its data: :math:`-\frac 1 n \| f \|_1`, over all of a feature's entries.

    >>> activation_loss(torch.tensor([[1.0, -3.0]]))
    tensor(-2.)
    """
    return -widen(feature).abs().mean()


def discrepancy(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""How far apart two models are, :math:`\frac{1}{B C} \| z^S - z^T \|_1`. Its gradient does not fade where they are
    close, which is why DFAD takes it and not a divergence.

    >>> discrepancy(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]]))
    tensor(1.5000)
    """
    return (widen(student_logits) - widen(teacher_logits)).abs().mean()


def competition_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 3.0) -> Tensor:
    r""":math:`1 - JS(p^S, p^T)` with a logarithm of base e: least where student and teacher disagree.

    Args:
        student_logits, teacher_logits: ``[B, C]``.
        temperature: Of both; 3 in the authors' code.

    Source: Dreaming to Distill, arXiv 1912.08795, equation 8. The authors' code clamps probabilities to 0.01 to 0.99
    and takes both divergences the other way round; this is the paper's.

    >>> competition_loss(torch.zeros(2, 3), torch.zeros(2, 3))
    tensor(1.)
    """
    return 1 - jensen_shannon_rows(soften(teacher_logits, temperature), soften(student_logits, temperature)).mean()


def total_variation(images: Tensor) -> Tensor:
    r"""Norms of the differences of neighbours to the right, below and along both diagonals, summed:
    :math:`\sum_d \| x - x_{\to d} \|_2`, each over the whole batch.

    >>> total_variation(torch.ones(1, 1, 3, 3))
    tensor(0.)
    """
    pairs = (
        (images[..., :, :-1], images[..., :, 1:]),
        (images[..., :-1, :], images[..., 1:, :]),
        (images[..., 1:, :-1], images[..., :-1, 1:]),
        (images[..., :-1, :-1], images[..., 1:, 1:]),
    )
    return torch.stack([(a - b).norm() for a, b in pairs]).sum()

"""Divergences between predictions, row by row, from logits. Every response loss that has one ends in these."""

from __future__ import annotations

import math

from torch import Tensor

from limbeck.core.reduction import widen


def soften(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Log-probabilities at a temperature, over the last dimension; half precision is widened first."""
    return (widen(logits) / temperature).log_softmax(dim=-1)


def kl_rows(first: Tensor, second: Tensor) -> Tensor:
    r"""Kullback-Leibler divergence of each row, from log-probabilities.

    .. math:: \mathrm{KL}(p \| q) = \sum_c p_c (\log p_c - \log q_c)

    A class that ``p`` rules out (a padded vocabulary) adds nothing, also where ``q`` rules it out.

    Args:
        first: :math:`\log p`, ``[*, C]``.
        second: :math:`\log q`, the same shape.

    Returns:
        ``[*]``, in nats.

    >>> import torch
    >>> kl_rows(torch.tensor([1.0, 0.0]).log(), torch.tensor([0.5, 0.5]).log())
    tensor(0.6931)
    """
    ruled_out = first == -math.inf
    gap = (first - second).masked_fill(ruled_out, 0.0)
    return (first.exp() * gap).sum(dim=-1)


def cross_entropy_rows(probabilities: Tensor, log_q: Tensor) -> Tensor:
    r"""Cross-entropy of each row, :math:`-\sum_c p_c \log q_c`; a class with :math:`p_c = 0` adds nothing.

    Args:
        probabilities: :math:`p` (or any weights), ``[*, C]``.
        log_q: :math:`\log q`, the same shape.

    >>> import torch
    >>> cross_entropy_rows(torch.tensor([1.0, 0.0]), torch.tensor([0.25, 0.0]).log())
    tensor(1.3863)
    """
    return -(probabilities * log_q.masked_fill(probabilities == 0, 0.0)).sum(dim=-1)


def binary_kl_rows(first: Tensor, second: Tensor) -> Tensor:
    r"""Sum over classes of the divergence between two Bernoulli variables, from their logits.

    .. math:: \sum_c p_c \log \frac{p_c}{q_c} + (1 - p_c) \log \frac{1 - p_c}{1 - q_c},
        \qquad p = \sigma(a), q = \sigma(b)

    Args:
        first: Logits :math:`a` of :math:`p`, ``[*, C]``.
        second: Logits :math:`b` of :math:`q`, the same shape.

    >>> import torch
    >>> binary_kl_rows(torch.zeros(1), torch.zeros(1))
    tensor(0.)
    """
    first, second = widen(first), widen(second)
    # KL = softplus(b) - softplus(a) - p (b - a), which never takes the logarithm of a saturated sigmoid.
    softplus = _softplus(second) - _softplus(first)
    return (softplus - first.sigmoid() * (second - first)).sum(dim=-1)


def _softplus(x: Tensor) -> Tensor:
    return x.clamp(min=0) + (-x.abs()).exp().log1p()

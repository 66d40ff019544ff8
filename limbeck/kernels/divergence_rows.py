"""Divergences row by row with their gradients, from log-probabilities: what a chunk of places goes through.

Each function takes the teacher's :math:`\\log p` and the student's :math:`\\log q`, ``[r, C]`` (classes, or the
buckets of a sparse teacher), may write over both, and gives the divergences ``[r]`` and, where asked, their gradient
by the student's logits, ``[r, C]``. That gradient is :math:`g - q \\sum g` with :math:`g = \\partial D / \\partial
\\log q`, for which :math:`q` times any constant may be left out of :math:`g`. The values are those of
``limbeck.core.divergences``, which autograd differentiates with three times as many passes over the classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Rows = Callable[[Tensor, Tensor, float, bool], tuple[Tensor, Tensor | None]]


def forward_kl(log_p: Tensor, log_q: Tensor, share: float, gradient: bool) -> tuple[Tensor, Tensor | None]:
    r""":math:`\sum p (\log p - \log q)`, :math:`g = -p`; ``share`` is not used."""
    p = log_p.exp()
    value, _ = _expectation(p, log_p.sub_(log_q))
    return value, _by_logits(p.neg_(), log_q.exp_()) if gradient else None


def reverse_kl(log_p: Tensor, log_q: Tensor, share: float, gradient: bool) -> tuple[Tensor, Tensor | None]:
    r""":math:`\sum q (\log q - \log p)`, :math:`g = q (\log q - \log p)`; ``share`` is not used."""
    gap = torch.sub(log_q, log_p, out=log_p)
    q = log_q.exp_()
    value, terms = _expectation(q, gap)
    return value, _by_logits(terms, q) if gradient else None


def jensen_shannon(log_p: Tensor, log_q: Tensor, share: float, gradient: bool) -> tuple[Tensor, Tensor | None]:
    r""":math:`s\, \mathrm{KL}(p \| m) + (1 - s)\, \mathrm{KL}(q \| m)`, :math:`m = s p + (1 - s) q`, s the share.

    .. math:: g = (1 - s)\, q \log(q / m)
    """
    p, q = log_p.exp(), log_q.exp()
    log_m = _mixture(p, q, share).log_()
    first, _ = _expectation(p, log_p.sub_(log_m))
    second, terms = _expectation(q, log_q.sub_(log_m))
    value = share * first + (1 - share) * second
    return value, _by_logits(terms, q).mul_(1 - share) if gradient else None


def skew_kl(log_p: Tensor, log_q: Tensor, share: float, gradient: bool) -> tuple[Tensor, Tensor | None]:
    r""":math:`\mathrm{KL}(p \| m)`, :math:`m = s p + (1 - s) q`, s the share; :math:`g = -(1 - s)\, q\, p / m`."""
    p, q = log_p.exp(), log_q.exp_()
    m = _mixture(p, q, share)
    slope = p.div(m).mul_(q).mul_(share - 1) if gradient else None
    value, _ = _expectation(p, log_p.sub_(m.log_()))
    return value, None if slope is None else _by_logits(slope, q)


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, share: float, gradient: bool) -> tuple[Tensor, Tensor | None]:
    r""":math:`\mathrm{KL}(q \| m)`, :math:`m = s q + (1 - s) p`, s the share; :math:`g = q (\log(q / m) - s q / m)`."""
    p, q = log_p.exp_(), log_q.exp()
    m = _mixture(q, p, share)
    ratio = q.div(m).mul_(q).mul_(share) if gradient else None
    value, terms = _expectation(q, log_q.sub_(m.log_()))
    return value, None if ratio is None else _by_logits(terms.sub_(ratio), q)


def total_variation(log_p: Tensor, log_q: Tensor, share: float, gradient: bool) -> tuple[Tensor, Tensor | None]:
    r""":math:`\frac 1 2 \sum |q - p|`, :math:`g = \frac 1 2 q\, \mathrm{sign}(q - p)`; ``share`` is not used."""
    q = log_q.exp_()
    gap = torch.sub(q, log_p.exp_(), out=log_p)
    value = 0.5 * torch.linalg.vector_norm(gap, ord=1, dim=-1)
    return value, _by_logits(gap.sign_().mul_(q).mul_(0.5), q) if gradient else None


DIVERGENCES: dict[str, Rows] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jensen_shannon,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
}


def _expectation(weights: Tensor, logs: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of their products, and these, written over ``logs``; what has no weight adds nothing, even an infinity."""
    terms = logs.mul_(weights)
    value = terms.sum(dim=-1)
    # To look for weights of 0 takes longer than all else: on the CPU that is done only where it makes a difference.
    if weights.device.type != "cpu" or not value.isfinite().all():
        value = terms.masked_fill_(weights == 0, 0.0).sum(dim=-1)
    return value, terms


def _mixture(first: Tensor, second: Tensor, share: float) -> Tensor:
    """The mixture, not below what has a logarithm; where both are 0 nothing looks at it."""
    return torch.lerp(second, first, share).clamp_(min=torch.finfo(first.dtype).tiny)


def _by_logits(g: Tensor, q: Tensor) -> Tensor:
    """Through the student's softmax, written over ``g``."""
    return g.addcmul_(q, g.sum(dim=-1, keepdim=True), value=-1.0)

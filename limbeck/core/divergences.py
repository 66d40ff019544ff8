"""Divergences between predictions, row by row, from logits. Every response loss that has one ends in these."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.reduction import Reduction, check_logits, check_positive, reduce, widen


def soften(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Log-probabilities at a temperature, over the last dimension; half precision is widened first."""
    return (widen(logits) / temperature).log_softmax(dim=-1)


def log_among_others(logits: Tensor, target: Tensor) -> Tensor:
    r"""Log-probability of each class among those that are not the target; minus infinity at the target.

    .. math:: \log \frac{p_c}{1 - p_y} = z_c - \log \sum_{j \ne y} e^{z_j}

    Computed from the other logits alone, so that it keeps its digits where the target takes all probability.

    Args:
        logits: ``[*, C]``.
        target: ``[*]`` integers from 0 to C - 1.

    >>> log_among_others(torch.tensor([50.0, 0.0, 0.0]), torch.tensor(0)).exp()
    tensor([0.0000, 0.5000, 0.5000])
    """
    return logits.scatter(-1, target.unsqueeze(-1), -math.inf).log_softmax(dim=-1)


def softened_divergence(
    rows: Callable[[Tensor, Tensor], Tensor],
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""A response loss: :math:`T^2 D(p, q)` of both predictions at a temperature, where ``rows`` is the divergence.

    Near equality every smooth divergence falls as :math:`1 / T^2`; the factor keeps the size of its gradient.

    Args:
        rows: Takes the teacher's and the student's log-probabilities ``[B, *, C]`` and gives ``[B, *]``.
        student_logits, teacher_logits: ``[B, *, C]``; the teacher's are detached.
        labels: Not used, but has to fit.
        temperature: :math:`T`.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over counted places, ``"sum"`` or ``"none"``.

    >>> student, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    >>> softened_divergence(kl_rows, student, teacher)
    tensor(1.5232)
    """
    check_logits(student_logits, teacher_logits, labels)
    check_positive(temperature, "temperature")
    values = rows(soften(teacher_logits.detach(), temperature), soften(student_logits, temperature))
    return temperature**2 * reduce(values, mask, reduction)


def standardise(
    logits: Tensor,
    dim: int = -1,
    *,
    correction: int = 1,
    eps: float = 0.0,
    variance_eps: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Logits minus their mean, over their standard deviation; the gradient runs through both.

    .. math:: h = \frac{z - \mu}{\sqrt{v + \epsilon_v} + \epsilon}, \qquad
        v = \frac{1}{n - c} \sum (z - \mu)^2

    Where the values do not vary (up to rounding), :math:`h` is 0 and passes no gradient, unless ``variance_eps``
    defines one. Half precision is widened first.

    Args:
        logits: ``[*]`` of any shape.
        dim: What is standardised: -1 each place over its classes (logit standardisation), 0 each class over the batch.
        correction: :math:`c`; 1 gives the unbiased variance, 0 the biased one.
        eps: :math:`\epsilon`, added to the standard deviation.
        variance_eps: :math:`\epsilon_v`, added to the variance.
        mask: Booleans that broadcast to the logits, True where a value counts; the others are 0 in the result.

    >>> standardise(torch.tensor([1.0, 2.0, 3.0]))
    tensor([-1.,  0.,  1.])
    """
    centred, spread, flat = _spread(widen(logits), dim, correction, variance_eps, mask)
    return (centred / (spread + eps)).masked_fill(flat, 0.0)


def deviation(logits: Tensor, dim: int = -1, *, correction: int = 1) -> Tensor:
    """Standard deviation along a dimension, which stays with length 1; exactly 0 where values do not vary.

    >>> deviation(torch.tensor([1.0, 2.0, 3.0]))
    tensor([1.])
    """
    _, found, flat = _spread(widen(logits), dim, correction, 0.0, None)
    return found.masked_fill(flat, 0.0)


def _spread(
    values: Tensor, dim: int, correction: int, variance_eps: float, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Values minus their mean, their standard deviation (1 where they do not vary), and where they do not vary."""
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.expand(values.shape)
    number = mask.sum(dim=dim, keepdim=True)  # counted with a mask, so that a graph does not depend on the batch's size
    counted = values.masked_fill(~mask, 0.0)
    mean = counted.sum(dim=dim, keepdim=True) / number.clamp(min=1)
    centred = (counted - mean).masked_fill(~mask, 0.0)
    variance = centred.square().sum(dim=dim, keepdim=True) / (number - correction).clamp(min=1)
    if variance_eps:
        return centred, (variance + variance_eps).sqrt(), torch.zeros_like(variance, dtype=torch.bool)
    with torch.no_grad():
        size = torch.linalg.vector_norm(counted, dim=dim, keepdim=True)
        flat = torch.linalg.vector_norm(centred, dim=dim, keepdim=True) <= 4 * torch.finfo(values.dtype).eps * size
    return centred, variance.masked_fill(flat, 1.0).sqrt(), flat


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
    return F.softplus(x, threshold=40.0)  # beyond which float64 tells no difference from x


def log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    r"""Logarithm of a mixture, :math:`\log (s\, p + (1 - s)\, q)`; a class that both rule out stays ruled out.

    Args:
        log_p: :math:`\log p`, ``[*, C]``.
        log_q: :math:`\log q`, the same shape.
        share: :math:`s`, between 0 and 1, both excluded.

    >>> log_mixture(torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log(), 0.25).exp()
    tensor([0.2500, 0.7500])
    """
    both = (log_p == -math.inf) & (log_q == -math.inf)
    # logaddexp of twice -inf has no gradient: something finite stands there meanwhile.
    log_p, log_q = log_p.masked_fill(both, 0.0), log_q.masked_fill(both, 0.0)
    return torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share)).masked_fill(both, -math.inf)


def jensen_shannon_rows(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> Tensor:
    r"""Generalised Jensen-Shannon divergence of each row, between 0 and the entropy of :math:`(\beta, 1 - \beta)`.

    .. math:: \beta\, \mathrm{KL}(p \| m) + (1 - \beta)\, \mathrm{KL}(q \| m), \qquad m = \beta p + (1 - \beta) q

    >>> jensen_shannon_rows(torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log())
    tensor(0.6931)
    """
    middle = log_mixture(log_p, log_q, beta)
    return beta * kl_rows(log_p, middle) + (1 - beta) * kl_rows(log_q, middle)


def alpha_rows(log_p: Tensor, log_q: Tensor, alpha: float, clip: float | None = None) -> Tensor:
    r"""Alpha-divergence of each row; its limits at 1 and 0 are KL(p, q) and KL(q, p).

    .. math:: \frac{1}{\alpha (\alpha - 1)} \left( \sum_c p_c^\alpha q_c^{1 - \alpha} - 1 \right)

    Args:
        log_p: :math:`\log p`, ``[*, C]``; with ``clip`` taken as constant.
        log_q: :math:`\log q`, the same shape.
        alpha: Any number. Below 0 or above 1 the sum has no bound.
        clip: The most that :math:`(p_c / q_c)^\alpha` counts, in the value as in the gradient, which then is that of
            the value without clipping, weighted by the clipped ratios. ``None``: no limit. At 1 nothing is clipped.

    >>> alpha_rows(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log(), 2.0)
    tensor(0.8889)
    """
    if alpha == 1:
        return kl_rows(log_p, log_q)
    if alpha == 0 and clip is None:
        return kl_rows(log_q, log_p)
    both = (log_p == -math.inf) & (log_q == -math.inf)
    if clip is None:
        terms = (alpha * log_p + (1 - alpha) * log_q).masked_fill(both, -math.inf)
        return terms.logsumexp(dim=-1).expm1() / (alpha * (alpha - 1))
    with torch.no_grad():
        log_ratio = (log_p - log_q).masked_fill(both, 0.0)
        log_weight = ((alpha or 1.0) * log_ratio).clamp(max=math.log(clip))
        q, weight = log_q.exp(), log_weight.exp()
        value = -q * log_weight if alpha == 0 else q * (weight - 1) / (alpha * (alpha - 1))
        slope = -q * log_weight if alpha == 0 else -q * weight / alpha
    surrogate = (slope * log_q.masked_fill(log_q == -math.inf, 0.0)).sum(dim=-1)
    return value.sum(dim=-1) + (surrogate - surrogate.detach())


def alpha_beta_rows(log_p: Tensor, log_q: Tensor, alpha: float, beta: float) -> Tensor:
    r"""Alpha-beta divergence of each row, for exponents of zero or more.

    .. math:: -\frac{1}{\alpha \beta} \sum_c \left( p_c^\alpha q_c^\beta - \frac{\alpha}{\alpha + \beta}
        p_c^{\alpha + \beta} - \frac{\beta}{\alpha + \beta} q_c^{\alpha + \beta} \right)

    Where an exponent is 0 it is the limit: (1, 0) gives KL(p, q), (0, 1) KL(q, p), and (0, 0) half the squared distance
    of the logarithms.

    >>> alpha_beta_rows(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log(), 1.0, 1.0)
    tensor(0.1600)
    """
    if alpha == 0 == beta:
        both = (log_p == -math.inf) & (log_q == -math.inf)
        return 0.5 * (log_p - log_q).masked_fill(both, 0.0).square().sum(dim=-1)
    if alpha == 0:
        return _alpha_zero(log_q, log_p, beta)
    if beta == 0:
        return _alpha_zero(log_p, log_q, alpha)
    total = alpha + beta
    mixed = (alpha * log_p + beta * log_q).exp()
    apart = (alpha * (total * log_p).exp() + beta * (total * log_q).exp()) / total
    return (apart - mixed).sum(dim=-1) / (alpha * beta)


def _alpha_zero(first: Tensor, second: Tensor, exponent: float) -> Tensor:
    """The limit where the exponent of ``second`` goes to 0 and that of ``first`` is given."""
    gap = (exponent * (first - second)).masked_fill(first == -math.inf, 0.0)
    first, second = (exponent * first).exp(), (exponent * second).exp()
    return (first * gap - first + second).sum(dim=-1) / exponent**2

"""Optimal transport between two sets of rows, for losses that compare distributions of samples."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.reduction import check_floating, check_positive, fit_mask, widen

_NOTHING = -1e9  # the logarithm of no mass at all, finite so that nothing turns into NaN


def sinkhorn(
    cost: Tensor,
    epsilon: float = 0.1,
    iterations: int = 20,
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    r"""The plan of entropic optimal transport between uniform marginals, by Sinkhorn's iterations.

    .. math::
        P = \operatorname{diag}(u) \, e^{-W / \varepsilon} \operatorname{diag}(v), \qquad
        \sum_j P_{ij} = \frac 1 n, \quad \sum_i P_{ij} = \frac 1 m

    Each iteration scales the rows, then the columns, so columns are exact and rows nearly so. It works with logarithms,
    so a small :math:`\varepsilon` neither overflows nor divides by zero. Gradients flow through the iterations: detach
    the plan where it is to be a constant.

    Args:
        cost: :math:`W`, ``[*, N, M]``; half precision is widened.
        epsilon: :math:`\varepsilon`, the weight of the entropy, in units of the cost; a smaller one gives a sharper
            plan and wants more iterations.
        iterations: How often rows and columns are scaled.
        rows: ``[*, N]`` booleans, True where a row counts; the others get no mass, whatever their cost.
        columns: ``[*, M]`` booleans, the same for columns.

    Returns:
        :math:`P`, ``[*, N, M]``, of total mass 1 (0 where no row or no column counts). Times ``n`` where both sides
        have ``n`` it is doubly stochastic.

    Raises:
        TensorError: The cost is no floating matrix, or a mask does not fit.
        ConfigError: ``epsilon`` or ``iterations`` not above zero.

    Source:
        Cuturi, "Sinkhorn Distances: Lightspeed Computation of Optimal Transport", 2013, arXiv 1306.0895.

    >>> sinkhorn(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    tensor([[4.9998e-01, 2.2699e-05],
            [2.2699e-05, 4.9998e-01]])
    """
    check_floating(cost, "cost", least=2)
    check_positive(epsilon, "epsilon")
    check_positive(iterations, "iterations")
    cost = widen(cost)
    log_a, counts = _log_marginal(cost.select(-1, 0), rows)
    if counts is not None:
        cost = cost.masked_fill(~counts.unsqueeze(-1), 0.0)
    log_b, counts = _log_marginal(cost.select(-2, 0), columns)
    if counts is not None:
        cost = cost.masked_fill(~counts.unsqueeze(-2), 0.0)

    log_kernel = -cost / epsilon
    f, g = log_a, log_b
    for _ in range(iterations):
        f = log_a - (log_kernel + g.unsqueeze(-2)).logsumexp(dim=-1)
        g = log_b - (log_kernel + f.unsqueeze(-1)).logsumexp(dim=-2)
    return (log_kernel + f.unsqueeze(-1) + g.unsqueeze(-2)).exp()


def _log_marginal(like: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Logarithms of equal shares for all that count, shaped as one row or column of the cost."""
    if counts is None:
        share = torch.full_like(like, 1.0 / max(like.shape[-1], 1))
        return share.log(), None
    counts = fit_mask(counts, like)
    share = counts / counts.sum(dim=-1, keepdim=True).clamp(min=1).to(like.dtype)
    return share.log().masked_fill(~counts, _NOTHING), counts

"""Divergences by name, where the choice among them is an option."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

from torch import Tensor

from limbeck.core.divergences import jensen_shannon_rows, kl_rows, log_mixture
from limbeck.core.errors import ConfigError, did_you_mean
from limbeck.core.reduction import check_inside

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation"]
Rows = Callable[[Tensor, Tensor], Tensor]


def rows_of(divergence: str, beta: float = 0.5, skew: float = 0.1) -> Rows:
    r"""The divergence of each row, from the teacher's and the student's log-probabilities ``[*, C]``.

    Args:
        divergence: ``"forward_kl"``, ``"reverse_kl"``, ``"jsd"``, ``"skew_kl"``, ``"skew_reverse_kl"`` or
            ``"total_variation"``.
        beta: The teacher's share of the mixture in ``"jsd"``.
        skew: The share of the first distribution in the skewed ones.

    Raises:
        ConfigError: No such divergence, or a share that is not between 0 and 1.

    >>> import torch
    >>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    >>> rows_of("reverse_kl")(p, q)
    tensor(0.3681)
    """
    if divergence not in get_args(Divergence):
        known = get_args(Divergence)
        raise ConfigError(
            "no such divergence",
            where="divergence",
            found=repr(divergence),
            wanted=", ".join(known),
            remedy=did_you_mean(str(divergence), known),
        )
    check_inside(beta, "beta", remedy="its limits are the divergences 'forward_kl' (0) and 'reverse_kl' (1)")
    check_inside(skew, "skew", remedy="without skew this is the divergence 'forward_kl' or 'reverse_kl'")
    rows: dict[str, Rows] = {
        "forward_kl": kl_rows,
        "reverse_kl": lambda p, q: kl_rows(q, p),
        "jsd": partial(jensen_shannon_rows, beta=beta),
        "skew_kl": lambda p, q: kl_rows(p, log_mixture(p, q, skew)),
        "skew_reverse_kl": lambda p, q: kl_rows(q, log_mixture(q, p, skew)),
        "total_variation": lambda p, q: 0.5 * (p.exp() - q.exp()).abs().sum(dim=-1),
    }
    return rows[divergence]

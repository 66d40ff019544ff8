"""The fused losses' definitions on full logits, in float64, for autograd to differentiate."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import limbeck.functional as LF
from limbeck.core.top_k import TopK

#: Name of a divergence, its options, and limbeck's loss on full logits with the same ones.
LOSSES: dict[str, tuple[dict[str, float], Callable[..., Tensor]]] = {
    "forward_kl": ({}, LF.kd_loss),
    "reverse_kl": ({}, LF.reverse_kl_loss),
    "jsd": ({"beta": 0.3}, lambda *a, **k: LF.jsd_loss(*a, beta=0.3, **k)),
    "skew_kl": ({"skew": 0.2}, lambda *a, **k: LF.skew_kl_loss(*a, skew=0.2, **k)),
    "skew_reverse_kl": ({"skew": 0.2}, lambda *a, **k: LF.skew_kl_loss(*a, skew=0.2, reverse=True, **k)),
    "total_variation": ({}, lambda s, t, temperature, **k: temperature**2 * LF.total_variation_loss(
        s / temperature, t / temperature, **k)),
}  # fmt: skip


def xlog(x: Tensor, y: Tensor) -> Tensor:
    """x log y, and 0 where x is 0."""
    return torch.where(x == 0, 0.0, x * torch.where(x == 0, 1.0, y).log())


def kl(x: Tensor, y: Tensor) -> Tensor:
    return (xlog(x, x) - xlog(x, y)).sum(-1)


#: From probabilities of the teacher, p, and of the student, q, with the options above.
FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "jsd": lambda p, q: 0.3 * kl(p, 0.3 * p + 0.7 * q) + 0.7 * kl(q, 0.3 * p + 0.7 * q),
    "skew_kl": lambda p, q: kl(p, 0.2 * p + 0.8 * q),
    "skew_reverse_kl": lambda p, q: kl(q, 0.2 * q + 0.8 * p),
    "total_variation": lambda p, q: 0.5 * (p - q).abs().sum(-1),
}
OPTIONS = {name: options for name, (options, _) in LOSSES.items()}


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return hidden @ weight.t() if bias is None else hidden @ weight.t() + bias


def padded(values: Tensor, classes: int) -> Tensor:
    """With logits of minus infinity up to so many classes."""
    return torch.nn.functional.pad(values, (0, classes - values.shape[-1]), value=-math.inf)


def bucketed(probabilities: Tensor, ids: Tensor) -> Tensor:
    """Probabilities ``[N, k + 1]`` of some classes and of all others together."""
    others = torch.ones_like(probabilities).scatter(-1, ids, 0.0)
    return torch.cat([probabilities.gather(-1, ids), (probabilities * others).sum(-1, keepdim=True)], dim=-1)


def sparse_loss(name: str, student: Tensor, top: TopK, temperature: float, mask: Tensor | None) -> Tensor:
    """Mean over counted places of a divergence over buckets; ``student``: logits of the classes that are possible."""
    p = torch.cat([top.log_probs, top.log_tail.unsqueeze(-1)], dim=-1).exp()
    values = FORMULAS[name](p, bucketed((student / temperature).softmax(-1), top.ids))
    values = values if mask is None else values[mask]
    return temperature**2 * values.sum() / max(len(values), 1)

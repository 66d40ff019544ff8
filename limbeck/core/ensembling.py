"""What several models say together: their mean, and how much each counts for each place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from limbeck.core.divergences import cross_entropy_rows, soften
from limbeck.core.errors import TensorError
from limbeck.core.labels import soft_labels
from limbeck.core.reduction import check_floating, widen


def stacked(logits: Sequence[Tensor]) -> Tensor:
    """Logits of several models ``[K, B, *, C]``, from each one's ``[B, *, C]``.

    Raises:
        TensorError: They are of different shapes, or there are none.
    """
    for number, one in enumerate(logits):
        check_floating(one, f"teacher_logits[{number}]", least=2)
        if one.shape != logits[0].shape:
            raise TensorError(
                "these models do not answer the same question",
                where=f"teacher_logits[{number}]",
                found=list(one.shape),
                wanted=f"{list(logits[0].shape)} as the first",
            )
    if not logits:
        raise TensorError("there are no logits to combine", where="teacher_logits", found="none", wanted="one or more")
    return torch.stack([widen(one) for one in logits])


def mixed_logits(logits: Tensor, weights: Tensor, *, of: str = "probabilities", temperature: float = 1.0) -> Tensor:
    r"""Logits of the weighted mean of several predictions.

    .. math:: z = T \log \sum_k w_k\, \mathrm{softmax}(z_k / T) \quad \text{or} \quad z = \sum_k w_k z_k

    Softened with T, the first gives the mean of the softened probabilities; a class that all rule out stays ruled out.

    Args:
        logits: ``[K, B, *, C]``.
        weights: ``[K]``, or ``[K, B, *]`` of each place; they sum to one over K.
        of: ``"probabilities"`` or ``"logits"``.
        temperature: T, of probabilities.

    >>> two = torch.tensor([[[4.0, 0.0]], [[0.0, 0.0]]])
    >>> half = torch.tensor([0.5, 0.5])
    >>> mixed_logits(two, half).softmax(-1), mixed_logits(two, half, of="logits").softmax(-1)
    (tensor([[0.7410, 0.2590]]), tensor([[0.8808, 0.1192]]))
    """
    shape = weights.shape + (1,) * (logits.ndim - weights.ndim)
    weights = weights.to(logits.dtype).reshape(shape)
    if of == "logits":
        return (weights * logits).masked_fill(weights == 0, 0.0).sum(dim=0)
    return temperature * (soften(logits, temperature) + weights.log()).logsumexp(dim=0)


def confidence_weights(logits: Tensor, labels: Tensor) -> Tensor:
    r"""How much each of several models counts for each place, by how near it is to the label.

    .. math:: w_k = \frac{1}{K - 1} \left( 1 - \frac{e^{H_k}}{\sum_j e^{H_j}} \right), \qquad H_k = CE(p_k, y)

    Places without a label trust all alike; one model alone has weight one.

    Args:
        logits: ``[K, B, *, C]``.
        labels: ``[B, *]`` integers (negative: none), or ``[B, *, C]`` shares of one.

    Returns:
        ``[K, B, *]``; the sum over K is one.

    Source: Confidence-Aware Multi-Teacher Knowledge Distillation, arXiv 2201.00007.

    >>> confidence_weights(torch.tensor([[[9.0, 0.0]], [[0.0, 0.0]]]), torch.tensor([0]))
    tensor([[0.6666],
            [0.3334]])
    """
    wanted = logits.shape[1:] if labels.is_floating_point() else logits.shape[1:-1]
    if labels.shape != wanted:
        raise TensorError(
            "labels do not belong to these logits", where="labels", found=list(labels.shape), wanted=wanted
        )
    target = soft_labels(labels, logits.shape[-1]).to(logits.dtype)
    return _less_of(cross_entropy_rows(target, soften(logits)).softmax(dim=0))


def entropy_weights(logits: Tensor) -> Tensor:
    r"""How much each of several models counts for each place, by how sure it is; needs no labels.

    .. math:: w_k = \frac{1}{K - 1} \left( 1 - \frac{H_k}{\sum_j H_j} \right), \qquad H_k = -\sum_c p_{kc} \log p_{kc}

    Args:
        logits: ``[K, B, *, C]``.

    Returns:
        ``[K, B, *]``; the sum over K is one.

    Source: Kwon et al., "Adaptive knowledge distillation based on entropy", ICASSP 2020 (EBKD).

    >>> entropy_weights(torch.tensor([[[9.0, 0.0]], [[0.0, 0.0]]])).flatten()
    tensor([0.9982, 0.0018])
    """
    log_p = soften(logits)
    entropy = cross_entropy_rows(log_p.exp(), log_p)
    total = entropy.sum(dim=0)
    share = torch.where(total > 0, entropy / total.clamp(min=torch.finfo(entropy.dtype).tiny), 1 / len(logits))
    return _less_of(share)


def _less_of(shares: Tensor) -> Tensor:
    """Weights that are small where shares are large, ``[K, *]``; both sum to one over K."""
    return torch.ones_like(shares) if len(shares) == 1 else (1 - shares) / (len(shares) - 1)

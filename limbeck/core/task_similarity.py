"""How well a model's features fit another task, told from a few labelled samples without any training."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.errors import TensorError
from limbeck.core.reduction import check_positive, widen
from limbeck.core.relations import pearson, unit


def ranks(values: Tensor) -> Tensor:
    """The place of each number ``[N]`` in order, from 0; equal ones share the mean of their places.

    >>> ranks(torch.tensor([5.0, 1.0, 5.0, 0.0])).tolist()
    [2.5, 1.0, 2.5, 0.0]
    """
    _, own, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0) - 1
    return (last.double() - (counts - 1) / 2)[own]


def parc(features: Tensor, labels: Tensor, reduce: int | None = None) -> Tensor:
    r"""PARC: do pairs of samples that features hold apart have other labels? From -100 to 100.

    .. math:: 100 \cdot \mathrm{Spearman}(1 - \mathrm{corr}(\Phi),\ 1 - \mathrm{corr}(Y)) \quad
        \text{of the entries below the diagonals}

    Args:
        features: :math:`\Phi`, ``[n, D]``.
        labels: ``[n]`` classes; Y holds them as one-hot rows.
        reduce: So many principal components of the features are looked at; ``None``: all that there is.

    Raises:
        TensorError: Fewer than three samples, or labels of others.

    Source: Bolya et al., Scalable Diverse Model Selection for Accessible Transfer Learning, 2021, arXiv 2111.06977.

    >>> labels = torch.tensor([0, 0, 1, 1, 2])
    >>> parc(torch.eye(3)[labels], labels)
    tensor(100.)
    """
    _check(features, labels, 3)
    x = widen(features).double().flatten(1)
    if reduce is not None:
        check_positive(reduce, "reduce")
        centred = x - x.mean(dim=0)
        u, s, v = torch.linalg.svd(centred, full_matrices=False)
        # A component's sign is anybody's choice, and correlations of rows depend on it: its largest loading is above 0.
        signs = v.gather(1, v.abs().argmax(dim=1, keepdim=True)).squeeze(1).sign()
        x = (u * s * signs)[:, :reduce]
    y = torch.nn.functional.one_hot(labels.unique(return_inverse=True)[1]).double()
    below = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).tril(-1)
    first, second = (1 - _correlations(z)[below] for z in (x, y))
    # Equal up to rounding is equal: else ties would be broken by noise.
    return (100 * pearson(ranks(first.mul(1e9).round()), ranks(second.mul(1e9).round()))).float()


def nearest_neighbours(features: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """How often the k nearest others of a sample (by the angle of features) are most of its class, from 0 to 100.

    Args:
        features: ``[n, D]``.
        labels: ``[n]`` classes.
        k: How many.

    >>> nearest_neighbours(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), torch.tensor([0, 0, 1]))
    tensor(66.6667)
    """
    _check(features, labels, 2)
    x = unit(widen(features).flatten(1))
    near = (x @ x.T).fill_diagonal_(-torch.inf).topk(min(k, len(x) - 1), dim=1).indices
    votes = torch.nn.functional.one_hot(labels)[near].sum(dim=1)
    return 100 * (votes.argmax(dim=1) == labels).float().mean()


def source_weights(scores: Tensor, power: float, norm: str = "clip", keep: int | None = None) -> Tensor:
    r"""How much each of several sources counts, :math:`w_s = g(e_s)^p / \sum_j g(e_j)^p`.

    Args:
        scores: :math:`e`, ``[S]``.
        power: p: 0 weighs all alike, and the larger, the more the best counts.
        norm: g: ``"clip"``, nothing below 0; ``"minmax"``, the worst is 0 and the best 1. Where nothing is above 0 all
            count alike.
        keep: Only so many of the best.

    >>> source_weights(torch.tensor([20.0, 10.0, -5.0]), 2.0)
    tensor([0.8000, 0.2000, 0.0000])
    """
    scores = scores.double()
    if norm == "minmax":
        scores = (scores - scores.min()) / (scores.max() - scores.min()).clamp(min=torch.finfo(scores.dtype).tiny)
    scores = scores.clamp(min=0.0)
    scores = torch.ones_like(scores) if not bool(scores.any()) else scores / scores.max()
    found = scores**power
    if keep is not None:
        best = found.new_zeros(len(found)).scatter(0, scores.topk(min(keep, len(scores))).indices, 1.0)
        found = found * best
    return (found / found.sum()).float()


def _correlations(rows: Tensor) -> Tensor:
    """Of every two rows; 0 with one that does not vary."""
    centred = unit(rows - rows.mean(dim=1, keepdim=True))
    return centred @ centred.T


def _check(features: Tensor, labels: Tensor, least: int) -> None:
    if len(features) < least or labels.shape != features.shape[:1] or labels.is_floating_point():
        raise TensorError(
            "similarity of tasks is told from features and classes of the same samples",
            where="features",
            found=f"{list(features.shape)} with labels {list(labels.shape)} {labels.dtype}",
            wanted=f"[n, D] and [n] integers, {least} samples or more",
        )

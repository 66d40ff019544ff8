"""Whether a model is as sure as it is right: reliability bins, calibration error, likelihood, Brier score."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.errors import ConfigError, DataError
from limbeck.core.labels import split_labels
from limbeck.core.reduction import check_logits, widen


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Mean negative log-likelihood of the labels, in nats.

    .. math:: -\frac 1 n \sum_i \log p_i[y_i]

    Args:
        logits: ``[n, C]``.
        labels: ``[n]`` integers.

    Raises:
        TensorError: Shapes or dtypes do not fit, or a label names no class.

    >>> nll(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    tensor(0.6931)
    """
    check_logits(logits, labels=labels)
    return F.cross_entropy(widen(logits), split_labels(labels, logits.shape[-1])[0])


def brier(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Mean squared distance of the predicted probabilities from the labels; between 0 and 2.

    .. math:: \frac 1 n \sum_i \sum_c (p_i[c] - [c = y_i])^2

    Args:
        logits: ``[n, C]``.
        labels: ``[n]`` integers.

    Raises:
        TensorError: Shapes or dtypes do not fit, or a label names no class.

    Source: Brier, Verification of forecasts expressed in terms of probability, 1950.

    >>> brier(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    tensor(0.5000)
    """
    check_logits(logits, labels=labels)
    probabilities = widen(logits).softmax(-1)
    chosen = probabilities.gather(-1, split_labels(labels, logits.shape[-1])[0].unsqueeze(-1)).squeeze(-1)
    return (probabilities.square().sum(-1) - 2 * chosen + 1).mean()


class Calibration:
    r"""Reliability bins over a whole data set, batch by batch, and what follows from them.

    Places are sorted into bins of equal width by the probability of the class named first.

    .. math:: \mathrm{ECE} = \sum_b \frac{n_b}{n} \left| \mathrm{acc}_b - \mathrm{conf}_b \right|

    Only the bins are kept, not the places: torchmetrics' calibration error keeps every confidence, which a language
    model's tokens would not allow, and gives no bins to draw. A test holds the two equal.

    Args:
        bins: How many. Default 15, as in Guo et al.

    Raises:
        ConfigError: Fewer than one bin.

    Source: Guo et al., On Calibration of Modern Neural Networks, 2017, arXiv 1706.04599.

    Example:
        >>> calibration = Calibration(bins=2)
        >>> calibration.update(torch.tensor([[9.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 1]))
        >>> round(calibration.compute()["ece"], 2)  # sure of both, right in one
        0.5
    """

    def __init__(self, bins: int = 15) -> None:
        if bins < 1:
            raise ConfigError("at least one bin is needed", where="bins", found=bins)
        self._edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
        self._bins = torch.zeros(3, bins, dtype=torch.float64)  # places, right ones, sum of confidences
        self._sums = {"nll": 0.0, "brier": 0.0}

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add places: logits ``[n, C]`` and integer labels ``[n]``; none is allowed."""
        check_logits(logits, labels=labels)
        if not len(labels):
            return
        confidence, named = widen(logits).softmax(-1).max(-1)
        confidence, right = confidence.cpu().double(), (named == labels).cpu().double()
        place = (torch.bucketize(confidence, self._edges, right=True) - 1).clamp(max=self._bins.shape[1] - 1)
        values = torch.stack([torch.ones_like(confidence), right, confidence])
        self._bins.index_add_(1, place, values)
        self._sums["nll"] += float(nll(logits, labels)) * len(labels)
        self._sums["brier"] += float(brier(logits, labels)) * len(labels)

    def compute(self) -> dict[str, Any]:
        """``accuracy``, ``nll``, ``brier``, ``ece``, ``reliability`` (edges; by bin count, accuracy and confidence)."""
        count, right, confidence = self._bins
        total = float(count.sum())
        if not total:
            raise DataError("no labelled place was added", where="calibration")
        return {
            "accuracy": float(right.sum()) / total,
            **{name: value / total for name, value in self._sums.items()},
            "ece": float((right - confidence).abs().sum()) / total,
            "reliability": {
                "edges": self._edges.tolist(),
                "count": [int(n) for n in count.tolist()],
                "accuracy": _means(right, count),
                "confidence": _means(confidence, count),
            },
        }


def _means(sums: Tensor, count: Tensor) -> list[float | None]:
    return [s / n if n else None for s, n in zip(sums.tolist(), count.tolist(), strict=True)]

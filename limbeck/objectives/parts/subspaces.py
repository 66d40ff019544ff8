"""Directions in which a teacher's feature varies within a class, told from its answers over the training set."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.errors import ConfigError
from limbeck.core.objective import DataInfo
from limbeck.core.precision import without_autocast
from limbeck.core.reduction import check_floating, fit_mask, widen

_LEAST = 1e-6  # of the largest standard deviation: what varies less is rounding


def class_directions(features: Tensor, classes: Tensor, weight: Tensor, number: int) -> tuple[Tensor, Tensor]:
    r"""By class, the principal directions of what the classifier does not see of a feature.

    .. math:: a_{c,s}(h) = \frac{v_{c,s}^\top (P h - \mu_c)}{\sigma_{c,s}} = d_{c,s}^\top h - o_{c,s}, \qquad
        P = I - W^+ W

    :math:`v, \sigma, \mu` are those of a principal component analysis of :math:`P h` over each class; a direction
    points to where the class has its longer tail. A direction in which a class does not vary gives scores of 0.

    Args:
        features: ``[N, D]``.
        classes: ``[N]``, the class each is counted to.
        weight: :math:`W`, ``[C, D]``.
        number: Directions of a class.

    Returns:
        :math:`d`, ``[C, number, D]``, and :math:`o`, ``[C, number]``.
    """
    _, sizes, seen = torch.linalg.svd(weight.double(), full_matrices=False)
    seen = seen[sizes > 1e-6 * sizes[0]]
    free = features.shape[1] - len(seen)
    if number > free:
        raise ConfigError(
            "the teacher's feature has fewer directions that its classifier does not see",
            where="subclasses",
            found=2 * number,
            wanted=f"at most {max(2 * free, 1)}",
        )
    found = [_principal(features[classes == c].double(), seen, number) for c in range(len(weight))]
    directions, offsets = (torch.stack(part).float() for part in zip(*found, strict=True))
    return directions, offsets


def _principal(features: Tensor, seen: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """One class's directions, divided by their standard deviations, and its mean along them."""
    hidden = features - features @ seen.mT @ seen
    mean = hidden.sum(dim=0) / max(len(hidden), 1)
    variances, vectors = torch.linalg.eigh((hidden - mean).mT @ (hidden - mean) / max(len(hidden), 1))
    spread, vectors = variances.flip(0)[:number].clamp(min=0).sqrt(), vectors.mT.flip(0)[:number]
    tail = ((hidden - mean) @ vectors.mT).pow(3).sum(dim=0)
    vectors = torch.where(tail < 0, -1.0, 1.0).unsqueeze(1) * (vectors - vectors @ seen.mT @ seen)
    flat = spread <= _LEAST * features.abs().amax() if len(features) else torch.ones_like(spread, dtype=torch.bool)
    directions = (vectors / spread.masked_fill(flat, 1.0).unsqueeze(1)).masked_fill(flat.unsqueeze(1), 0.0)
    return directions, directions @ mean


@without_autocast
def class_scores(feature: Tensor, directions: Tensor, offsets: Tensor) -> Tensor:
    """Where features lie along each direction of each class: ``[B, *, D]`` to ``[B, *, C, S]``.

    >>> class_scores(torch.tensor([[3.0, 1.0]]), torch.tensor([[[1.0, 0.0]]]), torch.tensor([[1.0]]))
    tensor([[[2.]]])
    """
    check_floating(feature, "teacher_feature", least=2)
    return torch.einsum("...d,csd->...cs", widen(feature).to(directions.dtype), directions) - offsets


def features_by_class(
    data: DataInfo, classes: int, where: str, *, tap: str = "penultimate", most: int = 50_000
) -> tuple[Tensor, Tensor]:
    """The teacher's features of the training set, ``[N, D]``, and the classes it tells, ``[N]``.

    Args:
        data: With the teacher's answers.
        classes: How many.
        where: Who asks, for the error.
        tap: The feature, among the teacher's taps.
        most: Of each class so many at most, the first.

    Raises:
        ConfigError: The training set is not at hand.
    """
    features, told = [], []
    count = torch.zeros(classes, dtype=torch.long)
    for trace, batch in data.all_answers(where):
        feature, said = trace[tap], trace.logits.argmax(dim=-1)
        if batch.mask is not None:
            counted = fit_mask(batch.mask, said)
            feature, said = feature[counted], said[counted]
        feature, said = feature.flatten(0, -2), said.flatten()
        which = torch.nn.functional.one_hot(said, classes)
        count = count.to(which.device)
        before = (which.cumsum(dim=0) + count).gather(1, said.unsqueeze(1)).squeeze(1)
        features.append(feature[before <= most].detach().float())
        told.append(said[before <= most])
        count = count + which.sum(dim=0)
    return torch.cat(features), torch.cat(told)

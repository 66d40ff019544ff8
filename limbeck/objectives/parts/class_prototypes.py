"""Prototypes of classes: where the features of each lie, as last seen; drawn together, and asked for labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.core.errors import TensorError
from limbeck.core.ranks import sum_over_ranks
from limbeck.core.reduction import check_positive, widen
from limbeck.core.relations import unit


class ClassPrototypes(nn.Module):
    r"""A direction for each class, folded in batch by batch: :math:`c \leftarrow m c + (1 - m) \bar h`, length 1.

    A class that a batch does not have keeps what it has; one that is seen for the first time takes the batch's mean. A
    batch is that of all ranks.

    Args:
        classes: How many.
        dim: Width of the features.
        momentum: :math:`m`.

    >>> found = ClassPrototypes(2, 3)
    >>> found.keep(found.folded(torch.eye(3)[:1], torch.tensor([1])))
    >>> found.value.tolist(), found.seen.tolist()
    ([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], [False, True])
    """

    value: Tensor
    seen: Tensor

    def __init__(self, classes: int, dim: int, momentum: float = 0.95) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(classes, dim))
        self.register_buffer("seen", torch.zeros(classes, dtype=torch.bool))

    def folded(self, features: Tensor, labels: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The prototypes with a batch folded in, with its gradient, and which classes have one now.

        Args:
            features: ``[N, D]``.
            labels: ``[N]`` integers.
            weights: ``[N]``, what each counts in its class's mean; ``None``: all the same.
        """
        features = widen(features).to(self.value.dtype)
        weights = features.new_ones(len(labels)) if weights is None else weights.to(features.dtype)
        rows = torch.cat([features * weights.unsqueeze(1), weights.unsqueeze(1)], dim=1)
        found = sum_over_ranks(rows.new_zeros(len(self.value), rows.shape[1]).index_add(0, labels, rows))
        sums, count = found[:, :-1], found[:, -1]
        here = count > 0
        mean = unit(sums / count.clamp(min=torch.finfo(count.dtype).tiny).unsqueeze(1))
        old, seen = self.value.clone(), self.seen.clone()  # the backward pass reads them when they have moved on
        mixed = torch.where(seen.unsqueeze(1), unit(self.momentum * old + (1 - self.momentum) * mean), mean)
        return torch.where(here.unsqueeze(1), mixed, old), here | seen

    @torch.no_grad()
    def keep(self, folded: tuple[Tensor, Tensor]) -> None:
        """Go on with what :meth:`folded` gave."""
        value, seen = folded
        self.value.copy_(value.detach())
        self.seen.copy_(seen)


def alignment(first: Tensor, second: Tensor, known: Tensor | None = None, *, temperature: float = 0.1) -> Tensor:
    r"""Contrastive alignment of two sets of prototypes: the same class attracts, others repel, within a set and across.

    .. math:: -\frac 1 C \sum_k \log \frac{e^{a_k b_k / \tau}}
        {e^{a_k b_k / \tau} + \sum_{j \ne k} \left( e^{a_k b_j / \tau} + e^{a_k a_j / \tau} \right)}
        \ + \ \text{the same with } a \text{ and } b \text{ exchanged}

    Args:
        first, second: :math:`a, b`, ``[C, D]`` of length 1.
        known: ``[C]`` booleans, the classes that both have; ``None``: all.
        temperature: :math:`\tau`.

    >>> alignment(torch.eye(3), torch.eye(3)) < alignment(torch.eye(3), torch.eye(3)[[1, 2, 0]])
    tensor(True)
    """
    check_positive(temperature, "temperature")
    if first.shape != second.shape or first.ndim != 2:
        raise TensorError("these are no prototypes of the same classes", where="second", found=list(second.shape))
    known = torch.ones(len(first), dtype=torch.bool, device=first.device) if known is None else known
    same = torch.eye(len(first), dtype=torch.bool, device=first.device)
    total = first.new_zeros(())
    for a, b in ((first, second), (second, first)):
        across, within = a @ b.T / temperature, a @ a.T / temperature
        rivals = torch.cat([across, within.masked_fill(same, -torch.inf)], dim=1)
        rivals = rivals.masked_fill(~known.repeat(2), -torch.inf)
        values = torch.where(known, rivals.where(known.unsqueeze(1), 0.0).logsumexp(dim=1) - across.diagonal(), 0.0)
        total = total + values.sum() / known.sum().clamp(min=1)
    return total


def likely(features: Tensor, prototypes: Tensor, seen: Tensor, *, temperature: float = 0.1) -> Tensor:
    r"""How likely each class is by the distance from its prototype, :math:`\mathrm{softmax}_k(-\|h - c_k\|^2 / \tau)`.

    Args:
        features: ``[N, D]``; scaled to length 1, as prototypes are.
        prototypes: ``[C, D]``.
        seen: ``[C]`` booleans; a class without a prototype has 0. Where no class has one, all are as likely.
        temperature: :math:`\tau`.

    >>> likely(torch.tensor([[5.0, 0.0]]), torch.eye(2), torch.tensor([True, True]))
    tensor([[1.0000e+00, 2.0612e-09]])
    """
    check_positive(temperature, "temperature")
    apart = torch.cdist(unit(widen(features)).to(prototypes.dtype), prototypes).square()
    scores = (-apart / temperature).masked_fill(~(seen | ~seen.any()), -torch.inf)
    return torch.where(seen.any(), scores, torch.zeros_like(scores)).softmax(dim=1)

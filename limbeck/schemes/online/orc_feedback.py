"""What a group of students gets wrong, of a batch that several processes may share."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.ranks import Rows


def feedback_rows(losses: Tensor) -> Tensor:
    r"""The samples that students get wrong, as many as there are, each student's share by how badly it does.

    .. math:: n_k = B\, \mathrm{softmax}_k(\bar \ell_1, \dots, \bar \ell_K), \qquad \text{of each } k \text{ the }
        n_k \text{ samples with the largest } \ell_{k, i}

    A sample that several students get wrong comes several times.

    Args:
        losses: ``[K, B]``, of each student on each sample.

    Returns:
        ``[B]`` rows of the batch: the first student's, then the second's, ...

    Source: ORC: Network Group-based Knowledge Distillation using Online Role Change, arXiv 2206.01186.

    >>> feedback_rows(torch.tensor([[0.0, 3.0, 2.0, 1.0], [1.0, 0.0, 2.0, 3.0]]))
    tensor([1, 2, 3, 2])
    """
    size = losses.shape[1]
    ends = (losses.mean(dim=1).softmax(dim=0).cumsum(dim=0) * size).round().long()
    ends[-1] = size
    places = torch.arange(size, device=losses.device)
    owner = torch.searchsorted(ends, places, right=True)
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])
    return losses.argsort(dim=1, descending=True, stable=True)[owner, places - begins[owner]]


def both_labels(
    part: Rows, rows: Tensor, labels: Tensor, mask: Tensor | None = None
) -> list[tuple[Tensor, Tensor | None, Tensor]]:
    """The labels of this process's samples, and of those that are mixed into them.

    Args:
        part: Which rows of the batch are this process's.
        rows: ``[B]`` over all processes: which sample is mixed into each.
        labels: This process's, ``[b]`` integers or ``[b, C]`` soft.
        mask: ``[b]``, True where a sample counts.

    Returns:
        Twice labels, mask, and what turns the sum of losses into this process's part of the mean over the whole batch.

    >>> own, other = both_labels(Rows((3,)), torch.tensor([2, 2, 0]), torch.tensor([5, -1, 7]))
    >>> own[0].tolist(), other[0].tolist(), float(own[2]), round(float(other[2]), 4)
    ([5, -1, 7], [7, 7, 5], 0.5, 0.3333)
    """
    known = part.gather(labels)
    counts = torch.ones_like(known[:, 0], dtype=torch.bool) if known.is_floating_point() else known >= 0
    shown = None if mask is None else part.gather(mask.long()).bool()
    counts = counts if shown is None else counts & shown
    found = []
    for taken in (torch.arange(part.whole, device=rows.device), rows):
        own, number = taken[part.own], counts[taken].sum().clamp(min=1)
        found.append((known[own], None if shown is None else shown[own], len(part.sizes) / number))
    return found

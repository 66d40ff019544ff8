"""Contrasts of embeddings of one batch by who belongs to whom."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.precision import without_autocast
from limbeck.core.reduction import widen


@without_autocast
def supervised_contrast(embeddings: Tensor, groups: Tensor, temperature: float = 0.1) -> Tensor:
    r"""Each embedding is to be told from all others but those of its own group.

    .. math:: L = -\frac 1 n \sum_i \frac{1}{|P(i)|} \sum_{p \in P(i)}
        \log \frac{e^{h_i \cdot h_p / \tau}}{\sum_{a \ne i} e^{h_i \cdot h_a / \tau}}

    :math:`P(i)` are the others of i's group, n those that have some. 0 where nobody has, or all are of one group.

    Args:
        embeddings: ``[B, D]``; scaled to length 1 here.
        groups: ``[B]`` integers.
        temperature: :math:`\tau`.

    Source: Khosla et al., "Supervised Contrastive Learning", 2020, arXiv 2004.11362, equation 2.

    >>> supervised_contrast(torch.eye(4)[[0, 0, 1, 1]], torch.tensor([0, 0, 1, 1]), 1.0)
    tensor(0.5514)
    """
    rows = F.normalize(widen(embeddings), dim=1)
    itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    logs = (rows @ rows.T / temperature).masked_fill(itself, -torch.inf).log_softmax(dim=1)
    alike = groups.unsqueeze(0) == groups.unsqueeze(1)
    own = (alike & ~itself).to(rows.dtype)
    count = own.sum(dim=1)
    values = -(own * logs.masked_fill(itself, 0.0)).sum(dim=1) / count.clamp(min=1)
    return values.sum() / (count > 0).sum().clamp(min=1) * (~alike).any()


def paired_contrast(first: Tensor, second: Tensor, temperature: float = 0.3) -> Tensor:
    """NT-Xent of two views of each sample: :func:`supervised_contrast` with groups of two, over all ``2 B`` of them.

    >>> paired_contrast(torch.eye(2), torch.eye(2), 1.0)
    tensor(0.5514)
    """
    groups = torch.arange(len(first), device=first.device).repeat(2)
    return supervised_contrast(torch.cat([first, second]), groups, temperature)

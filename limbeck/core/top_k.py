"""The most probable classes of a prediction and how much is left for all others: what a sparse teacher says."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import ConfigError
from limbeck.core.reduction import check_floating, widen


class TopK(NamedTuple):
    r"""Log-probabilities of k classes and of the tail, :math:`1 - \sum_k p_k`, spread over the other C - k.

    Args:
        ids: ``[*, k]`` integers, each row's distinct classes in ascending order.
        log_probs: ``[*, k]`` their log-probabilities.
        log_tail: ``[*]`` log of the probability of all other classes together; minus infinity where k is C.
        classes: C.
    """

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor
    classes: int

    @classmethod
    def of(cls, logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
        r"""The k most probable classes of logits ``[*, C]``, softened by a temperature.

        Which of several equal logits at the border are kept is for :func:`torch.topk` to say; :func:`top_ids` keeps the
        lowest ids.

        Raises:
            ConfigError: ``k`` is not within 1 and C.

        >>> TopK.of(torch.tensor([3.0, 0.0, 1.0, 0.0]).log_softmax(0), 2).ids
        tensor([0, 2])
        """
        check_floating(logits, "logits")
        check_k(k, logits.shape[-1])
        return cls.at(logits, logits.topk(k, dim=-1).indices.sort(dim=-1).values, temperature)

    @classmethod
    def at(cls, logits: Tensor, ids: Tensor, temperature: float = 1.0) -> TopK:
        r"""The same form with chosen classes: logits ``[*, C]`` at ids ``[*, k]``, softened by a temperature.

        The tail is summed over the classes that are left out, not taken as :math:`1 - \sum p`, which has no digits
        left where the tail is small.

        >>> TopK.at(torch.zeros(4), torch.tensor([1, 3])).log_tail.exp()
        tensor(0.5000)
        """
        log_p = F.log_softmax(widen(logits) / temperature, dim=-1)
        tail = log_p.scatter(-1, ids, -math.inf).logsumexp(dim=-1)
        return cls(ids, log_p.gather(-1, ids), tail, logits.shape[-1])

    def softened(self, temperature: float) -> TopK:
        """What the prediction becomes at a temperature if the tail is spread evenly; k and the ids stay.

        >>> TopK.of(torch.tensor([4.0, 0.0, 0.0, 0.0]), 1).softened(2.0).dense()
        tensor([-0.3408, -2.3408, -2.3408, -2.3408])
        """
        others = self.classes - self.ids.shape[-1]
        log_others = math.log(others) if others else 0.0
        tail = (self.log_tail - log_others) / temperature + log_others
        rows = torch.cat([self.log_probs / temperature, tail.unsqueeze(-1)], dim=-1).log_softmax(dim=-1)
        return TopK(self.ids, rows[..., :-1], rows[..., -1], self.classes)

    def buckets(self) -> Tensor:
        """Log-probabilities ``[*, k + 1]`` of the k classes and of all others as one; ``[*, k]`` where k is C.

        >>> TopK.of(torch.tensor([3.0, 0.0, 1.0, 0.0]), 2).buckets().exp().sum()
        tensor(1.)
        """
        if self.ids.shape[-1] == self.classes:
            return self.log_probs
        return torch.cat([self.log_probs, self.log_tail.unsqueeze(-1)], dim=-1)

    def dense(self) -> Tensor:
        """Log-probabilities ``[*, C]``, the tail spread evenly over the classes that were left out.

        >>> TopK.of(torch.tensor([3.0, 0.0, 1.0, 0.0]), 2).dense().exp().sum().round(decimals=4)
        tensor(1.)
        """
        others = self.classes - self.ids.shape[-1]
        each = self.log_tail - math.log(others) if others else torch.full_like(self.log_tail, -math.inf)
        rows = each.unsqueeze(-1).expand(*each.shape, self.classes)
        return rows.scatter(-1, self.ids, self.log_probs)


def check_k(k: int, classes: int) -> None:
    """Refuse to keep more classes than there are, or none."""
    if not 1 <= k <= classes:
        raise ConfigError("more classes than there are, or none", where="k", found=k, wanted=f"1 to {classes}")


def top_ids(values: Tensor, k: int) -> Tensor:
    """Ids ``[P, k]`` of the k largest values of each row ``[P, C]``, ascending; of equal values those with lowest ids.

    So a row's ids depend on nothing but the row: not on its batch, nor on the device. Values must not be NaN.

    Raises:
        ConfigError: ``k`` is not within 1 and C.

    >>> top_ids(torch.tensor([[0.0, 2.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]), 2)
    tensor([[0, 1],
            [0, 1]])
    """
    classes = values.shape[-1]
    check_k(k, classes)
    if k == classes:
        return torch.arange(k, device=values.device).repeat(len(values), 1)
    found = values.topk(k + 1, dim=-1)  # one more, which tells whether the k-th has an equal outside
    ids = found.indices[:, :k].sort(dim=-1).values
    unsettled = (found.values[:, k - 1] == found.values[:, k]).nonzero().squeeze(1)
    if len(unsettled):
        ids[unsettled] = _first_of_equals(values[unsettled], found.values[unsettled, k - 1], k)
    return ids


def _first_of_equals(values: Tensor, least: Tensor, k: int) -> Tensor:
    """Ids of all values above each row's ``least [P]``, and of as many equal to it, from the left, as make k."""
    row, ids = (values >= least.unsqueeze(1)).nonzero(as_tuple=True)  # in the order of rows, then ids
    equal = values[row, ids] == least[row]
    equals = torch.bincount(row[equal], minlength=len(values))
    room = k - torch.bincount(row[~equal], minlength=len(values))
    place = equal.cumsum(0) - (equals.cumsum(0) - equals)[row]  # 1 for a row's first equal
    return ids[~equal | (place <= room[row])].view(-1, k)

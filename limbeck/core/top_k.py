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

        The tail is summed over the classes that are left out, not taken as :math:`1 - \sum p`, which has no digits
        left where the tail is small.

        Raises:
            ConfigError: ``k`` is not within 1 and C.

        >>> TopK.of(torch.tensor([3.0, 0.0, 1.0, 0.0]).log_softmax(0), 2).ids
        tensor([0, 2])
        """
        check_floating(logits, "logits")
        classes = logits.shape[-1]
        if not 1 <= k <= classes:
            raise ConfigError("more classes than there are, or none", where="k", found=k, wanted=f"1 to {classes}")
        log_p = F.log_softmax(widen(logits) / temperature, dim=-1)
        ids = log_p.topk(k, dim=-1).indices.sort(dim=-1).values
        tail = log_p.scatter(-1, ids, -math.inf).logsumexp(dim=-1)
        return cls(ids, log_p.gather(-1, ids), tail, classes)

    def dense(self) -> Tensor:
        """Log-probabilities ``[*, C]``, the tail spread evenly over the classes that were left out.

        >>> TopK.of(torch.tensor([3.0, 0.0, 1.0, 0.0]), 2).dense().exp().sum().round(decimals=4)
        tensor(1.)
        """
        others = self.classes - self.ids.shape[-1]
        each = self.log_tail - math.log(others) if others else torch.full_like(self.log_tail, -math.inf)
        rows = each.unsqueeze(-1).expand(*each.shape, self.classes)
        return rows.scatter(-1, self.ids, self.log_probs)

"""What an objective that remembers has to agree on with the other processes of a run."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a detached number over all processes, the same on each; the number itself where there is one process.

    All processes have to call it equally often, as they do in a forward.

    >>> mean_over_ranks(torch.tensor(2.0))
    tensor(2.)
    """
    dist = torch.distributed
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()

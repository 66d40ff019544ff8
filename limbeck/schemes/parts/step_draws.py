"""Random numbers of a step that ranks, micro-batches and resumed runs agree on."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.hashing import draw_bits, key, key_tensor


def step_bits(batch: Batch, places: int, number: int, *counters: int) -> Tensor:
    """Random bits for each sample of a step, as ``limbeck.core.hashing`` takes them, ``[B, places, number]``.

    They are a hash of the counters, of how far training is, of the sample's id and view, and of the place. Batches
    without ids, or outside of an engine, draw from torch's random state.

    Args:
        batch: With the ids.
        places: Of a sample, such as its tokens.
        number: How many at each.
        counters: What they are for, and the run's seed.

    >>> batch = Batch(None, index=torch.tensor([4, 7]), progress=torch.tensor(0.5))
    >>> bits = step_bits(batch, 3, 2, 0)
    >>> other = Batch(None, index=torch.tensor([7]), progress=batch.progress)
    >>> bits.shape, torch.equal(bits[1:], step_bits(other, 3, 2, 0))
    (torch.Size([2, 3, 2]), True)
    """
    index, progress = batch.index, batch.progress
    if index is None or not isinstance(progress, Tensor):
        kept = torch.randint(-(2**63), 2**63 - 1, (batch.size, places, number))
        return kept if index is None else kept.to(index.device)
    keys = key_tensor([key(*counters, n) for n in range(number)], index.device)
    # No number leaves the device: the bits of a float count as well as the number of a step does.
    keys = draw_bits(keys, progress.to(index.device).double().view(torch.long))
    keys = draw_bits(keys, index)
    if isinstance(batch.view, Tensor):
        keys = draw_bits(keys, batch.view.to(index.device))
    return draw_bits(keys.unsqueeze(1), torch.arange(places, device=index.device))

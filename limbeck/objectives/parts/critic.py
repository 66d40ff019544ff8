"""A critic of pairs for the dual form of Wasserstein distances."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class LipschitzCritic(nn.Module):
    """A perceptron that gives a pair of vectors a number, and changes by no more than they do, side by side.

    Both layers have spectral norm 1 (Miyato et al., 2018, arXiv 1802.05957), up to what power iteration lags behind.
    The last has no bias, which differences of scores take out again.

    Args:
        width: Of each vector.
        hidden: Between the layers.

    >>> critic, z, bank = LipschitzCritic(4), torch.zeros(2, 4), torch.zeros(5, 4)
    >>> critic(z, z, bank, bank, torch.tensor([[3, 1, 4], [0, 1, 2]])).shape
    torch.Size([2, 7])
    """

    def __init__(self, width: int, hidden: int = 128) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2 * width, hidden), nn.Linear(hidden, 1, bias=False)
        spectral_norm(self.first)  # both in place
        spectral_norm(self.last)

    def forward(self, left: Tensor, right: Tensor, left_bank: Tensor, right_bank: Tensor, others: Tensor) -> Tensor:
        """Scores ``[B, 1 + 2 K]``: of each pair, of its left with K others, of K others with its right.

        Args:
            left, right: ``[B, D]``.
            left_bank, right_bank: ``[n, D]``, where others are.
            others: ``[B, K]`` rows of the banks.
        """
        ways = self.first.weight.chunk(2, dim=1)
        own = [x @ way.T for x, way in zip((left, right), ways, strict=True)]
        few = len(left_bank) <= others.numel()  # then every row is projected once, instead of each time it is drawn
        banks = zip((left_bank, right_bank), ways, strict=True)
        past = [(bank @ way.T)[others] if few else bank[others] @ way.T for bank, way in banks]
        pairs = [(own[0] + own[1]).unsqueeze(1), own[0].unsqueeze(1) + past[1], past[0] + own[1].unsqueeze(1)]
        return self.last((torch.cat(pairs, dim=1) + self.first.bias).relu()).squeeze(2)

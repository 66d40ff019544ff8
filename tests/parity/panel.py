"""A model of experts who say what they were told to: the authors' losses are compared at their logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Said(nn.Module):
    """Says what it was told to; it has nothing that could be drawn anew."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[: len(x)]


class Panel(nn.Module):
    """The mean of its experts."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Said(own) for own in logits)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([expert(x) for expert in self.experts]).mean(dim=0)

"""The fusion of layers of knowledge review."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.heads import BatchNorm
from limbeck.core.projectors import ConvProjector


class Fusion(nn.Module):
    """A layer of the student, fused by attention with what was fused of deeper ones (ReviewKD, arXiv 2104.09044).

    Args:
        channels, width, out: Of the student's map, of what is handed on, and of the teacher's map.
        deepest: There is nothing deeper to fuse with.
    """

    def __init__(self, channels: int, width: int, out: int, deepest: bool) -> None:
        super().__init__()
        self.enter = nn.Sequential(ConvProjector(channels, width, 1, bias=False), BatchNorm(width))
        self.leave = nn.Sequential(nn.Conv2d(width, out, 3, padding=1, bias=False), BatchNorm(out))
        self.attend = None if deepest else nn.Conv2d(2 * width, 2, 1)
        for block in (self.enter, self.leave):
            nn.init.kaiming_uniform_(block[0].get_parameter("weight"), a=1)

    def forward(self, feature: Tensor, deeper: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """What is compared with the teacher's map of this size, and what is handed on."""
        x = self.enter(feature)
        if self.attend is not None and deeper is not None:
            y = F.interpolate(deeper, x.shape[2:], mode="nearest")
            first, second = self.attend(torch.cat([x, y], dim=1)).sigmoid().split(1, dim=1)
            x = x * first + y * second
        x = x if x.shape[2:] == size else F.interpolate(x, size, mode="nearest")
        return self.leave(x), x

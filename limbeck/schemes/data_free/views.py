"""Views of made images that gradients pass, and a bank of what was felt about earlier ones."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def resized_crops(
    images: Tensor,
    least: float = 0.25,
    *,
    flip: bool = True,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """A rectangle of each image at a random place, resized to the old size, and mirrored by chance; gradients pass.

    Args:
        images: ``[B, C, H, W]``.
        least: Of its share of the area; at most all.
        flip: Mirror half of them.
        ratio: Of width to height, within.

    >>> resized_crops(torch.ones(2, 1, 4, 4)).shape
    torch.Size([2, 1, 4, 4])
    """
    size, device, dtype = len(images), images.device, images.dtype
    area, shape, across, down, turned = torch.rand(5, size, device=device, dtype=dtype).unbind()
    area = least + (1 - least) * area
    low, high = (math.log(r) for r in ratio)
    shape = (low + (high - low) * shape).exp()
    wide, tall = (area * shape).sqrt().clamp(max=1.0), (area / shape).sqrt().clamp(max=1.0)
    sign = torch.where(turned < 0.5, -1.0, 1.0) if flip else torch.ones_like(wide)
    zero = torch.zeros_like(wide)
    first = torch.stack([wide * sign, zero, (2 * across - 1) * (1 - wide)], dim=1)
    second = torch.stack([zero, tall, (2 * down - 1) * (1 - tall)], dim=1)
    grid = F.affine_grid(torch.stack([first, second], dim=1).to(dtype), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


class Bank(nn.Module):
    """A ring of features of two views of each image, and the head that projects them, with its optimizer's memory.

    Args:
        capacity: Images at most; the oldest go first.
        width: Of a feature.
        head: Projects features.

    >>> bank = Bank(4, 3, nn.Linear(3, 2))
    >>> bank.some(9).shape, bank.add(torch.ones(3, 2, 3)), bank.some(9).shape
    (torch.Size([0, 2, 3]), None, torch.Size([3, 2, 3]))
    """

    rows: Tensor
    added: Tensor
    moments: Tensor
    moved: Tensor

    def __init__(self, capacity: int, width: int, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        total = sum(p.numel() for p in head.parameters())
        self.register_buffer("rows", torch.zeros(capacity, 2, width))
        self.register_buffer("added", torch.zeros((), dtype=torch.long))
        self.register_buffer("moments", torch.zeros(2, total))
        self.register_buffer("moved", torch.zeros(()))

    def add(self, features: Tensor) -> None:
        """Keep some more, ``[B, 2, D]``."""
        features = features.detach()[-len(self.rows) :]
        self.rows[(self.added + torch.arange(len(features), device=self.rows.device)) % len(self.rows)] = features
        self.added += len(features)

    def some(self, most: int) -> Tensor:
        """So many of them at most, drawn without replacement, ``[M, 2, D]``."""
        size = min(int(self.added), len(self.rows))
        return self.rows[torch.randperm(size, device=self.rows.device)[:most]]

    def optimizer(self, lr: float) -> torch.optim.Adam:
        """The head's Adam, that goes on where the last round left it."""
        found = torch.optim.Adam(self.head.parameters(), lr=lr)
        if self.moved:
            sizes = [p.numel() for p in self.head.parameters()]
            first, second = (list(row.split(sizes)) for row in self.moments.clone())
            for parameter, mean, square in zip(self.head.parameters(), first, second, strict=True):
                averages = {"exp_avg": mean.view_as(parameter), "exp_avg_sq": square.view_as(parameter)}
                found.state[parameter] = {"step": self.moved.clone().cpu(), **averages}
        return found

    def keep_moments(self, optimizer: torch.optim.Adam) -> None:
        """Remember what the optimizer knows, so that a checkpoint holds it."""
        states = [optimizer.state[p] for p in self.head.parameters() if p in optimizer.state]
        if states:
            for row, name in zip(self.moments, ("exp_avg", "exp_avg_sq"), strict=True):
                row.copy_(torch.cat([state[name].flatten() for state in states]))
            self.moved.copy_(states[0]["step"])

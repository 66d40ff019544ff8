"""How far a moving target has come: it moves on after each optimizer step, by what that step's loss came to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch, Unit
from limbeck.core.ranks import mean_over_ranks


class Pace(nn.Module):
    r"""TAID's t. After a step with loss :math:`J_n`, which was taken at progress s:

    .. math:: m \leftarrow \beta m + (1 - \beta) \frac{J_{n-1} - J_n}{J_{n-1} + 10^{-15}}, \qquad
        t \leftarrow \min\big(t_1, \max(t_0 + s (t_1 - t_0),\; t + \alpha\, \sigma(m) (1 - t))\big)

    The first step only gives :math:`J_0`. A loss that is 0 (nothing counted) or not finite changes nothing.

    A step may come in several parts, on several ranks. A batch with ``totals`` is such a part: the next step begins
    where ``progress`` changes. A batch without is a step of its own. All of it is state that a checkpoint holds.

    Args:
        start, end: :math:`t_0` and :math:`t_1`.
        rate: :math:`\alpha`.
        momentum: :math:`\beta`.
        unit: What the loss is a mean over.
    """

    t: Tensor
    previous: Tensor  # loss of the last step that counted; infinite before the first
    trend: Tensor  # m
    running: Tensor  # loss of the present step so far
    progress: Tensor  # of the present step; -1 before the first

    def __init__(self, start: float, end: float, rate: float, momentum: float, unit: Unit = "positions") -> None:
        super().__init__()
        self.start, self.end, self.rate, self.momentum, self.unit = start, end, rate, momentum, unit
        for name, value in (("t", start), ("previous", torch.inf), ("trend", 0), ("running", 0), ("progress", -1)):
            self.register_buffer(name, torch.tensor(float(value)))

    def line(self, progress: float | Tensor) -> Tensor:
        """Where t would be if it moved evenly."""
        passed = torch.as_tensor(progress, dtype=torch.float32, device=self.t.device)
        return (self.start + (self.end - self.start) * passed).to(self.t.dtype)

    @torch.no_grad()
    def begin(self, batch: Batch) -> Tensor:
        """The t of this batch; before the first batch of a step the last one is taken account of."""
        progress = torch.as_tensor(batch.progress, device=self.t.device).to(self.t.dtype)
        begins = progress != self.progress if batch.totals else torch.ones_like(progress, dtype=torch.bool)
        counts = begins & (self.running > 0) & self.running.isfinite()
        moves = counts & self.previous.isfinite()
        gain = (self.previous - self.running) / (self.previous + 1e-15)
        trend = torch.where(moves, self.momentum * self.trend + (1 - self.momentum) * gain, self.trend)
        ahead = self.t + self.rate * trend.sigmoid() * (1 - self.t)
        self.t.copy_(torch.where(moves, torch.maximum(self.line(self.progress), ahead).clamp(max=self.end), self.t))
        self.trend.copy_(trend)
        self.previous.copy_(torch.where(counts, self.running, self.previous))
        self.running.copy_(torch.where(begins, 0.0, self.running))
        self.progress.copy_(torch.where(begins, progress, self.progress))
        return self.t.clone()  # the backward pass may read it when it has moved on

    @torch.no_grad()
    def note(self, value: Tensor, batch: Batch) -> None:
        """Count in what this batch's loss, a mean over the unit, came to."""
        part = (value.detach() * batch.share(self.unit)).float()  # rounded: the order of a sum does not matter then
        self.running.add_(mean_over_ranks(part.to(self.running)))

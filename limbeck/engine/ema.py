"""Averaged weights: an exponential moving average of everything in the student's state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Ema:
    r"""Keeps :math:`\bar w \leftarrow d\,\bar w + (1 - d)\,w`, starting from the weights as they are.

    Statistics of normalisation layers are averaged with the weights; counters are copied.

    Args:
        student: Whose weights; it stays on its device.
        decay: d; 0.999 averages over about a thousand steps.

    >>> layer = nn.Linear(1, 1, bias=False)
    >>> ema = Ema(layer, decay=0.9)
    >>> with torch.no_grad(): _ = layer.weight.add_(1.0)
    >>> ema.update(); (layer.weight.detach() - ema.state["weight"]).mul(10).round()
    tensor([[9.]])
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        self._average = get_ema_multi_avg_fn(decay)
        self._live: dict[str, Tensor] = {}
        seen: set[tuple[int, torch.Size]] = set()
        for name, value in student.state_dict().items():
            place = (value.data_ptr(), value.shape)
            if value.numel() and place in seen:
                continue  # shared weights are averaged once
            seen.add(place)
            self._live[name] = value.detach()
        self.state = {name: value.clone() for name, value in self._live.items()}
        kinds = {v.dtype for v in self._live.values() if v.is_floating_point()}
        self._groups = [[n for n, v in self._live.items() if v.dtype == kind] for kind in kinds]
        self._counters = [n for n, v in self._live.items() if not v.is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Take one step of the average; called after every optimizer step."""
        for names in self._groups:
            self._average([self.state[n] for n in names], [self._live[n] for n in names], 0)
        for name in self._counters:
            self.state[name].copy_(self._live[name])

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Put back an average that a checkpoint holds."""
        for name, value in self.state.items():
            value.copy_(state[name])

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The student with its averaged weights, for as long as this lasts."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def keep(self) -> None:
        """Leave the averaged weights in the student."""
        for name, value in self._live.items():
            value.copy_(self.state[name])

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self._live.items():
            kept = value.clone()
            value.copy_(self.state[name])
            self.state[name].copy_(kept)

"""Epochs in which every class is as likely."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from limbeck.core.errors import DataError
from limbeck.core.hashing import below, draw_bits, key, key_tensor
from limbeck.data.resident import ResidentLoader

_CLASS, _SAMPLE = 31, 32  # keep these draws apart from others


class BalancedLoader(ResidentLoader):
    r"""The samples of another loader, drawn with :math:`p_i = 1 / (C\, n_{y_i})`, with replacement.

    An epoch has as many draws as there are samples; it is a pure function of labels, seed and epoch.

    Args:
        loader: Of a set in memory whose labels are classes; all C that are there are as likely.

    Raises:
        DataError: There are no classes.

    >>> labels = torch.tensor([0] * 90 + [1] * 10)
    >>> loader = BalancedLoader(ResidentLoader(torch.zeros(100, 2), labels, batch_size=10))
    >>> shown = torch.cat([batch.labels for epoch in range(50) for batch in loader.batches(epoch)])
    >>> 0.45 < shown.double().mean() < 0.55
    tensor(True)
    """

    def __init__(self, loader: ResidentLoader) -> None:
        labels = loader.labels
        if labels is None or labels.ndim != 1 or labels.is_floating_point() or int(labels.min()) < 0:
            found = "none" if labels is None else f"{list(labels.shape)} {labels.dtype}"
            raise DataError("what is balanced are classes", where="labels", found=found, wanted="a class a sample")
        if loader.per_read != 1 or loader.only is not None:
            found = "several views of a sample, or some samples alone"
            raise DataError("classes are balanced over all samples, one view each", where="data", found=found)
        self.__dict__.update(loader.__dict__)
        known = labels.cpu().unique()
        place = torch.searchsorted(known, labels.cpu())
        self._sorted, self._counts = place.argsort(stable=True), place.bincount(minlength=len(known))

    def order(self, epoch: int, device: torch.device | str = "cpu") -> Tensor:
        keys = key_tensor([key(_CLASS, self.seed, epoch), key(_SAMPLE, self.seed, epoch)], "cpu")
        bits = draw_bits(keys, torch.arange(self.shown))
        drawn = below(bits[:, 0], len(self._counts))
        starts = self._counts.cumsum(0) - self._counts
        return self._sorted[starts[drawn] + below(bits[:, 1], self._counts[drawn])].to(device)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "balanced": True}

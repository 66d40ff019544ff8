"""Which classes a model knows."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics.classification import MulticlassStatScores

from limbeck.core.errors import DataError


class PerClass:
    """Accuracy by true class over a whole data set, batch by batch.

    Args:
        classes: How many. Counted in a ``classes x classes`` table: for labels, not for vocabularies.

    Example:
        >>> import torch
        >>> per_class = PerClass(3)
        >>> per_class.update(torch.eye(3), torch.tensor([0, 1, 1]))
        >>> per_class.compute()
        {'accuracy': [1.0, 0.5, None], 'support': [1, 2, 0]}
    """

    def __init__(self, classes: int) -> None:
        self._counts = MulticlassStatScores(classes, average=None, validate_args=False, sync_on_compute=False)
        self._added = False

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add places: logits ``[n, C]`` and integer labels ``[n]``; none is allowed."""
        if len(labels):
            self._counts.update(logits.argmax(-1).cpu(), labels.cpu())
            self._added = True

    def compute(self) -> dict[str, Any]:
        """By class: accuracy (``None`` where the class did not occur) and how often it occurred."""
        if not self._added:
            raise DataError("no labelled place was added", where="per_class")
        right, _, _, _, support = self._counts.compute().T.tolist()
        return {"accuracy": [r / n if n else None for r, n in zip(right, support, strict=True)], "support": support}

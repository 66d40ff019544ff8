"""What a model knows of data whose samples may have any number of labels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from limbeck.analysis.calibration import Calibration
from limbeck.core.batch import Batch
from limbeck.data.loader import Loader
from limbeck.engine.metrics import Metrics, as_choices, judged


class MultiLabel:
    """Ranking and decisions of multi-label predictions over a whole data set, batch by batch.

    Calibration is that of the decisions, each of which is a choice between two classes.

    Args:
        bins: Of the reliability diagram.
        loader: Tells the classes' names.

    Example:
        >>> import torch
        >>> from limbeck.data import as_loader
        >>> loader = as_loader((torch.eye(3), torch.eye(3)), batch_size=3, task="multilabel")
        >>> scores = MultiLabel(15, loader)
        >>> scores.update(4 * torch.eye(3) - 2, next(loader.batches()))
        >>> scores.compute()["map_macro"]
        1.0
    """

    def __init__(self, bins: int, loader: Loader) -> None:
        self.calibration, self.names = Calibration(bins), loader.class_names
        self.metrics: Metrics | None = None
        self.support: Tensor | int = 0

    def update(self, logits: Tensor, batch: Batch, labelled: Tensor | None = None) -> None:
        """Add a batch; one without labels adds nothing."""
        if batch.labels is None:
            return
        scores, labels = judged(logits, batch, "multilabel")
        if not len(scores):
            return
        self.metrics = self.metrics or Metrics("multilabel", scores.shape[-1], scores.device, 1)
        self.metrics.update(scores, labels)
        known = labels >= 0
        self.calibration.update(as_choices(scores[known]), (labels[known] > 0.5).long())
        self.support = self.support + (labels > 0.5).sum(dim=0)

    def compute(self) -> dict[str, Any]:
        """``map_macro``, ``map_micro``, ``f1_macro``, ``f1_micro``, ``hamming``, ``nll``, ``brier``, ``ece``,
        ``reliability`` and ``per_class``; empty where there were no labels."""
        if self.metrics is None:
            return {}
        facts: dict[str, Any] = {k: v for k, v in self.metrics.compute().items() if k not in ("nll", "ece")}
        facts |= {k: v for k, v in self.calibration.compute().items() if k != "accuracy"}
        assert isinstance(self.support, Tensor)
        facts["per_class"] = {"average_precision": self.metrics.by_class(), "support": self.support.tolist()}
        if self.names is not None:
            facts["per_class"]["names"] = list(self.names)
        return facts

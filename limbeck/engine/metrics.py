"""What logits are judged by, whatever the labels mean: torchmetrics' figures by the task's name."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.errors import TensorError
from limbeck.data.tasks import task_of

if TYPE_CHECKING:
    from torchmetrics import Metric

BINS = 15  # Guo et al., "On Calibration of Modern Neural Networks", 2017
LOWER_IS_BETTER = ("nll", "perplexity", "bits_per_byte", "ece", "total", "mse", "mae")


def headline(task: str) -> str:
    """The metric that a task is judged by where none is named.

    >>> headline("classification"), headline("multilabel")
    ('accuracy', 'map_macro')
    """
    return task_of(task).headline


class Metrics:
    """Figures over a whole data set, batch by batch.

    Args:
        task: What the labels mean.
        classes: Of the logits.
        device: Where they are counted.
        world: How many processes add to them.
    """

    def __init__(self, task: str, classes: int, device: torch.device, world: int) -> None:
        self.task, self.count = task, 0
        make = {
            "classification": _classification,
            "multilabel": _multilabel,
            "regression": _regression,
            "language": _language,
        }[task]
        with _quiet():
            self.metrics = {name: m.to(device) for name, m in make(classes, {"sync_on_compute": world > 1}).items()}

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Add the places that ``judged`` gives."""
        self.count += len(labels)
        if not len(labels):
            return
        known = labels >= 0
        for name, metric in self.metrics.items():
            if self.task == "regression":
                metric.update(scores, labels)
            elif self.task == "multilabel":
                if name == "nll":
                    losses = F.binary_cross_entropy_with_logits(scores, labels.clamp(min=0), reduction="none")
                    metric.update(losses[known])
                elif name == "ece":
                    metric.update(as_choices(scores[known]).softmax(dim=-1), (labels[known] > 0.5).long())
                else:
                    metric.update(scores.sigmoid(), torch.where(known, (labels > 0.5).long(), -1))
            elif name == "nll":
                metric.update(F.cross_entropy(scores, labels, reduction="none"))
            elif self.task == "language":
                metric.update((scores.argmax(dim=-1) == labels).float())
            else:
                metric.update(scores.softmax(dim=-1) if name == "ece" else scores, labels)

    def compute(self) -> dict[str, float]:
        """The figures of everything added, on every process."""
        with _quiet():
            found = {name: metric.compute() for name, metric in self.metrics.items()}
        if "map_macro" in found:
            found["map_macro"] = _present(found["map_macro"]).nanmean()
        if self.task == "language":
            found["perplexity"] = found["nll"].exp()
        return {name: float(value) for name, value in found.items()}

    def by_class(self) -> list[float | None]:
        """Average precision of each class of multi-label data; ``None`` where no sample has the label."""
        with _quiet():
            values = _present(self.metrics["map_macro"].compute()).tolist()
        return [None if value != value else value for value in values]


def _present(precisions: Tensor) -> Tensor:
    """NaN for classes without a sample: a ranking that has one to find never scores 0."""
    return precisions.masked_fill(precisions == 0, torch.nan)


def as_choices(logits: Tensor) -> Tensor:
    """Logits of yes as logits of a choice between no and yes, ``[*, 2]``."""
    return torch.stack([torch.zeros_like(logits), logits], dim=-1)


def judged(logits: Tensor, batch: Batch, task: str) -> tuple[Tensor, Tensor]:
    """Logits ``[N, C]`` and labels ``[N]``, or ``[N, C]`` of tasks with several a sample, of the places that count.

    Raises:
        DataError: No labels.
        TensorError: Labels and logits do not belong together.
    """
    labels = batch.require("labels")
    one = task in ("classification", "language")
    if one:
        if labels.is_floating_point() and labels.shape == logits.shape:
            labels = labels.argmax(dim=-1)
        fits, wanted = labels.shape == logits.shape[:-1] and not labels.is_floating_point(), logits.shape[:-1]
    else:
        fits, wanted = labels.shape == logits.shape and labels.is_floating_point(), logits.shape
    if not fits:
        raise TensorError(
            "labels do not belong to these logits",
            where="labels",
            found=f"{list(labels.shape)} {labels.dtype}",
            wanted=f"{list(wanted)} {'integers' if one else 'floating'}",
        )
    if one:
        counts, labels = labels >= 0, labels.long()
    elif task == "multilabel":
        counts, labels = (labels >= 0).any(dim=-1), labels.float()
    else:
        counts, labels = torch.ones(labels.shape[:-1], dtype=torch.bool, device=labels.device), labels.float()
    if batch.mask is not None and batch.mask.shape == counts.shape:
        counts = counts & batch.mask
    return logits.float()[counts], labels[counts]


# Imported in each: torchmetrics brings transformers along, and who trains without validation need not wait for that.


def _classification(classes: int, known: dict[str, Any]) -> dict[str, Metric]:
    from torchmetrics import MeanMetric
    from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

    plain = {"validate_args": False, **known}
    metrics: dict[str, Metric] = {
        "accuracy": MulticlassAccuracy(classes, average="micro", **plain),
        "nll": MeanMetric(nan_strategy="disable", **known),
        "ece": MulticlassCalibrationError(classes, n_bins=BINS, norm="l1", **plain),
    }
    if classes > 5:
        metrics["top5"] = MulticlassAccuracy(classes, top_k=5, average="micro", **plain)
    return metrics


def _multilabel(classes: int, known: dict[str, Any]) -> dict[str, Metric]:
    from torchmetrics import MeanMetric
    from torchmetrics.classification import (
        MulticlassCalibrationError,
        MultilabelAccuracy,
        MultilabelAveragePrecision,
        MultilabelF1Score,
    )

    plain = {"validate_args": False, "ignore_index": -1, **known}
    return {
        "map_macro": MultilabelAveragePrecision(classes, average="none", **plain),
        "map_micro": MultilabelAveragePrecision(classes, average="micro", **plain),
        "f1_macro": MultilabelF1Score(classes, average="macro", **plain),
        "f1_micro": MultilabelF1Score(classes, average="micro", **plain),
        "hamming": MultilabelAccuracy(classes, average="micro", **plain),
        "nll": MeanMetric(nan_strategy="disable", **known),
        "ece": MulticlassCalibrationError(2, n_bins=BINS, norm="l1", validate_args=False, **known),
    }


def _regression(classes: int, known: dict[str, Any]) -> dict[str, Metric]:
    from torchmetrics import MeanAbsoluteError, MeanSquaredError

    return {"mse": MeanSquaredError(**known), "mae": MeanAbsoluteError(**known)}


def _language(classes: int, known: dict[str, Any]) -> dict[str, Metric]:
    from torchmetrics import MeanMetric

    return {name: MeanMetric(nan_strategy="disable", **known) for name in ("nll", "accuracy")}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torchmetrics' remarks that it keeps every confidence, and that a class without samples has no mAP."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*save all targets and predictions.*")
        warnings.filterwarnings("ignore", message=".*Average precision score for one or more classes was.*")
        warnings.filterwarnings("ignore", message=".*No positive samples found.*")
        yield

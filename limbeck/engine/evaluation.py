"""How well a model classifies: accuracy, likelihood, calibration."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import DataError, TensorError
from limbeck.core.survey import call_model
from limbeck.core.trace import logits_of
from limbeck.data.loader import Loader

if TYPE_CHECKING:
    from torchmetrics import Metric

BINS = 15  # Guo et al., "On Calibration of Modern Neural Networks", 2017


def evaluate(
    model: nn.Module,
    loader: Loader,
    *,
    logits: str | None = None,
    precision: str = "fp32",
    rank: int = 0,
    world: int = 1,
) -> dict[str, float]:
    """Accuracy, likelihood and calibration over one pass of the data, on the device where the model is.

    Args:
        model: What is judged; its mode is as before afterwards.
        loader: Data with labels; places with a negative label or outside the mask do not count.
        logits: Where logits stand in the model's output (see ``logits_of``).
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"`` (autocast).
        rank: Of this process; each of ``world`` processes sees its share, and all get the same answer.
        world: How many processes.

    Returns:
        ``accuracy`` and ``top5`` (where there are more than five classes) from 0 to 1; ``nll`` in nats; ``ece``, the
        expected calibration error over 15 bins; ``samples``: how many places counted.

    Raises:
        DataError: There are no labels.
        TensorError: Labels and logits do not belong together.

    >>> from limbeck.data import as_loader
    >>> inputs, labels = torch.eye(4), torch.arange(4)
    >>> evaluate(nn.Identity(), as_loader((inputs, labels), batch_size=2))["accuracy"]
    1.0
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    rank, world = _shared(loader, rank, world)
    metrics: dict[str, Metric] = {}
    count = 0
    with _judging(model), torch.inference_mode():
        for parts in loader.epoch(0, rank=rank, world=world):
            for batch in parts:
                batch = batch.to(device)
                with autocast(device, precision):
                    output = call_model(model, batch.inputs)
                scores, labels = _places(logits_of(output, logits), batch)
                if not metrics:
                    metrics = _metrics(scores.shape[-1], device, world)
                count += len(labels)
                _update(metrics, scores, labels)
        total = torch.tensor(float(count), device=device)
        if world > 1:
            torch.distributed.all_reduce(total)
        if not total:
            raise DataError("nothing to judge by: no place has a label", where="validation")
        results = {name: float(metric.compute()) for name, metric in metrics.items()}
    return {**results, "samples": int(total)}


def evaluate_loss(
    distiller: Distiller, loader: Loader, progress: Tensor, *, precision: str = "fp32", rank: int = 0, world: int = 1
) -> dict[str, Any]:
    """The distiller's own loss over one pass of the data: ``total``, and ``terms`` before their weights.

    Every term is the mean over its own unit, whatever the size of batches. Objectives are in evaluation mode, so that
    memory banks stay as they are.

    Args:
        distiller: Set up.
        loader: Data; as for ``evaluate``.
        progress: 0-d, on the device: weights are those of this moment.
        precision: As for ``evaluate``.
        rank: Of this process.
        world: How many processes.
    """
    rank, world = _shared(loader, rank, world)
    units = {name: objective.contract.normalizer for name, objective, _ in distiller.loss.items()}
    one = torch.ones((), device=progress.device)
    counts: dict[str, Tensor] = dict.fromkeys(units.values(), one * 0)
    sums: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    with _judging(distiller), torch.inference_mode():
        for parts in loader.epoch(0, rank=rank, world=world):
            for batch in parts:
                # With totals of one, a batch's share is its count, and its part of a mean is a sum.
                totals = dict.fromkeys(units.values(), one)
                batch = batch.to(progress.device).replace(progress=progress, totals=totals)
                with autocast(progress.device, precision):
                    losses = distiller.forward(batch)  # not compiled: it would be built anew for this mode
                weights = losses.weights
                counts = {unit: count + batch.count(unit) for unit, count in counts.items()}
                sums = {name: sums.get(name, 0) + value for name, value in losses.terms.items()}
        if world > 1:
            for value in [*counts.values(), *sums.values()]:
                torch.distributed.all_reduce(value)
        owners = {name: name if name in units else name.rpartition("/")[0] for name in sums}
        terms = {name: float(value / counts[units[owners[name]]].clamp(min=1)) for name, value in sums.items()}
    return {"total": sum(float(weights[owners[name]]) * value for name, value in terms.items()), "terms": terms}


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[None]:
    """The autocast that a precision stands for."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def _shared(loader: Loader, rank: int, world: int) -> tuple[int, int]:
    """Where some rank would get nothing at all, each looks at everything."""
    smallest = min(n for n in (loader.samples, loader.batch_size, world) if n is not None)
    return (rank, world) if smallest >= world else (0, 1)


@contextlib.contextmanager
def _judging(model: nn.Module) -> Iterator[None]:
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _places(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits ``[N, C]`` and labels ``[N]`` of the places that count."""
    labels = batch.require("labels")
    if labels.is_floating_point() and labels.shape == logits.shape:
        labels = labels.argmax(dim=-1)
    if labels.shape != logits.shape[:-1] or labels.is_floating_point():
        raise TensorError(
            "labels do not belong to these logits",
            where="labels",
            found=f"{list(labels.shape)} {labels.dtype}",
            wanted=f"{list(logits.shape[:-1])} integers",
        )
    counts = labels >= 0
    if batch.mask is not None and batch.mask.shape == counts.shape:
        counts = counts & batch.mask
    return logits.float()[counts], labels[counts].long()


def _metrics(classes: int, device: torch.device, world: int) -> dict[str, Metric]:
    # Imported here: torchmetrics brings transformers along, and who trains without validation need not wait for that.
    from torchmetrics import MeanMetric
    from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

    known: dict[str, Any] = {"validate_args": False, "sync_on_compute": world > 1}
    with warnings.catch_warnings():  # torchmetrics says that it keeps every confidence, which is what we want
        warnings.filterwarnings("ignore", message=".*save all targets and predictions.*")
        metrics: dict[str, Metric] = {
            "accuracy": MulticlassAccuracy(classes, average="micro", **known),
            "nll": MeanMetric(nan_strategy="disable", sync_on_compute=world > 1),
            "ece": MulticlassCalibrationError(classes, n_bins=BINS, norm="l1", **known),
        }
        if classes > 5:
            metrics["top5"] = MulticlassAccuracy(classes, top_k=5, average="micro", **known)
    return {name: metric.to(device) for name, metric in metrics.items()}


def _update(metrics: dict[str, Metric], scores: Tensor, labels: Tensor) -> None:
    if not len(labels):
        return
    for name, metric in metrics.items():
        if name == "nll":
            metric.update(F.cross_entropy(scores, labels, reduction="none"))
        else:
            metric.update(scores.softmax(dim=-1) if name == "ece" else scores, labels)

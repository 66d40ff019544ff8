"""How well a model does its task: accuracy or average precision, likelihood, calibration."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.survey import call_model
from limbeck.core.trace import logits_of
from limbeck.data.loader import Loader
from limbeck.engine.metrics import Metrics, judged


def evaluate(
    model: nn.Module,
    loader: Loader,
    *,
    logits: str | None = None,
    precision: str = "fp32",
    rank: int = 0,
    world: int = 1,
) -> dict[str, float]:
    """How well a model does over one pass of the data, on the device where the model is.

    What is told follows from the data's task (``loader.task``):

    ====================  ==============================================================================================
    task                  figures
    ====================  ==============================================================================================
    ``"classification"``  ``accuracy`` and ``top5`` (of more than five classes) from 0 to 1; ``nll`` in nats; ``ece``,
                          the expected calibration error over 15 bins
    ``"multilabel"``      ``map_macro``, mean average precision over classes (those that occur), and ``map_micro``, that
                          of all pairs of sample and class; ``f1_macro``, ``f1_micro``, and ``hamming``, the share of
                          right decisions, at one half; ``nll`` in nats and ``ece`` of a decision
    ``"regression"``      ``mse`` and ``mae``
    ``"language"``        of a token: ``perplexity``, ``exp(nll)``; ``nll`` in nats; ``accuracy``
    ====================  ==============================================================================================

    Args:
        model: What is judged; its mode is as before afterwards.
        loader: Data with labels; places with a negative label (of regression: none) or outside the mask do not count.
        logits: Where logits stand in the model's output (see ``logits_of``).
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"`` (autocast).
        rank: Of this process; each of ``world`` processes sees its share, and all get the same answer.
        world: How many processes.

    Returns:
        The figures, and ``samples``: how many places counted.

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
    metrics: Metrics | None = None
    with _judging(model), torch.inference_mode():
        for parts in loader.epoch(0, rank=rank, world=world):
            for batch in parts:
                batch = batch.to(device)
                with autocast(device, precision):
                    output = call_model(model, batch.inputs)
                scores, labels = judged(logits_of(output, logits), batch, loader.task)
                metrics = metrics or Metrics(loader.task, scores.shape[-1], device, world)
                metrics.update(scores, labels)
        total = torch.tensor(0.0 if metrics is None else float(metrics.count), device=device)
        if world > 1:
            torch.distributed.all_reduce(total)
        if not total or metrics is None:
            raise DataError("nothing to judge by: no place has a label", where="validation")
        results = metrics.compute()
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

    Raises:
        ConfigError: A scheme adds losses that are no objectives.
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
        others = [name for name, owner in owners.items() if owner not in units]
        if others:
            raise ConfigError(
                "this training has losses of its own, which are told of its batches alone",
                where="train.monitor",
                found=", ".join(others),
                remedy="monitor accuracy, or another figure of the student",
            )
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

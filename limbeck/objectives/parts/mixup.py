"""Mixup inside a batch, for objectives whose method mixes what both models see (``Objective.prepare``)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Beta

from limbeck.core.batch import Batch
from limbeck.core.errors import DataError
from limbeck.core.labels import soft_labels


def mix(batch: Batch, partner: Tensor, share: Tensor, classes: int) -> Batch:
    """Every sample blended with another of its batch: inputs, the teacher's inputs, and labels, which become soft.

    Args:
        batch: Its inputs are floating, ``[B, ...]``; it has a label a sample.
        partner: ``[B]`` positions in the batch.
        share: ``[B]``, what a sample keeps of itself. What the batch's mask hides neither gives nor takes.
        classes: Their number.

    Raises:
        DataError: No labels, or inputs that are no numbers.

    >>> batch = Batch(torch.tensor([[1.0], [5.0]]), labels=torch.tensor([0, 1]))
    >>> batch = mix(batch, torch.tensor([1, 0]), torch.tensor([0.25, 1.0]), 2)
    >>> batch.inputs.tolist(), batch.labels.tolist()
    ([[4.0], [5.0]], [[0.25, 0.75], [0.0, 1.0]])
    """
    if batch.mask is not None:
        counts = batch.mask.reshape(len(batch.mask), -1).all(dim=1)
        share = share.masked_fill(~(counts & counts[partner]), 1.0)

    def blend(values: Tensor) -> Tensor:
        kept = share.to(values.dtype).reshape(-1, *[1] * (values.ndim - 1))
        return torch.where(kept == 1, values, kept * values + (1 - kept) * values[partner])

    mixed = {"inputs": batch.inputs}
    if batch.teacher_inputs is not None:
        mixed["teacher_inputs"] = batch.teacher_inputs
    for name, value in mixed.items():
        check_mixable(value, f"batch.{name}")
        mixed[name] = blend(value)
    return batch.replace(labels=blend(soft_labels(batch.require("labels"), classes)), **mixed)


def partial_mixup(batch: Batch, classes: int, *, clean: float = 0.9, beta: float = 1.0) -> Batch:
    r"""Blend some samples of a batch with others, by shares drawn from :math:`Beta(\beta, \beta)` (partial mixup).

    Args:
        batch: As for ``mix``.
        classes: Their number.
        clean: The share of samples that stay as they are, rounded down; 0 mixes all of them.
        beta: Of the Beta distribution; 1 draws evenly.
    """
    check_mixable(batch.inputs, "batch.inputs")
    size, device = len(batch.inputs), batch.inputs.device
    share = Beta(torch.full((), beta, device=device), torch.full((), beta, device=device)).sample((size,))
    share = share.masked_fill(torch.randperm(size, device=device) < int(clean * size), 1.0)
    return mix(batch, torch.randperm(size, device=device), share, classes)


def check_mixable(inputs: object, where: str) -> None:
    """Refuse inputs that are no floating tensor: token ids cannot be blended."""
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        found = str(inputs.dtype) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise DataError("only numbers can be mixed", where=where, found=found, wanted="a floating tensor")

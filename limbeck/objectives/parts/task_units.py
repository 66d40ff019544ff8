"""Which units of a last hidden layer a task depends on."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from limbeck.core.labels import split_labels
from limbeck.core.reduction import check_floating, fit_mask, widen

_ROWS = 1024  # places whose logits are made at a time


@torch.no_grad()
def task_scores(
    feature: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    of: Literal["loss", "logit"] = "loss",
    mask: Tensor | None = None,
) -> Tensor:
    r"""How much a task's answer depends on each unit of what enters the last layer: :math:`\sum |\partial f / \partial
    h_m|`, ``[D]``.

    Args:
        feature: :math:`h`, ``[B, *, D]``.
        weight, bias: Of that layer, ``[C, D]`` and ``[C]``.
        labels: ``[B, *]`` integers, negative where a place has none; it does not count then. Without, and with labels
            of another shape, the class that is predicted.
        of: f: the log-likelihood of the class, or its logit.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.

    >>> task_scores(torch.ones(1, 3), torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]]), of="logit")
    tensor([2., 0., 1.])
    """
    check_floating(feature, "feature", least=2)
    places = feature[..., 0]
    counts = torch.ones_like(places, dtype=torch.bool) if mask is None else fit_mask(mask, places)
    target: Tensor | None = None
    if labels is not None and not labels.is_floating_point() and labels.shape == places.shape:
        target, labelled = split_labels(labels, len(weight))
        counts = counts & labelled
        target = target[counts]
    rows, total = feature[counts].to(weight.dtype), widen(weight).new_zeros(weight.shape[1])
    for start in range(0, len(rows), _ROWS):
        logits = widen(torch.nn.functional.linear(rows[start : start + _ROWS], weight, bias))
        chosen = logits.argmax(dim=1) if target is None else target[start : start + _ROWS]
        slope = widen(weight[chosen])
        if of == "loss":
            slope = slope - logits.softmax(dim=1) @ widen(weight)
        total += slope.abs().sum(dim=0)
    return total

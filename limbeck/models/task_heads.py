"""One model for several tasks of classification: a body that all share, and a linear head for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.errors import ModelError
from limbeck.models.last_layer import with_last

BARRED = -1e4  # the logit of a class that a task does not have: its probability is 0 in every precision


class TaskHeads(nn.Module):
    """A linear head a task: features ``[B, D]`` to logits ``[B, T, C]``, C the classes of the task that has the most.

    With labels ``[B, T]``, negative where a sample is not of a task, every loss and figure on places with labels is one
    on samples with their tasks, and the head of a task learns from its samples alone.

    Args:
        features: D.
        classes: Of each task.
        dropout: Of the features, one for all or one a task.

    >>> TaskHeads(4, [3, 2])(torch.zeros(5, 4)).shape
    torch.Size([5, 2, 3])
    """

    def __init__(self, features: int, classes: Sequence[int], dropout: float | Sequence[float] = 0.0) -> None:
        super().__init__()
        rates = [dropout] * len(classes) if isinstance(dropout, (int, float)) else list(dropout)
        if not classes or any(count < 2 for count in classes):
            raise ModelError("a task is a choice of two classes or more", where="tasks", found=list(classes))
        if len(rates) != len(classes):
            raise ModelError("one rate a task", where="dropout", found=len(rates), wanted=len(classes))
        self.heads = nn.ModuleList(nn.Linear(features, count) for count in classes)
        self.drops = nn.ModuleList(nn.Dropout(rate) for rate in rates)
        self.width = max(classes)

    def forward(self, feature: Tensor) -> Tensor:
        said = [head(drop(feature)) for head, drop in zip(self.heads, self.drops, strict=True)]
        return torch.stack([F.pad(z, (0, self.width - z.shape[-1]), value=BARRED) for z in said], dim=-2)


def several_tasks(
    body: str,
    tasks: Sequence[int],
    dropout: float | Sequence[float] = 0.0,
    *,
    in_channels: int | None = None,
    image_size: int | None = None,
    in_features: int | None = None,
    vocabulary: int | None = None,
    **options: Any,
) -> nn.Module:
    """A model with a head for each task in the place of its last linear layer; the last that is registered.

    In a recipe: ``model: limbeck.models.task_heads:several_tasks, options: {body: text_64_1, tasks: [3, 2]}``.

    Args:
        body: As :func:`limbeck.models.load_model` takes it.
        tasks: Classes of each.
        dropout: As :class:`TaskHeads` takes it.
        in_channels, image_size, in_features, vocabulary: As ``load_model`` takes them.
        options: Of the body.

    Raises:
        ModelError: The body has no linear layer beside others.

    >>> several_tasks("mlp_8", [10, 2], in_features=6)(torch.zeros(3, 6)).shape
    torch.Size([3, 2, 10])
    """
    sizes = {"in_channels": in_channels, "image_size": image_size, "in_features": in_features, "vocabulary": vocabulary}
    classes = max(tasks, default=2)
    return with_last(body, lambda width: TaskHeads(width, tasks, dropout), num_classes=classes, **sizes, **options)

"""Several views of each sample in one batch: rotations, two augmentations, a clean and a mixed image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import DataError


def stack_views(batch: Batch, views: Sequence[Tensor], *, labelled: int = 1) -> Batch:
    """A batch in which every sample stands several times, view after view: ``[V * B, ...]``.

    Losses on labels see the first ``labelled`` views only; in the others each sample has no label (-1). All other terms
    of a loss see all views.

    Args:
        batch: What is there; its inputs are replaced.
        views: Inputs of each view, ``[B, ...]`` each; the first usually ``batch.inputs`` as they are.
        labelled: How many views keep the labels.

    Raises:
        DataError: The batch's inputs are no tensor, or it has soft labels that cannot be taken away.

    >>> batch = stack_views(Batch(torch.zeros(2, 3), labels=torch.tensor([0, 1])), [torch.zeros(2, 3)] * 2)
    >>> batch.inputs.shape, batch.labels.tolist()
    (torch.Size([4, 3]), [0, 1, -1, -1])
    """
    if not isinstance(batch.inputs, Tensor):
        raise DataError(
            "views are made of tensors", where="batch.inputs", found=type(batch.inputs).__name__, wanted="a tensor"
        )
    number, labels = len(views), batch.labels
    if labels is not None:
        if labels.is_floating_point() and labelled < number:
            raise DataError("soft labels cannot be left out", where="batch.labels", wanted="integer labels")
        without = labels if labels.is_floating_point() else torch.full_like(labels, -1)
        labels = torch.cat([labels] * labelled + [without] * (number - labelled))
    teacher = batch.teacher_inputs
    return batch.replace(
        inputs=torch.cat(list(views)),
        labels=labels,
        index=None if batch.index is None else batch.index.repeat(number),
        mask=None if batch.mask is None else torch.cat([batch.mask] * number),
        teacher_inputs=teacher if teacher is None else torch.cat([teacher] * number),
        extras={**batch.extras, "views": number},
    )


def split_views(values: Tensor, batch: Batch) -> tuple[Tensor, ...]:
    """What a model said of each view, ``[B, ...]`` each, in the order in which they were stacked."""
    return values.chunk(int(batch.extras.get("views", 1)))

"""Where another model does better: what losses share that learn pixel by pixel and region by region."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from limbeck.core.divergences import kl_rows, soften
from limbeck.core.errors import TensorError
from limbeck.core.labels import class_labels
from limbeck.core.layout import to_map
from limbeck.core.reduction import check_features, check_logits, widen
from limbeck.core.relations import channel_dim, unit


def of_labels(logits: Tensor, labels: Tensor | None) -> Tensor:
    """Logits with classes last, at the places that have labels: maps of scores ``[B, C, h, w]`` come to their size.

    >>> import torch
    >>> of_labels(torch.zeros(2, 5, 4, 4), torch.zeros(2, 8, 8, dtype=torch.long)).shape
    torch.Size([2, 8, 8, 5])
    """
    if labels is None or labels.ndim not in (1, 3) or logits.ndim != labels.ndim + 1:
        found = f"labels {'none' if labels is None else list(labels.shape)} and logits {list(logits.shape)}"
        raise TensorError("these are neither of pixels nor of images", where="labels", found=found)
    if labels.ndim == 1 or logits.shape[:-1] == labels.shape:
        return logits
    size = (labels.shape[1], labels.shape[2])
    if logits.shape[2:] != size:
        logits = F.interpolate(widen(logits), size, mode="bilinear", align_corners=False)
    return logits.movedim(1, -1)


def better_answers(
    student: Tensor, teacher: Tensor, labels: Tensor | None, temperature: float, only_right: bool
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    r"""What a model learns from another's answers, :math:`T^2 \mathrm{KL}`, where the other is nearer to the label.

    Args:
        student, teacher: Logits of pixels or images, as ``of_labels`` takes them; the teacher's are detached.
        labels: ``[B, H, W]`` or ``[B]`` integers, negative where there is none.
        temperature: T.
        only_right: Only where the other's answer is the label, too.

    Returns:
        ``[B]``, means over what has a label; both cross-entropies; and what has a label.

    >>> import torch
    >>> unsure, sure, label = torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    >>> better_answers(unsure, sure, label, 1.0, False)[0], better_answers(sure, unsure, label, 1.0, False)[0]
    (tensor([0.3278]), tensor([0.]))
    """
    own, other = of_labels(student, labels), of_labels(teacher.detach(), labels)
    check_logits(own, other, labels)
    target, labelled = class_labels(labels, own.shape[-1], "CTCL")
    ours, theirs = (-soften(z).gather(-1, target.unsqueeze(-1)).squeeze(-1) for z in (own.detach(), other))
    learns = labelled & (theirs < ours)
    if only_right:
        learns = learns & (other.argmax(dim=-1) == target)
    divergence = kl_rows(soften(other, temperature), soften(own, temperature)).masked_fill(~learns, 0.0)
    sums = divergence.flatten(1).sum(dim=1) if divergence.ndim > 1 else divergence
    counts = labelled.flatten(1).sum(dim=1) if labelled.ndim > 1 else labelled
    return temperature**2 * sums / counts.clamp(min=1), (ours, theirs), labelled


def apart(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of directions at each place, ``[B, *]``; 0 where both are zero.

    >>> import torch
    >>> apart(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    tensor([2.])
    """
    check_features(student, teacher)
    dim = channel_dim(student)
    return (unit(widen(student), dim) - unit(widen(teacher.detach()), dim)).square().sum(dim=dim)


def better_regions(
    student: Tensor, teacher: Tensor, losses: tuple[Tensor, Tensor], labelled: Tensor, regions: int
) -> Tensor:
    """Squared distance of directions in the regions where the other model does better, ``[B]``.

    Args:
        student, teacher: Maps, tokens or vectors of a layer.
        losses: Of the student and of the teacher at each pixel.
        labelled: Which pixels have a label.
        regions: A side of the grid of regions.
    """
    distance = apart(*(f[..., None, None] if f.ndim == 2 else to_map(f, "feature") for f in (student, teacher)))
    grid = (min(regions, distance.shape[1]), min(regions, distance.shape[2]))

    def pooled(values: Tensor) -> Tensor:
        values = values.view(-1, 1, 1) if values.ndim == 1 else values
        return F.adaptive_avg_pool2d(values.to(distance.dtype).unsqueeze(1), grid).squeeze(1)

    ours, theirs = (pooled(values.masked_fill(~labelled, 0.0)) for values in losses)
    known = pooled(labelled) > 0  # means of both over the same pixels, so their sums tell as well
    values = pooled(distance).masked_fill(~(known & (theirs < ours)), 0.0)
    return values.sum(dim=(1, 2)) / known.sum(dim=(1, 2)).clamp(min=1)

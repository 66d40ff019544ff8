"""Filters beside a model's layers, which learn in a first stage what of a layer the task needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError
from limbeck.core.layers import LayerObjective, Tap
from limbeck.core.layout import aligned
from limbeck.core.objective import Contract, DataInfo
from limbeck.core.pairing import pair_layers
from limbeck.core.reduction import check_positive
from limbeck.core.relations import channel_dim, first_counted, project
from limbeck.core.trace import Trace
from limbeck.objectives.response.cross_entropy import cross_entropy_loss


class Filters(nn.ModuleList):
    """One map a layer, from its width to a common one; sized by the first features, and kept for others as wide.

    Args:
        nonlinear: Two linear maps with a GELU between them instead of one.
    """

    def __init__(self, nonlinear: bool = False) -> None:
        super().__init__()
        self.nonlinear = nonlinear
        self.widths: list[tuple[int, int]] = []

    def size(self, widths: list[tuple[int, int]], device: torch.device) -> None:
        """Make maps of these widths, in and out, where they are not there yet."""
        if widths == self.widths:
            return
        del self[:]
        for width, out in widths:
            linear = nn.Linear(width, out, device=device)
            inner = nn.Linear(width, width, device=device)
            self.append(nn.Sequential(inner, nn.GELU(), linear) if self.nonlinear else linear)
        self.widths = list(widths)


class Filtered(LayerObjective):
    """An objective on pairs of layers of both models, each behind its filter.

    Args:
        tap, teacher_tap: As ``LayerObjective``.
        every: A filter stands after every so many of the student's layers.
        teacher_every: The same of the teacher; ``None``: at the student's relative depths.
        nonlinear: As ``Filters``.
    """

    def __init__(
        self, tap: Tap, teacher_tap: Tap | None, every: int, teacher_every: int | None, nonlinear: bool
    ) -> None:
        super().__init__(tap, teacher_tap)
        check_positive(every, "every")
        if teacher_every is not None:
            check_positive(teacher_every, "teacher_every")
        self.every, self.teacher_every, self.nonlinear = every, teacher_every, nonlinear
        self.taps = list(self.student_taps), list(self.teacher_taps)
        self.student_filters, self.teacher_filters = Filters(nonlinear), Filters(nonlinear)

    def matched(self, student: Trace, teacher: Trace) -> list[tuple[Tensor, Tensor]]:
        """Pairs of features of the same places, channels last; the teacher's carry no gradient."""
        own, other = self.layers(student, teacher)
        own, other = own[self.every - 1 :: self.every], other[(self.teacher_every or 1) - 1 :: self.teacher_every or 1]
        if not own or not other or (self.teacher_every is not None and len(own) != len(other)):
            raise ConfigError(
                "both models need as many filters",
                where="teacher_every",
                found=f"{len(own)} and {len(other)} layers",
                remedy="choose every and teacher_every so that both divide the depths alike",
            )
        pairs = (aligned(own[i], other[j]) for i, j in pair_layers(len(own), len(other)))
        return [tuple(f.movedim(channel_dim(f), -1) for f in pair) for pair in pairs]  # type: ignore[misc]

    def size(self, student: Trace, teacher: Trace, *, both: bool) -> list[tuple[Tensor, Tensor]]:
        """Make the filters; the common width is the teacher's. ``both``: the teacher has some too."""
        pairs = self.matched(student, teacher)
        self.student_filters.size([(s.shape[-1], t.shape[-1]) for s, t in pairs], pairs[0][0].device)
        if both:
            self.teacher_filters.size([(t.shape[-1], t.shape[-1]) for _, t in pairs], pairs[0][1].device)
        return pairs

    def filter(self, side: str, number: int) -> nn.Module:
        """One of the student's or the teacher's filters, by number."""
        made = getattr(self, side)
        if number >= len(made):
            self.ready("filters")
        return made[number]


class TaskFilters(Filtered):
    r"""The first stage: each filter learns to tell the labels from its layer, through a head of its own.

    .. math:: L = \frac 1 M \sum_m \mathrm{CE}(h^S_m(f^S_m), y) + \mathrm{CE}(h^T_m(f^T_m), y)

    Both models stay as they are. Where labels are one a sample, a head reads the first place that counts (of maps their
    mean), through a linear layer and a GELU.

    Args:
        owner: Whose filters.
    """

    contract = Contract(normalizer="labels", at_equal=None, mask=True, stop_gradient=True)
    trains_student = False

    def __init__(self, owner: Filtered) -> None:
        super().__init__(*owner.taps, owner.every, owner.teacher_every, owner.nonlinear)
        self.student_filters, self.teacher_filters = owner.student_filters, owner.teacher_filters
        self.student_taps, self.teacher_taps = (*self.student_taps, "logits"), (*self.teacher_taps, "logits")
        self.student_heads: nn.ModuleList | None = None
        self.teacher_heads: nn.ModuleList | None = None

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        pairs = self.size(student, teacher, both=True)
        self.student_filters.requires_grad_(True)
        self.teacher_filters.requires_grad_(True)
        self.student_heads = nn.ModuleList(_head(t, student.logits) for _, t in pairs)
        self.teacher_heads = nn.ModuleList(_head(t, teacher.logits) for _, t in pairs)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> dict[str, Tensor]:
        pairs, labels = self.matched(student, teacher), batch.require("labels")
        sides = {
            "student": ([s.detach() for s, _ in pairs], self.student_filters, self.ready("student_heads")),
            "teacher": ([t for _, t in pairs], self.teacher_filters, self.ready("teacher_heads")),
        }
        parts = {}
        for name, (features, filters, heads) in sides.items():
            losses = [
                _task_loss(head, project(layer, feature, f"{name}_feature"), labels, batch.mask)
                for feature, layer, head in zip(features, filters, heads, strict=True)
            ]
            parts[name] = torch.stack(losses).mean()
        return parts


def _head(feature: Tensor, logits: Tensor) -> nn.Module:
    """Of filtered features ``[B, *, D]``: one prediction a place, or one a sample from a pooled vector."""
    width = feature.shape[-1]
    last = nn.Linear(width, logits.shape[-1], device=feature.device)
    if logits.ndim == feature.ndim > 2:
        return last
    return nn.Sequential(nn.Linear(width, width, device=feature.device), nn.GELU(), last)


def _task_loss(head: nn.Module, feature: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    if isinstance(head, nn.Linear):
        return cross_entropy_loss(head(feature), labels, mask=mask)
    counts = None if mask is None else mask.reshape(len(mask), -1).any(dim=1)
    if feature.ndim == 3:
        feature = first_counted(feature, mask)
    elif feature.ndim > 3:
        feature = feature.flatten(1, -2).mean(dim=1)
    return cross_entropy_loss(head(feature), labels, mask=counts)

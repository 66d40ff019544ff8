"""Flex-KD: the teacher's units that matter for the task, matched one to one with the student's."""

from __future__ import annotations

from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import standardise
from limbeck.core.errors import TensorError
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.reduction import Reduction, check_features, check_floating, check_positive, fit_mask, reduce
from limbeck.core.top_k import top_ids
from limbeck.core.trace import Trace
from limbeck.objectives.parts.task_units import task_scores


def flex_kd_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""How far corresponding units are from going up and down together.

    .. math:: L = \frac 1 D \sum_m (1 - \rho_m)^2

    where :math:`\rho_m` is the correlation of the student's m-th unit with the teacher's over all places that count. No
    scale and shift of a unit matters. Where the teacher's unit does not vary, and with a single place, it is 0.

    Args:
        student_feature: ``[B, *, D]``.
        teacher_feature: ``[B, *, D]``, the chosen units; detached.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` or ``"sum"`` over units, or ``"none"`` (``[D]``).

    Raises:
        TensorError: Features of different shapes.

    Source: Saadi and Wang, "Task-Based Flexible Feature Distillation for LLMs", 2025, arXiv 2507.10155.

    >>> flex_kd_loss(torch.tensor([[1.0, 0.0], [3.0, 1.0]]), torch.tensor([[0.0, 5.0], [9.0, 4.0]]))
    tensor(2.)
    """
    check_features(student_feature, teacher_feature)
    counts = torch.ones_like(teacher_feature[..., 0], dtype=torch.bool)
    counts = (counts if mask is None else fit_mask(mask, counts)).flatten().unsqueeze(1)
    rows = (f.reshape(-1, f.shape[-1]) for f in (student_feature, teacher_feature.detach()))
    s, t = (standardise(f, 0, correction=0, mask=counts) for f in rows)
    together = (s * t.to(s.dtype)).sum(dim=0) / counts.sum().clamp(min=1)
    return reduce((1 - together).square(), (t != 0).any(dim=0), reduction)


@register(
    Card(
        key="flex_kd",
        name="Flex-KD",
        title="Task-Based Flexible Feature Distillation for LLMs",
        year=2025,
        arxiv="2507.10155",
        knowledge="feature",
        equation=r"\frac 1 D \sum_m (1 - \rho_m)^2",
        use="For a teacher wider than the student, fine-tuned on the task: features without a projector to learn. "
        "Stands beside any loss on predictions.",
        defaults={
            "of": "the log-likelihood; the paper's scalar could not be read",
            "batches": "the whole training set, as in the paper",
        },
        evidence="reading",
        choices=(
            "Of the last hidden layer (what enters the last linear one), the paper's best place; so the gradient "
            "follows from the last layer alone.",
            "Units keep their order. A student that is wider has its first units matched.",
            "The mean over units, so that the weight does not depend on the width; KD and labels with weight 1.",
            "A unit of the teacher that does not vary is left out.",
        ),
        needs=("answers",),
        tasks=("classification", "language"),
        with_labels={"cross_entropy": 1.0, "kd": 1.0},
    ),
    flex_kd_loss,
)
class FlexKD(Objective):
    """Correlation with the teacher's task-relevant units; see ``limbeck.functional.flex_kd_loss``.

    Args:
        of: What a unit must matter for: ``"loss"``, the likelihood of the label, or ``"logit"``, its logit.
        batches: How many of the training set's batches are looked at; ``None``: all.

    >>> loss = FlexKD(batches=100)
    """

    contract = Contract(normalizer="positions", at_equal=None, mask=True, decomposes=False)
    student_taps = ("penultimate",)
    teacher_taps = ("penultimate", "logits@weight", "logits@bias")
    units: Tensor | None

    def __init__(self, of: Literal["loss", "logit"] = "loss", batches: int | None = None) -> None:
        super().__init__()
        if batches is not None:
            check_positive(batches, "batches")
        self.of, self.batches, self.width = of, batches, 0
        self.register_buffer("units", None)

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        total: Tensor | None = None
        for said, known in islice(data.all_answers("flex_kd"), self.batches):
            feature, weight, bias = (said[tap] for tap in self.teacher_taps)
            found = task_scores(feature, weight, bias, known.labels, of=self.of, mask=known.mask)
            total = found if total is None else total + found
        assert total is not None, "a training set has a batch"
        self.width = len(total)
        self.units = top_ids(total.unsqueeze(0), min(student["penultimate"].shape[-1], self.width)).squeeze(0)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        units: Tensor = self.ready("units")
        own, other = student["penultimate"], teacher["penultimate"]
        check_floating(own, "student_feature", least=2)
        check_floating(other, "teacher_feature", least=2)
        if own.shape[-1] < len(units) or other.shape[-1] != self.width:
            found = f"{own.shape[-1]} and {other.shape[-1]} units"
            raise TensorError("other widths than in the dry run", where="penultimate", found=found)
        return flex_kd_loss(own[..., : len(units)], other[..., units], mask=batch.mask)

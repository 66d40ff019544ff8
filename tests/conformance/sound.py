"""Objectives that keep every promise, in the plainest form: what the mutants are made from."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.errors import DataError
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.projectors import projector
from limbeck.core.reduction import check_floating, check_logits, check_positive, check_same_shape, reduce, widen
from limbeck.core.trace import Trace
from limbeck.core.views import split_views, stack_views


class Response(Objective):
    """Softened predictions."""

    contract = Contract(normalizer="positions", mask=True, temperature="squared", spare_class=True)
    student_taps = teacher_taps = ("logits",)

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        check_positive(temperature, "temperature")
        self.temperature = temperature

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return reduce(self.values(student.logits, teacher.logits), batch.mask)

    def values(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_logits(student, teacher)
        return self.temperature**2 * self.divergence(widen(student), widen(teacher.detach()))

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        p, q = (F.log_softmax(z / self.temperature, dim=-1) for z in (student, teacher))
        return (q.exp() * (q - p)).masked_fill(q == -torch.inf, 0.0).sum(-1)


class Gap(Objective):
    """Squared distance of logits, by place."""

    contract = Contract(normalizer="positions")
    student_taps = teacher_taps = ("logits",)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        s, t = student.logits, teacher.logits.detach()
        check_logits(s, t)
        return self.values(widen(s), widen(t)).mean()

    def values(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student - teacher).square().sum(-1)


class Hint(Objective):
    """Squared distance of a projected feature."""

    contract = Contract(at_equal=None)
    student_taps = teacher_taps = ("penultimate",)
    projector: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        self.projector = None

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        self.projector = projector(student["penultimate"], teacher["penultimate"])

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        feature, hint = student["penultimate"], teacher["penultimate"].detach()
        check_floating(feature, "student_feature", least=2)
        check_floating(hint, "teacher_feature", least=2)
        projected = self.ready("projector")(feature)
        check_same_shape(projected, hint, "student_feature", "teacher_feature")
        return (projected - widen(hint)).square().mean()


class Views(Response):
    """Softened predictions of the mean over two views, which its own ``prepare`` makes of every sample."""

    contract = Contract(mask=True, temperature="squared", decomposes=False, permutation=False)

    def prepare(self, batch: Batch) -> Batch:
        if not isinstance(batch.inputs, Tensor) or batch.inputs.ndim != 4:
            raise DataError("only images have a mirror image", where="batch.inputs")
        return stack_views(batch, [batch.inputs, batch.inputs.flip(-1)])

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        check_logits(student.logits, teacher.logits)
        s, t = (sum(split_views(z, batch)) / 2 for z in (student.logits, teacher.logits))
        return reduce(self.values(s, t), None if batch.mask is None else split_views(batch.mask, batch)[0])


class Labels(Objective):
    """Cross-entropy where a label is."""

    contract = Contract(normalizer="labels", at_equal=None)
    student_taps = ("logits",)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        labels = batch.require("labels")
        check_logits(student.logits, labels=labels)
        return self.loss(widen(student.logits), labels)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        values = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none", ignore_index=-100)
        return reduce(values, labels.flatten() >= 0)

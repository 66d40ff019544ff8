"""Deliberately wrong objectives. Each has one fault, and the suite must name exactly the check meant for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.errors import TensorError
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.projectors import projector
from limbeck.core.reduction import reduce, widen
from limbeck.core.trace import Trace
from tests.conformance.sound import Gap, Hint, Labels, Response

MUTANTS: dict[str, type[Objective]] = {}
MEANT: dict[str, str] = {}
SETTING: dict[str, str] = {}
C = TypeVar("C", bound=type[Objective])


def caught_by(check: str, setting: str = "images") -> Callable[[C], C]:
    """List a mutant under the check that must catch it, and the setting in which it shows."""

    def add(cls: C) -> C:
        MUTANTS[cls.__name__], MEANT[cls.__name__], SETTING[cls.__name__] = cls, check, setting
        return cls

    return add


@caught_by("runs")
class RefusesEverything(Gap):
    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        raise TensorError("not this one", where="student_logits")


@caught_by("value")
class GivesAVector(Response):
    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return self.values(student.logits, teacher.logits)


@caught_by("at_equal")
class SoftensTheStudentAlone(Response):
    contract = Contract(normalizer="positions", mask=True)

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        p, q = F.log_softmax(student / self.temperature, dim=-1), F.log_softmax(teacher, dim=-1)
        return (q.exp() * (q - p)).sum(-1)


@caught_by("temperature")
class ForgetsTheSquare(Response):
    def values(self, student: Tensor, teacher: Tensor) -> Tensor:
        return super().values(student, teacher) / self.temperature**2


@caught_by("spare_class")
class MeanOverClasses(Response):
    def values(self, student: Tensor, teacher: Tensor) -> Tensor:
        return super().values(student, teacher) / student.shape[-1]


@caught_by("bad_temperature")
class TakesAnyTemperature(Response):
    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        self.temperature = temperature


@caught_by("gradient_flow")
class TrainsTheTeacher(Gap):
    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        loss = super().forward(student, teacher, batch)
        logits = widen(teacher.logits)
        return loss + 0.1 * logits.square().mean() - 0.1 * logits.detach().square().mean()


@caught_by("gradient_flow")
class KeepsAnIdleParameter(Hint):
    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        super().setup(student, teacher, batch, data)
        self.idle = nn.Parameter(torch.zeros(1))


@caught_by("gradcheck")
class DetachesAFactor(Gap):
    def values(self, student: Tensor, teacher: Tensor) -> Tensor:
        values = super().values(student, teacher)
        return values * values.detach()


@caught_by("inputs_untouched")
class WorksInPlace(Response):
    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        teacher.sub_(teacher.amax(dim=-1, keepdim=True))  # no prediction changes, but the teacher's tensor does
        return super().divergence(student, teacher)


@caught_by("mask", "tokens")
class IgnoresTheMask(Response):
    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return self.values(student.logits, teacher.logits).mean()


@caught_by("mask", "tokens")
class ZeroesButCountsMasked(Response):
    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        values = self.values(student.logits, teacher.logits)
        return values.mean() if batch.mask is None else reduce(values, batch.mask, "none").mean()


@caught_by("unlabelled", "tokens")
class LabelsOffByOne(Labels):
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().loss(logits, labels) if labels.ndim == 1 else super().loss(logits[:, :-1], labels[:, 1:])


@caught_by("permutation")
class FirstSampleIsAnchor(Gap):
    contract = Contract(normalizer="positions", decomposes=False)

    def values(self, student: Tensor, teacher: Tensor) -> Tensor:
        return super().values(student - 0.5 * student[:1], teacher - 0.5 * teacher[:1])


@caught_by("decomposes")
class SumInsteadOfMean(Response):
    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return reduce(self.values(student.logits, teacher.logits), batch.mask, "sum")


@caught_by("decomposes")
class CentresOverTheBatch(Gap):
    def values(self, student: Tensor, teacher: Tensor) -> Tensor:
        return super().values(student - student.mean(dim=0), teacher - teacher.mean(dim=0))


@caught_by("decomposes", "tokens")
class MeanOfMeans(Response):
    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        values = self.values(student.logits, teacher.logits)
        if batch.mask is None or values.ndim == 1:
            return reduce(values, batch.mask)
        by_sample = reduce(values, batch.mask, "none").sum(1) / batch.mask.sum(1).clamp(min=1)
        return reduce(by_sample, batch.mask.any(dim=1))


@caught_by("bad_mask", "tokens")
class TakesAnyMask(Response):
    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        values = self.values(student.logits, teacher.logits)
        if batch.mask is None:
            return values.mean()
        weight = batch.mask[: len(values)].to(values.dtype)
        weight = weight.reshape(weight.shape + (1,) * (values.ndim - weight.ndim)).expand(values.shape)
        return (values * weight).sum() / weight.sum().clamp(min=1)


@caught_by("one_sample")
class DividesByDeviation(Gap):
    contract = Contract(normalizer="positions", decomposes=False)

    def values(self, student: Tensor, teacher: Tensor) -> Tensor:
        return super().values(*(z / (self.variance(z) + 1e-3).sqrt() for z in (student, teacher)))

    def variance(self, z: Tensor) -> Tensor:
        return (z - z.mean(dim=0)).square().sum(dim=0) / torch.tensor(len(z) - 1)


@caught_by("two_classes")
class LooksAtThreeClasses(Gap):
    def values(self, student: Tensor, teacher: Tensor) -> Tensor:
        best = teacher.topk(3, dim=-1).indices
        return super().values(student.gather(-1, best), teacher.gather(-1, best))


@caught_by("half")
class EpsilonVanishes(Gap):
    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        super().forward(student, teacher, batch)
        s, t = (z / (z.norm(dim=-1, keepdim=True) + 1e-8) for z in (student.logits, teacher.logits.detach()))
        return super().forward(Trace(s), Trace(t), batch)


@caught_by("half")
class SquaresInHalf(Gap):
    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        super().forward(student, teacher, batch)
        return (student.logits - teacher.logits.detach()).square().sum(-1).mean()


@caught_by("autocast")
class MultipliesUnderAutocast(Gap):
    contract = Contract(decomposes=False)

    def values(self, student: Tensor, teacher: Tensor) -> Tensor:
        s, t = ((1e3 * z) @ (1e3 * z).transpose(-1, -2) / 1e6 for z in (student, teacher))
        return super().values(s, t)


@caught_by("large_values")
class ExponentiatesLogits(Response):
    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        p, q = ((z / self.temperature).exp() for z in (student, teacher))
        return (p / p.sum(-1, keepdim=True) - q / q.sum(-1, keepdim=True)).square().sum(-1)


@caught_by("dead_features")
class DividesByLength(Gap):
    def values(self, student: Tensor, teacher: Tensor) -> Tensor:
        return super().values(*(z / z.norm(dim=-1, keepdim=True) for z in (student, teacher)))


@caught_by("missing")
class AssumesLabels(Labels):
    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        assert batch.labels is not None
        return super().forward(student, teacher, batch)


@caught_by("misfits")
class Broadcasts(Gap):
    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return self.values(widen(student.logits), widen(teacher.logits.detach())).mean()


@caught_by("models_untouched")
class PutsTheStudentInEval(Gap):
    student: ClassVar[nn.Module]

    def prepare(self, batch: Batch) -> Batch:
        type(self).student.eval()
        return batch


@caught_by("helpers")
class ProjectsInForward(Hint):
    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        pass

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        if self.projector is None:
            self.projector = projector(student["penultimate"], teacher["penultimate"]).double()
        return super().forward(student, teacher, batch)


@caught_by("helpers")
class KeepsAPlainTensor(Gap):
    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        self.scale = torch.ones(())


@caught_by("not_set_up")
class NeedsSetupInSilence(Hint):
    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        assert self.projector is not None
        return super().forward(student, teacher, batch)


@caught_by("state")
class CountsInAPlainNumber(Gap):
    contract = Contract(normalizer="positions", decomposes=False)

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        self.seen += 1
        return super().forward(student, teacher, batch) / self.seen


@caught_by("state")
class KeepsABankOutOfState(Gap):
    contract = Contract(normalizer="positions", at_equal=None, decomposes=False)

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        shape = student.logits.shape[-1:]
        self.register_buffer("centre", student.logits.new_zeros(shape), persistent=False)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        if "centre" not in self._buffers:
            return super().forward(student, teacher, batch)
        super().forward(student, teacher, batch)
        loss = super().forward(student, Trace(teacher.logits - self.centre), batch)
        self.centre.lerp_(teacher.logits.detach().flatten(0, -2).mean(dim=0).to(self.centre.dtype), 0.5)
        return loss


@caught_by("same_seed")
class SetsTheGlobalSeed(Hint):
    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        torch.manual_seed(0)
        super().setup(student, teacher, batch, data)


@caught_by("compiled")
class BranchesOnAValue(Gap):
    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        loss = super().forward(student, teacher, batch)
        return loss * 2 if loss.item() < 0 else loss


CARD = Card(
    key="mutant",
    name="Mutant",
    title="On Mutants",
    year=2026,
    knowledge="response",
    equation="x",
    use="Never.",
    defaults={"temperature": "4"},
    evidence="formula",
)
DOCUMENTED = """:math:`x`. Source: none.

>>> 1
1
"""


@caught_by("card")
class SaysNothingOfItsChoices(Response):
    __doc__ = DOCUMENTED
    card = Card(**{**vars(CARD), "evidence": "reading"})


@caught_by("documented")
class HasNoDocumentation(Response):
    card = CARD


@caught_by("missing")
class NeedsWhatTheCardOmits(Labels):
    __doc__ = DOCUMENTED
    card = Card(**{**vars(CARD), "defaults": {}})

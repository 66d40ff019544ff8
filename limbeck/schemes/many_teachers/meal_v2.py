"""MEAL V2: a student that is trained already learns what an ensemble says, without labels, and past a discriminator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller, Losses
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.reduction import check_inside, check_positive, reduce, widen
from limbeck.core.trace import Trace
from limbeck.engine.stage import Stage
from limbeck.schemes.in_steps.bilevel import own_buffers
from limbeck.schemes.scheme import Cast, Scheme, Training, register
from limbeck.teachers.ensemble import Ensemble

Adversary = Literal["joint", "reversal", "off"]


@register(
    Card(
        key="meal_v2",
        name="MEAL V2",
        title="MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet without Tricks",
        year=2020,
        arxiv="2009.08453",
        code="szq0214/MEAL-V2",
        knowledge="scheme",
        equation=r"L = -\sum_c p_c \log q_c + L_D, \qquad p = \frac 1 M \sum_m \mathrm{softmax}(t_m)",
        use="To make a student better that has been trained before: start from its weights, take a low learning rate, "
        "no weight decay and no labels. With `loss: {kd: {temperature: 1}}`, the paper's.",
        defaults={
            "adversary": "joint, which is what the released code does; reversal is what its text says",
            "weight": "1, the code's",
            "shrink": "8, the code's",
            "lr_discriminator": "1e-4, the script's; its own schedule puts the student's in its place, as joint does",
        },
        evidence="parity",
        evidence_note="value and gradients of szq0214/MEAL-V2@59e6bca, discriminator included",
        choices=(
            "The loss is the recipe's, of the ensemble's mean probability; a KL differs from the paper's "
            "cross-entropy by a constant.",
            "Labels are refused; `labels: true` lets them in, for a comparison.",
            "With reversal, student and discriminator take turns, each with an optimizer of its own, and the last ReLU "
            "of the discriminator is left out, which would stop half of its gradient.",
            "Hidden layers of the discriminator have two units at least, where classes are few.",
        ),
        tasks=("classification", "several teachers"),
        cost="Every teacher answers each batch; with reversal all answer twice.",
    )
)
class MEALV2(Scheme):
    r"""One stage from the mean of all teachers' probabilities, with a discriminator of logits beside it.

    .. math:: L_D = \mathrm{BCE}\left( D(s), (1, 0) \right) / 2 + \mathrm{BCE}\left( D(\bar t), (0, 1) \right) / 2,
        \qquad \bar t = \frac 1 M \sum_m t_m

    ``"joint"``: student and discriminator both make it small, in one step: each helps the other to be told from the
    teachers, which the released code does. ``"reversal"``: the discriminator makes it small, the student large, each in
    its turn. ``"off"``: none.

    Args:
        adversary: ``"joint"``, ``"reversal"`` or ``"off"``.
        weight: Of :math:`L_D`.
        shrink: By how much each hidden layer of the discriminator is smaller than what it reads.
        lr_discriminator: Its learning rate, of ``"reversal"``.
        labels: Let terms of the loss in that learn from labels.

    Source: MEAL V2, arXiv 2009.08453.

    >>> from limbeck.core.objective import Terms
    >>> from limbeck.core.teacher import FrozenTeacher
    >>> from limbeck.engine import TrainConfig
    >>> from limbeck.objectives import KD
    >>> student, teachers = nn.Linear(4, 3), {name: FrozenTeacher(nn.Linear(4, 3)) for name in "ab"}
    >>> cast = Cast(student, Terms.of(KD(1.0)), None, TrainConfig(), teachers=teachers)
    >>> (training,) = MEALV2("reversal").trainings(cast)
    >>> training.stages[0].distiller.turns
    ('student', 'discriminator')
    """

    def __init__(
        self,
        adversary: Adversary = "joint",
        weight: float = 1.0,
        shrink: int = 8,
        lr_discriminator: float = 1e-4,
        labels: bool = False,
    ) -> None:
        if adversary not in get_args(Adversary):
            wanted = ", ".join(get_args(Adversary))
            raise ConfigError("no such way", where="scheme.adversary", found=repr(adversary), wanted=wanted)
        check_inside(weight, "scheme.weight", 0.0, float("inf"), closed=True)
        for name, value in (("shrink", shrink), ("lr_discriminator", lr_discriminator)):
            check_positive(value, f"scheme.{name}")
        self.adversary, self.weight, self.shrink = adversary, weight, shrink
        self.lr_discriminator, self.labels = lr_discriminator, labels

    def trainings(self, cast: Cast) -> Iterator[Training]:
        teachers = cast.need_teachers("MEAL V2 has")
        learned = [name for name, objective, _ in cast.loss.items() if not objective.teacher_taps]
        if learned and not self.labels:
            raise ConfigError(
                "MEAL V2 learns from teachers alone",
                where="loss",
                found=", ".join(learned),
                remedy="take loss: {kd: {temperature: 1}}, or say labels: true in the scheme",
            )
        yield Training([Stage("meal_v2", MEALDistiller(cast, Ensemble(teachers.values()), self), cast.config)])


class MEALDistiller(Distiller):
    """A student of an ensemble, and who tells the two apart; see :class:`MEALV2`."""

    def __init__(self, cast: Cast, voice: Ensemble, scheme: MEALV2) -> None:
        super().__init__(cast.student, cast.loss, voice, logits=cast.logits, also=("logits",))
        self.scheme = scheme
        self.judge = Discriminator(scheme.shrink, last=scheme.adversary == "joint")
        if scheme.adversary == "reversal":
            self.turns = ("student", "discriminator")

    def objectives(self) -> Iterator[Objective]:
        yield from self.loss
        if self.scheme.adversary != "off":
            yield self.judge

    def setup(self, batch: Batch, data: DataInfo | None = None) -> MEALDistiller:
        """Also size the discriminator."""
        if "logits" not in self.loss.teacher_taps:
            raise ConfigError("no term of the loss listens to logits", where="loss", found=", ".join(self.loss.names))
        super().setup(batch, data)
        if self.scheme.adversary != "off":
            prepared = self.prepare(batch)
            with own_buffers(self.student), torch.no_grad():
                said, teacher = self.traces(prepared)
            self.judge.setup(*self._common(self.judge, said, teacher), prepared, data or DataInfo())
            self.judge.to(said.logits.device)
        return self

    def parameters_of(self, turn: str) -> Iterator[nn.Parameter]:
        own = {id(p) for p in self.judge.parameters()} if len(self.turns) > 1 else set()
        return (p for p in self.parameters() if len(self.turns) == 1 or (id(p) in own) == (turn == "discriminator"))

    def settings_of(self, turn: str) -> dict[str, Any]:
        return {"lr": self.scheme.lr_discriminator} if turn == "discriminator" else {}

    def settled(self) -> dict[str, Any]:
        return dict(vars(self.scheme))

    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        prepared = self.prepare(batch)
        if turn == "discriminator":  # the student does not learn here, and nothing of it moves
            with own_buffers(self.student), torch.no_grad():
                said, teacher = self.traces(prepared)
            value = self._apart(said, teacher, prepared, batch)
            return Losses(value, {"discriminator": value.detach()}, {"discriminator": torch.ones_like(value)})
        said, teacher = self.traces(prepared)
        losses = self.compare(said, teacher, prepared, counted=batch)
        if self.scheme.adversary != "off":
            value = self._apart(said, teacher, prepared, batch)
            weight = self.scheme.weight if self.scheme.adversary == "joint" else -self.scheme.weight
            losses.total = losses.total + weight * value
            losses.terms["apart"], losses.weights["apart"] = value.detach(), value.new_tensor(weight)
        return losses

    def _apart(self, said: Trace, teacher: Trace, prepared: Batch, counted: Batch) -> Tensor:
        """How badly the two are told apart, of this part of the step."""
        return self.judge(*self._common(self.judge, said, teacher), prepared) * counted.share("positions")


class Discriminator(Objective):
    """Tells a student's logits from the mean of several teachers'; its value is its own cross-entropy.

    Args:
        shrink: By how much each hidden layer is smaller than what it reads.
        last: Keep a ReLU behind the last layer.

    >>> said = Trace(None, {"logits": torch.zeros(2, 64)})
    >>> judge = Discriminator(8, last=True)
    >>> judge.setup(said, said, Batch(None), DataInfo())
    >>> [layer.out_features for layer in judge.layers if isinstance(layer, nn.Linear)]
    [8, 2, 2]
    """

    contract = Contract(normalizer="positions", at_equal=None, mask=True)
    student_taps = teacher_taps = ("logits",)
    layers: nn.Sequential | None

    def __init__(self, shrink: int = 8, *, last: bool = True) -> None:
        super().__init__()
        self.shrink, self.last, self.layers = shrink, last, None

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        classes = student.logits.shape[-1]
        first, second = max(classes // self.shrink, 2), max(classes // self.shrink**2, 2)
        hidden = nn.Linear(classes, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 2)
        self.layers = nn.Sequential(*hidden, *([nn.ReLU()] if self.last else []))

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        layers = self.ready("layers")
        members = [member.logits for member in teacher.members] or [teacher.logits]
        mean = torch.stack([one[..., : student.logits.shape[-1]] for one in members]).mean(dim=0)
        values = []
        for rows, target in ((student.logits, (1.0, 0.0)), (mean.detach(), (0.0, 1.0))):
            told = widen(layers(rows.to(layers[0].weight.dtype)))
            wanted = told.new_tensor(target).expand_as(told)
            values.append(F.binary_cross_entropy_with_logits(told, wanted, reduction="none").mean(dim=-1))
        return reduce((values[0] + values[1]) / 2, batch.mask)

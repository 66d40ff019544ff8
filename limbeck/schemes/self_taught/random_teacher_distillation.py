"""A random teacher: a student near it learns to say what it says, without labels, and its features become better."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller
from limbeck.core.divergences import cross_entropy_rows, kl_rows, soften
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Contract, DataInfo, Objective, Terms
from limbeck.core.reduction import check_inside, check_positive
from limbeck.core.relations import pooled
from limbeck.core.teacher import FrozenTeacher
from limbeck.core.trace import Trace
from limbeck.engine.stage import Stage
from limbeck.schemes.parts.two_stages import task_stage, two_configs
from limbeck.schemes.parts.view_heads import MLPHead
from limbeck.schemes.scheme import Cast, Scheme, Training, register


@torch.no_grad()
def approach(student: nn.Module, teacher: nn.Module, other: nn.Module, alpha: float) -> None:
    r"""Start a student near a random teacher, with weights that vary as much.

    .. math:: \theta_S = \frac{(1 - \alpha)\, \theta_T + \alpha\, \theta'}{\sqrt{(1 - \alpha)^2 + \alpha^2}}

    Parameters that both draws have alike (those of normalisations) are taken as they are: they do not vary.

    Args:
        student: Its parameters and buffers are overwritten.
        teacher: :math:`\theta_T`.
        other: :math:`\theta'`, an independent draw.
        alpha: From 0, a copy of the teacher, to 1, independent of it.

    >>> student, teacher, other = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    >>> approach(student, teacher, other, 0.0)
    >>> torch.equal(student.weight, teacher.weight)
    True
    """
    student.load_state_dict(teacher.state_dict())
    size = math.hypot(1 - alpha, alpha)
    for own, far in zip(student.parameters(), other.parameters(), strict=True):
        if not torch.equal(own, far):
            own.copy_(((1 - alpha) * own + alpha * far.to(own)) / size)


@register(
    Card(
        key="random_teacher_distillation",
        name="Random teacher distillation",
        title="Random Teachers are Good Teachers",
        year=2023,
        arxiv="2302.12091",
        code="safelix/dinopl",
        knowledge="scheme",
        equation=r"L = -\sum_k p_{T,k} \log p_{S,k}, \qquad \theta_T \text{ random}, \quad \theta_S \approx \theta_T",
        use="The control of everything that teaches itself: how much better features become by distillation "
        "alone, from a teacher that knows nothing. Labels are read by the probe only, which trains the classifier on "
        "features as they are. The control `random_teacher` of a comparison is another thing: KD from such a teacher.",
        defaults={
            "alpha": "0.001: near, and beyond the rounding of float32; the released default is 0",
            "prototypes": "65536, hidden 2048, bottleneck 256: the authors' configuration; fewer do on small sets",
            "share": "10 of 11 epochs' worth, as the authors probe for 10 epochs after 100",
        },
        evidence="formula",
        evidence_note="starts, loss and gradient by hand; with alpha 0 and no normalisation nothing moves",
        choices=(
            "prototypes have length 1, as in the paper; in safelix/dinopl@cd39e77 Linear.forward leaves out the "
            "normalised weight that it is given",
            "the teacher is the student as it starts, in evaluation mode; the authors' settings are adamw, lr 0.001, "
            "no weight decay, batches of 256 and no augmentation: the recipe's to say",
            "the student's classifier learns in a second stage, by the recipe's loss: a linear probe",
        ),
    )
)
class RandomTeacherDistillation(Scheme):
    r"""Two stages: ``distill`` without labels from a random teacher, ``probe`` of what came of it.

    Both models end in a head like DINO's, which is dropped. What is told of the first stage is the divergence, and the
    entropy of the teacher, which stays; their sum is the loss.

    Args:
        alpha: How far from the teacher the student starts, 0 to 1.
        share: Of the training, for distilling.
        prototypes: Numbers that the heads end in.
        hidden: Width inside the heads.
        bottleneck: Width before the prototypes, with length 1; 0: none, the control without it.
        loss: ``"cross_entropy"``, or ``"mse"`` of what the heads say.
        then: ``"probe"``: the classifier alone learns afterwards; ``"finetune"``: the whole student.

    Source: Random Teachers are Good Teachers, arXiv 2302.12091.

    >>> RandomTeacherDistillation().alpha
    0.001
    """

    own_teacher = "may"

    def __init__(
        self,
        alpha: float = 1e-3,
        share: float = 10 / 11,
        prototypes: int = 65536,
        hidden: int = 2048,
        bottleneck: int = 256,
        loss: Literal["cross_entropy", "mse"] = "cross_entropy",
        then: Literal["probe", "finetune"] = "probe",
    ) -> None:
        check_inside(alpha, "scheme.alpha", closed=True)
        check_inside(share, "scheme.share")
        check_positive(prototypes, "scheme.prototypes")
        check_positive(hidden, "scheme.hidden")
        if bottleneck < 0:
            raise ConfigError("a width is not below zero", where="scheme.bottleneck", found=bottleneck)
        self.alpha, self.share, self.then = alpha, share, then
        self.head: dict[str, Any] = {"prototypes": prototypes, "hidden": hidden, "bottleneck": bottleneck}
        self.loss: Literal["cross_entropy", "mse"] = loss

    def trainings(self, cast: Cast) -> Iterator[Training]:
        if cast.train is None:
            raise ConfigError("there is nothing to learn from", where="train")
        student, (first, second) = cast.student, two_configs(cast.config, self.share)
        teacher = copy.deepcopy(student)
        if self.alpha:
            approach(student, teacher, cast.another(1), self.alpha)
        matching = Terms.of(HeadMatching(self.alpha, self.loss, **self.head))
        taught = Distiller(student, matching, FrozenTeacher(teacher, logits=cast.logits), logits=cast.logits)
        yield Training([Stage("distill", taught, first), task_stage(cast, self.then, second)])


class HeadMatching(Objective):
    """Two heads, one on each model's feature; the student's follows the teacher's; :class:`RandomTeacherDistillation`.

    Args:
        alpha: How far from the teacher's head the student's starts.
        loss: ``"cross_entropy"`` or ``"mse"``.
        prototypes, hidden, bottleneck: Sizes of both.
    """

    contract = Contract(at_equal=None)
    student_taps = teacher_taps = ("penultimate",)
    own: nn.Module | None
    fixed: nn.Module | None

    def __init__(
        self, alpha: float, loss: Literal["cross_entropy", "mse"], prototypes: int, hidden: int, bottleneck: int
    ) -> None:
        super().__init__()
        self.alpha, self.loss = alpha, loss
        self.sizes = [prototypes, hidden, bottleneck]
        self.own = self.fixed = None

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        feature = pooled(student["penultimate"])[0]
        self.own, self.fixed, other = (_head(feature.shape[1], *self.sizes).to(feature) for _ in range(3))
        approach(self.own, self.fixed, other, self.alpha)
        self.fixed.requires_grad_(False)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> dict[str, Tensor]:
        said = self.ready("own")(pooled(student["penultimate"])[0])
        with torch.no_grad():
            wanted = self.ready("fixed")(pooled(teacher["penultimate"])[0])
        if self.loss == "mse":
            return {"mse": (said - wanted).square().mean()}
        log_p, log_q = soften(wanted), soften(said)
        entropy = cross_entropy_rows(log_p.exp(), log_p)
        return {"divergence": kl_rows(log_p, log_q).mean(), "entropy": entropy.mean()}


def _head(width: int, prototypes: int, hidden: int, bottleneck: int) -> nn.Module:
    """DINO's head, or, without a bottleneck, three linear layers."""
    if bottleneck:
        return MLPHead(width, prototypes, hidden=hidden, bottleneck=bottleneck)
    layers = [nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, prototypes)]
    for layer in layers[::2]:
        nn.init.trunc_normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return nn.Sequential(*layers)

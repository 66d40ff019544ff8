"""Prototype-guided cross-task distillation (ProC-KD): a teacher of other classes lends prototypes of local parts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import DataError
from limbeck.core.labels import class_labels
from limbeck.core.layers import LayerObjective, Tap
from limbeck.core.layout import resize, to_map, to_tokens
from limbeck.core.objective import Contract, DataInfo
from limbeck.core.projectors import LinearProjector
from limbeck.core.reduction import Reduction, check_floating, check_positive, fit_mask, reduce, widen
from limbeck.core.relations import check_same_batch
from limbeck.core.trace import Trace
from limbeck.objectives.feature.mfd import mfd_loss
from limbeck.objectives.parts.prototypes import Prototypes


def proc_kd_loss(
    augmented: Tensor,
    prototype: Tensor,
    labels: Tensor,
    student_feature: Tensor,
    teacher_feature: Tensor,
    *,
    features: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy with prototypes in the student's feature and of the prototypes alone, and a distance of features.

    .. math:: L = \mathrm{CE}(z_{aug}, y) + \mathrm{CE}(z_{proto}, y) +
        \frac{\lambda}{L} \sum_l \left\| \frac{s_l}{\|s_l\|} - \frac{t_l}{\|t_l\|} \right\|_2^2

    Args:
        augmented: ``[B, C]``: what the student's classifier says of its own feature, augmented by the prototypes.
        prototype: ``[B, C]``: what it says of the teacher's feature in prototypes, from which these learn.
        labels: Integers ``[B]``, negative where a sample has no label; such a sample does not count.
        student_feature, teacher_feature: ``[B, L, D]``: the same places of both; the teacher's is detached.
        features: :math:`\lambda`.
        mask: ``[B]`` booleans, True where a sample counts.
        reduction: ``"mean"`` over samples that count and have a label, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: Shapes that differ, or labels that name no class.

    Source:
        Li et al., "Prototype-guided Cross-task Knowledge Distillation for Large-scale Models", 2022, arXiv 2212.13180.

    Example:
        >>> import torch
        >>> same = torch.ones(1, 4, 2)
        >>> proc_kd_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]), same, same)
        tensor(1.3863)
    """
    check_floating(augmented, "augmented", least=2)
    labels, labelled = class_labels(labels, augmented.shape[-1], "ProC-KD")
    values = F.cross_entropy(widen(augmented), labels, reduction="none")
    values = values + F.cross_entropy(widen(prototype), labels, reduction="none")
    values = values + features * mfd_loss(student_feature, teacher_feature, reduction="none").mean(dim=1)
    return reduce(values, labelled if mask is None else labelled & fit_mask(mask, values), reduction)


@register(
    Card(
        key="proc_kd",
        name="ProC-KD",
        title="Prototype-guided Cross-task Knowledge Distillation for Large-scale Models",
        year=2022,
        arxiv="2212.13180",
        code="Daniel00008/Visual_Scene_Adaptive_Framework",
        knowledge="feature",
        equation=r"\mathrm{CE}(z_{aug}, y) + \mathrm{CE}(z_{proto}, y) + "
        r"\frac{\lambda}{L} \sum_l \| \hat s_l - \hat t_l \|_2^2",
        use="When the teacher was trained for other classes than the student's: nothing of its answers is used, only "
        "what its layers know of local parts.",
        defaults={
            "number": "72, as in the authors' code",
            "features": "1; the released code holds no loss",
            "tap": "the last layer of maps or tokens",
            "teacher_tap": "the blocks, of which three are taken, evenly spaced, as in the authors' code",
        },
        evidence="reading",
        evidence_note="modules after the authors' MindSpore code at 5c81083, which holds no joint loss; VLAD and the "
        "augmentation are checked against their equations",
        choices=(
            "Prototypes and augmentation are dropped when the student ships; the paper's student may keep them.",
            "Both paths go through the student's own classifier, on the mean over places (the code's class token); the "
            "student's last normalisation is not repeated there.",
            "Features of the last layers are compared, the student's through a learned map into the teacher's width.",
        ),
        needs=("labels",),
        with_labels={"cross_entropy": 1.0},
    ),
    proc_kd_loss,
)
class ProCKD(LayerObjective):
    """Prototype-guided cross-task distillation; see ``limbeck.functional.proc_kd_loss``.

    Args:
        tap: The student's layer that is augmented.
        teacher_tap: The teacher's layers from which prototypes are learned: three of them, evenly spaced, the last one.
        number: Of prototypes.
        features: Weight of the distance of features.
    """

    contract = Contract(normalizer="labels", at_equal=None)
    prototypes: Prototypes | None

    def __init__(
        self, tap: str = "stages:-1", teacher_tap: Tap = "blocks", number: int = 72, features: float = 1.0
    ) -> None:
        super().__init__(tap, teacher_tap)
        check_positive(number, "number")
        self.number, self.features, self.prototypes = number, features, None
        self.student_taps = (tap, "logits@weight", "logits@bias")

    def _places(self, student: Trace, teacher: Trace) -> tuple[Tensor, list[Tensor]]:
        """The student's layer and three of the teacher's as tokens of the same places."""
        (own,), other = self.layers(student, teacher)
        other = [other[-(-(i + 1) * len(other) // 3) - 1] for i in range(3)]
        for layer in other:
            check_floating(layer, "teacher_feature", least=3)
            check_same_batch(own, layer, "student_feature", "teacher_feature")
        if any(layer.ndim != 3 or layer.shape[1] != own.shape[1] for layer in (own, *other)):
            own = to_map(own, "student_feature")
            other = [resize(to_map(layer), (own.shape[2], own.shape[3])) for layer in other]
        return to_tokens(own, "student_feature"), [to_tokens(layer, "teacher_feature") for layer in other]

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        own, other = self._places(student, teacher)
        width, head, last = own.shape[2], student["logits@weight"].shape[1], other[-1].shape[2]
        self.prototypes = Prototypes(sum(t.shape[2] for t in other), width, self.number).to(own.device)
        self.to_head = nn.Identity() if head == width else LinearProjector(width, head).to(own.device)
        self.to_teacher = nn.Identity() if last == width else LinearProjector(width, last).to(own.device)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        prototypes, labels = self.ready("prototypes"), batch.require("labels")
        own, other = self._places(student, teacher)
        if labels.shape != own.shape[:1]:
            raise DataError("one label a sample", where="batch.labels", found=list(labels.shape), wanted=[len(own)])
        weight, bias = (widen(student[tap]) for tap in self.student_taps[1:])
        paths = own, prototypes.learn(torch.cat(other, dim=-1))
        mine, told = (self.to_head(prototypes.augment(places)).mean(dim=1) @ weight.T + bias for places in paths)
        return proc_kd_loss(mine, told, labels, self.to_teacher(own), other[-1], features=self.features)

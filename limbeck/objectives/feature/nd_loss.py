"""Norm and direction of features (ND, the ++ of KD++): towards the teacher's class mean, and no shorter than it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import TensorError
from limbeck.core.labels import class_labels, class_means
from limbeck.core.layers import LayerObjective
from limbeck.core.objective import Contract, DataInfo
from limbeck.core.projectors import projector
from limbeck.core.reduction import Reduction, check_features, check_floating, check_same_shape, fit_mask, reduce, widen
from limbeck.core.relations import pooled, project, unit
from limbeck.core.trace import Trace


def nd_loss_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    labels: Tensor,
    means: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""How far a feature falls short of the teacher's length in the direction of the teacher's mean of its class.

    .. math:: L = 1 - \frac{s \cdot e_y}{\max(\|s\|, \|t\|)}, \qquad e_y = \frac{c_y}{\|c_y\|}

    Where the student's feature is shorter than the teacher's, the gradient lengthens it along the class mean; where it
    is longer, only its direction counts.

    Args:
        student_feature: ``[B, *, D]``, already of the teacher's width.
        teacher_feature: The same shape; detached.
        labels: Integers ``[B, *]``, negative where a place has no label; such a place does not count.
        means: ``[K, D]``: the mean :math:`c` of the teacher's features of each class over the training set. A class
            whose row is 0, since no sample showed it, adds nothing.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over places that count and have a label, ``"sum"``, or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Shapes that differ, or labels that name no class.

    Source:
        Wang et al., "Improving Knowledge Distillation via Regularizing Feature Norm and Direction", 2023, arXiv
        2305.17007.

    Example:
        >>> import torch
        >>> nd_loss_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]]), torch.tensor([0]), torch.eye(2))
        tensor(0.5000)
    """
    check_features(student_feature, teacher_feature)
    check_same_shape(student_feature[..., 0], labels, "the features' places", "labels")
    check_same_shape(student_feature.flatten(0, -2)[:1], means[:1], "a feature", "means")
    labels, labelled = class_labels(labels, len(means), "ND")
    student, teacher = widen(student_feature), widen(teacher_feature.detach())
    centre = unit(means.detach().to(student.dtype))[labels]
    longer = torch.maximum(*(torch.linalg.vector_norm(f, dim=-1) for f in (student, teacher)))
    values = 1 - (student * centre).sum(dim=-1) / longer.where(longer > 0, torch.inf)
    values = values.where(centre.any(dim=-1), 0.0)
    return reduce(values, labelled if mask is None else labelled & fit_mask(mask, values), reduction)


@register(
    Card(
        key="nd_loss",
        name="ND (KD++)",
        title="Improving Knowledge Distillation via Regularizing Feature Norm and Direction",
        year=2023,
        arxiv="2305.17007",
        code="WangYZ1608/Knowledge-Distillation-via-ND",
        knowledge="feature",
        equation=r"1 - \frac{s \cdot e_y}{\max(\|s\|, \|t\|)}, \quad e_y = c_y / \|c_y\|",
        use="Added to any other method (KD++, DKD++, DIST++, ReviewKD++ in the paper): the student's features grow as "
        "long as the teacher's and gather around its class means.",
        defaults={"tap": "what enters the classifier, as in the paper"},
        evidence="parity",
        evidence_note="value and gradient of WangYZ1608/Knowledge-Distillation-via-ND@fc6f3f9",
        choices=(
            "Between features of different widths stands a linear map that starts without bias; the authors' code puts "
            "batch normalisation and dropout before it, which tie the samples of a batch together.",
            "In the paper's sum KD rises over the first 20 of 240 epochs; beside this loss it is constant here.",
        ),
        needs=("labels", "answers"),
        with_labels={"cross_entropy": 1.0, "kd": 1.0},
        weight=2.0,
    ),
    nd_loss_loss,
)
class NDLoss(LayerObjective):
    """Norm and direction of features; see ``limbeck.functional.nd_loss_loss``.

    ``setup`` runs the teacher over the training set once, for the class means, which are saved with the objective.

    Args:
        tap: The feature; of maps, and of tokens that share a label, the mean over places.
        teacher_tap: The teacher's, where it is called otherwise.

    >>> loss = 2.0 * NDLoss()
    """

    contract = Contract(normalizer="labels", at_equal=None, mask=True)
    projector: nn.Module | None
    means: Tensor

    def __init__(self, tap: str = "penultimate", teacher_tap: str | None = None) -> None:
        super().__init__(tap, teacher_tap)
        self.student_taps, self.projector = (*self.student_taps, "logits"), None

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        s, t = (labelled(f, batch.require("labels"), None)[0] for f in self.pair(student, teacher))
        self.projector = nn.Identity()
        if s.shape[-1] != t.shape[-1]:
            self.projector = projector(s, t)
            nn.init.zeros_(self.projector.get_parameter("bias"))
        classes = data.classes or student.logits.shape[-1]
        self.register_buffer("means", class_means(self._rows(data, classes), classes)[0])

    def _rows(self, data: DataInfo, classes: int) -> Iterator[tuple[Tensor, Tensor]]:
        for trace, some in data.all_answers("nd_loss.means"):
            labels, known = class_labels(some.require("labels"), classes, "ND")
            rows, counts = labelled(trace[self.teacher_taps[0]].detach(), labels, some.mask)
            known = known if counts is None else known & fit_mask(counts, known)
            yield rows[known], labels[known]

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        s, t = self.pair(student, teacher)
        labels = batch.require("labels")
        (s, counts), (t, _) = (labelled(f, labels, batch.mask) for f in (s, t))
        return nd_loss_loss(project(self.ready("projector"), s, "student_feature"), t, labels, self.means, mask=counts)


def labelled(feature: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One vector a label, ``[B, *, D]``, and which count: the feature as it is, or the mean over a sample's places."""
    check_floating(feature, "feature", least=2)
    if labels.ndim == 1 and len(labels) == len(feature):
        return pooled(feature, mask)
    if labels.shape != feature.shape[:-1]:
        found, wanted = list(labels.shape), list(feature.shape[:-1])
        raise TensorError("a label for each sample or place", where="labels", found=found, wanted=wanted)
    return feature, mask

"""Cross-layer distillation with semantic calibration (SemCKD): each student layer attends to the teacher's layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import TensorError
from limbeck.core.heads import bottleneck, two_layers
from limbeck.core.layers import LayerObjective, Tap
from limbeck.core.layout import same_places
from limbeck.core.objective import Contract, DataInfo
from limbeck.core.precision import without_autocast
from limbeck.core.reduction import Reduction, check_features, check_floating, check_positive, reduce, widen
from limbeck.core.relations import check_same_batch, unit
from limbeck.core.trace import Trace


def semckd_loss(
    student_feature: Sequence[Tensor],
    teacher_feature: Sequence[Tensor],
    weights: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared distances between all pairs of layers, weighed for each sample by how much the layers have in common.

    .. math::
        L = \frac 1 S \sum_{s=1}^{S} \sum_{t=1}^{T} \alpha_{s,t}
        \frac 1 n \left\| \mathrm{proj}_t(F^S_s) - F^T_t \right\|_2^2, \qquad
        \alpha_{s,\cdot} = \mathrm{softmax}_t\left( Q_s^\top K_t \right)

    Args:
        student_feature: The student's projected feature ``[B, *]`` of each pair, its first layer with all first.
        teacher_feature: As many, of the same shapes; detached.
        weights: :math:`\alpha`, ``[B, S, T]``; a student layer's sum to 1.
        mask: ``[B]`` booleans, True where a sample counts.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: Not S times T features, or features of different shapes.

    Source:
        Chen et al., "Cross-Layer Distillation with Semantic Calibration", 2021, arXiv 2012.03236.

    Example:
        >>> import torch
        >>> weights = torch.tensor([[[0.25, 0.75]]])
        >>> semckd_loss([torch.zeros(1, 2)] * 2, [torch.ones(1, 2), 2 * torch.ones(1, 2)], weights)
        tensor(3.2500)
    """
    check_floating(weights, "weights", least=3)
    if not len(student_feature) == len(teacher_feature) == weights.shape[1] * weights.shape[2]:
        found, wanted = f"{len(student_feature)} and {len(teacher_feature)}", weights.shape[1] * weights.shape[2]
        raise TensorError("a feature for each pair of layers", where="student_feature", found=found, wanted=wanted)
    gaps = []
    for student, teacher in zip(student_feature, teacher_feature, strict=True):
        check_features(student, teacher)
        gaps.append((widen(student) - widen(teacher.detach())).square().flatten(1).mean(dim=1))
    return reduce((widen(weights).flatten(1) * torch.stack(gaps, dim=1)).sum(dim=1) / weights.shape[1], mask, reduction)


@without_autocast
def similarities(feature: Tensor, group: int) -> Tensor:
    """How much each sample has in common with those of its group, in order: ``[B, group]``.

    A batch ``[B, *]`` is cut into groups; what the last one lacks are zeros.
    >>> similarities(torch.tensor([[1.0], [2.0], [3.0]]), 2)
    tensor([[1., 2.],
            [2., 4.],
            [9., 0.]])
    """
    check_floating(feature, "student_feature", least=2)
    rows = widen(feature).flatten(1)
    grouped = F.pad(rows, (0, 0, 0, -len(rows) % group)).unflatten(0, (-1, group))
    return (grouped @ grouped.mT).flatten(0, 1)[: len(rows)]


@register(
    Card(
        key="semckd",
        name="SemCKD",
        title="Cross-Layer Distillation with Semantic Calibration",
        year=2021,
        arxiv="2012.03236",
        code="DefangChen/SemCKD",
        knowledge="feature",
        equation=r"\frac 1 S \sum_{s,t} \alpha_{s,t} \frac 1 n \left\| \mathrm{proj}_t(F^S_s) - F^T_t \right\|_2^2, "
        r"\quad \alpha_{s,\cdot} = \mathrm{softmax}_t(Q_s^\top K_t)",
        use="Where it is not plain which layer of the student answers to which of the teacher: every pair is compared, "
        "and attention learns which pairs count. Helpers and cost grow with the product of the numbers of layers.",
        defaults={
            "tap": "the last layer at each resolution, as in the authors' code",
            "group": "64, the paper's batch size, which is the width of its queries and keys",
        },
        evidence="parity",
        evidence_note="values and gradients of the loss, of attention and regressors of DefangChen/SemCKD@ebe5db1",
        choices=(
            "The mean over the student's layers, as in the authors' code, for which the weight 400 is meant.",
            "Similarities are told within groups of 64 samples, so that any size of batch works.",
        ),
        with_labels={"cross_entropy": 1.0, "kd": 1.0},
        weight=400.0,
        cost="Every student layer is projected to every teacher layer.",
    ),
    semckd_loss,
)
class SemCKD(LayerObjective):
    """Cross-layer distillation with semantic calibration; see ``limbeck.functional.semckd_loss``.

    Args:
        tap: The student's layers.
        teacher_tap: The teacher's; any number.
        group: How many samples are compared with one another.
    """

    contract = Contract(at_equal=None, decomposes=False, permutation=False, least_samples=2)
    regressors: nn.ModuleList | None

    def __init__(self, tap: Tap = "stages", teacher_tap: Tap | None = None, group: int = 64) -> None:
        super().__init__(tap, teacher_tap)
        check_positive(group, "group")
        self.group, self.regressors = group, None

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        layers = self.layers(student, teacher)
        device = layers[0][0].device
        sizes = self.group, 2 * max(self.group // 4, 1), max(self.group // 4, 1)
        self.queries, self.keys = (nn.ModuleList(two_layers(*sizes) for _ in side).to(device) for side in layers)
        pairs = [same_places(s, t) for s in layers[0] for t in layers[1]]
        self.regressors = nn.ModuleList(bottleneck(s.shape[1], t.shape[1]) for s, t in pairs).to(device)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        regressors = self.ready("regressors")
        layers = tuple([widen(f) for f in side] for side in self.layers(student, teacher))
        for t in layers[1]:
            check_same_batch(layers[0][0], t, "student_feature", "teacher_feature")
        query, key = (
            torch.stack([unit(embed(similarities(f, self.group))) for f, embed in zip(side, embeds, strict=True)], 1)
            for side, embeds in zip(layers, (self.queries, self.keys), strict=True)
        )
        pairs = [same_places(s, t) for s in layers[0] for t in layers[1]]
        projected = [regress(s) for regress, (s, _) in zip(regressors, pairs, strict=True)]
        return semckd_loss(projected, [t for _, t in pairs], (query @ key.mT).softmax(dim=-1))

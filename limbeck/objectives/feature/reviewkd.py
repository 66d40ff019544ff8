"""Knowledge review (ReviewKD): deep layers of the student help its shallow ones to be like the teacher's."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import TensorError
from limbeck.core.layers import LayerObjective, Tap
from limbeck.core.layout import to_map
from limbeck.core.objective import Contract, DataInfo
from limbeck.core.reduction import Reduction, check_features, check_positive, reduce, widen
from limbeck.core.relations import check_same_batch, pooled
from limbeck.core.schedules import WarmUp
from limbeck.core.trace import Trace
from limbeck.objectives.parts.fusion import Fusion


def reviewkd_loss(
    student_feature: Tensor | Sequence[Tensor],
    teacher_feature: Tensor | Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Hierarchical context loss: squared distances at several resolutions, summed over layers.

    .. math::
        L = \sum_j \frac{1}{\sum_l w_l} \sum_{l \in \{H, 4, 2, 1\}} w_l\,
        \frac 1 n \left\| \mathrm{pool}_l(F^S_j) - \mathrm{pool}_l(F^T_j) \right\|_2^2, \qquad
        w = 1, \tfrac 1 2, \tfrac 1 4, \tfrac 1 8

    The first resolution is the map's own; each of the others counts where it is smaller than the map is high.

    Args:
        student_feature: Fused maps ``[B, C, H, W]``, or a list of them, one a layer.
        teacher_feature: The same shapes; detached.
        mask: ``[B]`` booleans, True where a sample counts.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: Lists of different lengths, or features of different shapes.

    Source:
        Chen et al., "Distilling Knowledge via Knowledge Review", 2021, arXiv 2104.09044.

    Example:
        >>> import torch
        >>> reviewkd_loss(torch.zeros(1, 1, 2, 2), torch.tensor([[[[2.0, -2.0], [0.0, 0.0]]]]))
        tensor(1.3333)
    """
    students = [student_feature] if isinstance(student_feature, Tensor) else list(student_feature)
    teachers = [teacher_feature] if isinstance(teacher_feature, Tensor) else list(teacher_feature)
    if len(students) != len(teachers) or not students:
        raise TensorError("layers are paired", where="teacher_feature", found=len(teachers), wanted=len(students) or 1)
    layers = [_pyramid(s, t) for s, t in zip(students, teachers, strict=True)]
    return reduce(sum(layers[1:], layers[0]), mask, reduction)


def _pyramid(student: Tensor, teacher: Tensor) -> Tensor:
    check_features(student, teacher, least=4)
    gap = widen(student) - widen(teacher.detach())  # pooling is linear: the gap of the pooled is the pooled gap
    gaps = [gap, *(F.adaptive_avg_pool2d(gap, size) for size in (4, 2, 1) if size < gap.shape[2])]
    values = [g.square().flatten(1).mean(dim=1) * 0.5**level for level, g in enumerate(gaps)]
    return sum(values[1:], values[0]) / (2 - 0.5 ** (len(gaps) - 1))


@register(
    Card(
        key="reviewkd",
        name="ReviewKD",
        title="Distilling Knowledge via Knowledge Review",
        year=2021,
        arxiv="2104.09044",
        code="dvlab-research/ReviewKD",
        knowledge="feature",
        equation=r"\sum_j \mathrm{HCL}\left( \mathrm{ABF}(F^S_j, F^S_{j+1}, \ldots),\ F^T_j \right)",
        use="Strong between convolutional networks, for classification and detection; every layer of the teacher is "
        "reached from all deeper layers of the student. Beside a small student the fusion costs as much as itself.",
        defaults={
            "tap": "the last layer at each resolution, as in the paper",
            "teacher_tap": "beside the default tap the same before their ReLU, as in the authors' code",
            "width": "512, as in the authors' code; never wider than the deepest feature of the student",
        },
        evidence="parity",
        evidence_note="values and gradients of the loss and of the fusion of dvlab-research/ReviewKD@cede6ea (the same "
        "in megvii-research/mdistiller@a08d46f)",
        choices=("The pooled feature before the classifier is the deepest layer, as in the authors' code.",),
        with_labels={"cross_entropy": 1.0},
        weight=WarmUp(0.083),
        cost="The fusion learns convolutions at every resolution, as wide as the teacher.",
    ),
    reviewkd_loss,
)
class ReviewKD(LayerObjective):
    """Knowledge review; see ``limbeck.functional.reviewkd_loss``.

    Its usual weight is 1 after a warm-up over 20 of 240 epochs; for wide students the authors take 5 to 8.

    Args:
        tap: The student's layers, from shallow to deep; of a plural role those with the teacher's resolutions.
        teacher_tap: The teacher's.
        width: Of what is handed from layer to layer.
    """

    contract = Contract(at_equal=None, decomposes=False, least_samples=2)
    fusions: nn.ModuleList | None

    def __init__(self, tap: Tap = "stages", teacher_tap: Tap | None = None, width: int = 512) -> None:
        super().__init__(tap, "preactivations" if teacher_tap is None and tap == "stages" else teacher_tap)
        check_positive(width, "width")
        self.width, self.fusions = width, None
        self.student_taps, self.teacher_taps = (*self.student_taps, "penultimate"), (*self.teacher_taps, "penultimate")

    def _levels(self, student: Trace, teacher: Trace) -> list[tuple[Tensor, Tensor]]:
        """The pairs as maps, from shallow to deep; last the pooled features."""
        last = (pooled(trace["penultimate"])[0][:, :, None, None] for trace in (student, teacher))
        pairs = [*self.pairs(student, teacher), tuple(last)]
        return [(to_map(s, "student_feature"), to_map(t.detach(), "teacher_feature")) for s, t in pairs]

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        levels = self._levels(student, teacher)
        width = min(self.width, levels[-1][0].shape[1])
        self.fusions = nn.ModuleList(
            Fusion(s.shape[1], width, t.shape[1], i == len(levels) - 1) for i, (s, t) in enumerate(levels)
        ).to(levels[0][0].device)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        fusions, levels = self.ready("fusions"), self._levels(student, teacher)
        fused, handed = [], None
        for fusion, (s, t) in zip(reversed(fusions), reversed(levels), strict=True):
            check_same_batch(s, t, "student_feature", "teacher_feature")
            made, handed = fusion(s, handed, (t.shape[2], t.shape[3]))
            fused.append(made)
        return reviewkd_loss(fused, [t for _, t in reversed(levels)])

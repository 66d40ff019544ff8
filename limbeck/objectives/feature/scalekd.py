"""ScaleKD: a student's maps are asked for the teacher's tokens, and pass through the teacher's own last part."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.layers import LayerObjective
from limbeck.core.layout import to_map
from limbeck.core.objective import Contract, DataInfo
from limbeck.core.projectors import CrossAttentionProjector
from limbeck.core.reduction import Reduction, check_features, reduce, widen
from limbeck.core.relations import check_same_batch, unit
from limbeck.core.trace import Trace
from limbeck.objectives.parts.teacher_part import TeacherPart
from limbeck.objectives.response.kd import kd_loss


def scalekd_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    alternative_feature: Tensor | None = None,
    *,
    direct: float = 0.08,
    alternative: float = 0.06,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Dual-view mimicking: squared distance of directions, place by place, with and without each channel's mean.

    .. math::
        L = a_0 \sum_p \left\| \frac{S_p}{\|S_p\|} - \frac{T_p}{\|T_p\|} \right\|^2 +
        a_1 \sum_p \left\| \frac{S'_p - \bar S'}{\|S'_p - \bar S'\|} - \frac{T_p - \bar T}{\|T_p - \bar T\|} \right\|^2

    The second view is the paper's: a DCT, its constant part set to 0, and back. That part is the mean over places.

    Args:
        student_feature: ``[B, C, H, W]``: what a projector made of the student's map.
        teacher_feature: The same shape; detached.
        alternative_feature: What the second view's own projector made; ``None``: the same as for the first.
        direct: :math:`a_0`; alternative: :math:`a_1`.
        mask: ``[B]`` booleans, True where a sample counts.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises: TensorError: Features of different shapes.
    Source: Fan, Li, Liu and Yao, ScaleKD, 2024, arXiv 2411.06786, section 3.

    >>> import torch
    >>> student = torch.tensor([[[[1.0, 0.0]], [[0.0, 0.0]]]])
    >>> scalekd_loss(student, student.flip(1), direct=1.0, alternative=0.0)
    tensor(2.)
    """
    other = student_feature if alternative_feature is None else alternative_feature
    check_features(student_feature, teacher_feature, least=4)
    check_features(other, teacher_feature, least=4)
    s, o, t = widen(student_feature), widen(other), widen(teacher_feature.detach())
    near = (unit(s, dim=1) - unit(t, dim=1)).square().sum(dim=(1, 2, 3))
    far = (unit(_varying(o), dim=1) - unit(_varying(t), dim=1)).square().sum(dim=(1, 2, 3))
    return reduce(direct * near + alternative * far, mask, reduction)


def _varying(feature: Tensor) -> Tensor:
    """A map without its mean over places; 0 where nothing but rounding is left, which has no direction."""
    gap = feature - feature.mean(dim=(2, 3), keepdim=True)
    return gap.masked_fill(gap.norm(dim=1, keepdim=True) <= 1e-5 * feature.norm(dim=1, keepdim=True), 0.0)


@register(
    Card(
        key="scalekd",
        name="ScaleKD",
        title="ScaleKD: Strong Vision Transformers Could Be Excellent Teachers",
        year=2024,
        arxiv="2411.06786",
        code="deep-optimization/ScaleKD",
        knowledge="feature",
        equation=r"\sum_{\text{stages}} \sum_p \big( a_0 \| \hat S_p - \hat T_p \|^2 + a_1 \| \widehat{S'_p - \bar S'} "
        r"- \widehat{T_p - \bar T} \|^2 \big) + \tfrac 1 2 \mathrm{KL}(p_t \| p_s), \quad \hat x = x / \|x\|",
        use="From a large pre-trained vision transformer to any image model, given time for long training: projectors "
        "are heavy, and the student's features pass through a part of the teacher. KD is part of it.",
        defaults={"direct": "0.08; alternative: 0.06; answers: 0.5; all as in the authors' code"},
        evidence="parity",
        evidence_note="values and gradients of the losses and of the projector of deep-optimization/ScaleKD@478a7db",
        choices=("The part is the teacher's last block, which all have; the paper's is its last stage: name it.",),
        with_labels={"cross_entropy": 0.5},
    ),
    scalekd_loss,
)
class ScaleKD(LayerObjective):
    """Cross-attention projectors, two views, and the teacher's own weights; see ``limbeck.functional.scalekd_loss``.

    The student's earlier map, projected to what enters the teacher's ``part``, passes through that part, is compared
    with what comes out of it in the teacher, and asks the later map for the same. Each view has its own projectors.

    Args:
        tap: Two layers of the student, or a role: its last two, as in the paper; a single one serves as both.
        part: The teacher's last part, by name or role: a module that goes on from one tensor. ``None``: the layers of
            ``teacher_tap`` are compared directly; teacher_tap: by default, it is ``tap``.
        answers: Weight of the divergence of the predictions at temperature 1; with 0 no logits are needed.
    """

    contract = Contract(at_equal=None, decomposes=False)
    projectors: nn.ModuleList | None

    def __init__(
        self,
        tap: str | list[str] = "stages",
        part: str | None = "blocks:-1",
        teacher_tap: str | list[str] | None = None,
        direct: float = 0.08,
        alternative: float = 0.06,
        answers: float = 0.5,
    ) -> None:
        self.part = None if part is None else TeacherPart(part)
        super().__init__(tap, teacher_tap if self.part is None else list(self.part.taps[:2]))
        self.views = partial(scalekd_loss, direct=direct, alternative=alternative)
        self.answers, self.projectors, logits = answers, None, ("logits",) * bool(answers)
        self.student_taps += logits
        self.teacher_taps += logits + (self.part.taps[2:] if self.part is not None else ())

    def _last_two(self, student: Trace, teacher: Trace) -> tuple[list[Tensor], list[Tensor]]:
        own, other = ([f[0] if len(f) == 1 else f[-2], f[-1]] for f in self.layers(student, teacher))
        check_same_batch(own[1], other[1], "student_feature", "teacher_feature")
        return [to_map(f, "student_feature") for f in own], [to_map(f, "teacher_feature") for f in other]

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        own, (goal, end) = self._last_two(student, teacher)
        alone = self.part is None
        early = [CrossAttentionProjector(own[0], goal, bias=bias) for bias in (True, not alone)]
        late = [CrossAttentionProjector(own[1], end, learned=alone, bias=bias) for bias in (True, False)]
        self.projectors = nn.ModuleList(early + late)
        if self.part is not None:
            self.part.setup(teacher, "scalekd.part")

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> dict[str, Tensor]:
        own, (goal, end) = self._last_two(student, teacher)
        first, second, *last = self.ready("projectors")
        early, asked = [first(own[0]), second(own[0])], (None, None)
        if self.part is not None:
            goal, early = end, [self.part(teacher, feature) for feature in early]
            asked = tuple(early)
        late = [projector(own[1], queries) for projector, queries in zip(last, asked, strict=True)]
        parts = {"early": self.views(early[0], goal, early[1]), "late": self.views(late[0], end, late[1])}
        if not self.answers:
            return parts
        return {**parts, "answers": self.answers * kd_loss(student.logits, teacher.logits, temperature=1.0)}

"""ScaleKD: a student's maps are asked for the teacher's tokens, and pass through the teacher's own last part."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.frozen import arguments_beside, run_frozen
from limbeck.core.layers import LayerObjective
from limbeck.core.layout import to_map, to_tokens
from limbeck.core.objective import Contract, DataInfo
from limbeck.core.projectors import CrossAttentionProjector
from limbeck.core.reduction import Reduction, check_features, check_positive, reduce, widen
from limbeck.core.relations import check_same_batch, unit
from limbeck.core.trace import Trace
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

    The second view is the paper's: maps through a DCT over height and width, without their constant part, and back. The
    constant part is the mean over places, so no transform is needed.

    Args:
        student_feature: ``[B, C, H, W]``: what a projector made of the student's map.
        teacher_feature: The same shape; detached.
        alternative_feature: What the second view's own projector made; ``None``: the same as for the first.
        direct: :math:`a_0`.
        alternative: :math:`a_1`.
        mask: ``[B]`` booleans, True where a sample counts.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: Features of different shapes.

    Source: Fan, Li, Liu and Yao, "ScaleKD: Strong Vision Transformers Could Be Excellent Teachers", 2024,
        arXiv 2411.06786, section 3.

    >>> import torch
    >>> student, teacher = torch.tensor([[[[1.0, 0.0]], [[0.0, 0.0]]]]), torch.tensor([[[[0.0, 0.0]], [[1.0, 0.0]]]])
    >>> scalekd_loss(student, teacher, direct=1.0, alternative=0.0)
    tensor(2.)
    """
    other = student_feature if alternative_feature is None else alternative_feature
    check_features(student_feature, teacher_feature, least=4)
    check_features(other, teacher_feature, least=4)
    s, o, t = widen(student_feature), widen(other), widen(teacher_feature.detach())
    near = (unit(s, dim=1) - unit(t, dim=1)).square().flatten(1).sum(dim=1)
    far = (unit(_varying(o), dim=1) - unit(_varying(t), dim=1)).square().flatten(1).sum(dim=1)
    return reduce(direct * near + alternative * far, mask, reduction)


def _varying(feature: Tensor) -> Tensor:
    """A map without its mean over places; 0 where nothing but rounding is left, whose direction means nothing."""
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
        equation=r"\sum_{\text{stages}} \sum_p a_0 \left\| \frac{S_p}{\|S_p\|} - \frac{T_p}{\|T_p\|} \right\|^2 + a_1 "
        r"\left\| \frac{S'_p - \bar S'}{\|S'_p - \bar S'\|} - \frac{T_p - \bar T}{\|T_p - \bar T\|} \right\|^2 + "
        r"\tfrac 1 2 \mathrm{KL}(p_t \| p_s)",
        use="From a large pre-trained vision transformer to any image model, given time for long training: projectors "
        "are heavy, and the student's features pass through a part of the teacher. KD is part of it.",
        defaults={
            "tap": "the last two resolutions, as in the paper: stages 3 and 4",
            "part": "the teacher's last block, which every model has; the paper's is its whole last stage: name it",
            "direct": "0.08, alternative 0.06, answers 0.5, sharpness 5: all as in the authors' code",
            "heads": "8, as in the authors' code for DeiT; 16 and 24 from Swin-L to ResNet-50",
        },
        evidence="parity",
        evidence_note="values and gradients of the losses and of the projector of deep-optimization/ScaleKD@478a7db",
        choices=(
            "The answers are compared by the divergence; the code's cross-entropy has the same gradient.",
            "A student with one resolution gives the same layer twice; name two in ``tap``.",
        ),
        with_labels={"cross_entropy": 0.5},
    ),
    scalekd_loss,
)
class ScaleKD(LayerObjective):
    """Cross-attention projectors, two views, and the teacher's own weights; see ``limbeck.functional.scalekd_loss``.

    The student's earlier map, projected to what enters the teacher's ``part``, passes through that part and is compared
    with what comes out of it in the teacher; it also asks the later map for the same. Each view has its own projectors.
    Gradient flows through the part, never into it.

    Args:
        tap: Two layers of the student, or a role: its last two.
        part: The teacher's last part, by name or role: a module that goes on from one tensor, such as ``layer4``.
            ``None``: the teacher's layers of ``teacher_tap`` are compared directly.
        teacher_tap: Without a part: as ``tap``, where the teacher's are called otherwise.
        direct: Weight of the maps as they are.
        alternative: Weight of the maps without their means.
        answers: Weight of the divergence of the predictions at temperature 1; with 0 no logits are needed.
        heads: Of the projectors' attention, or as many of them as divide the teacher's width.
        sharpness: Of the projectors' attention.
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
        heads: int = 8,
        sharpness: float = 5.0,
    ) -> None:
        super().__init__(tap, teacher_tap if part is None else [f"{part}@in", part])
        check_positive(heads, "heads")
        self.part, self.answers, self.heads, self.sharpness = part, answers, heads, sharpness
        self.views = partial(scalekd_loss, direct=direct, alternative=alternative)
        self.projectors, self.given = None, dict[str, Any]()
        logits = ("logits",) if answers else ()
        self.student_taps += logits
        self.teacher_taps += logits if part is None else (f"{part}@module", *logits)

    def _last_two(self, student: Trace, teacher: Trace) -> tuple[list[Tensor], list[Tensor]]:
        own, other = ([f[0] if len(f) == 1 else f[-2], f[-1]] for f in self.layers(student, teacher))
        check_same_batch(own[1], other[1], "student_feature", "teacher_feature")
        return [to_map(f, "student_feature") for f in own], other

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        own, other = self._last_two(student, teacher)
        make = partial(CrossAttentionProjector, heads=self.heads, sharpness=self.sharpness)
        reused, (early, late) = self.part is not None, (to_map(f, "teacher_feature") for f in other)
        self.projectors = nn.ModuleList(
            [make(own[0], early, bias=view == 0 or reused) for view in range(2)]
            + [make(own[1], late, bias=view == 0, learned=not reused) for view in range(2)]
        )
        if reused:
            entering = early if other[0].ndim == 4 else to_tokens(early)
            self.given = arguments_beside(teacher[f"{self.part}@module"], entering, "scalekd.part")

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> dict[str, Tensor]:
        own, other = self._last_two(student, teacher)
        (first, second, *last), (goal, end) = self.ready("projectors"), (to_map(f, "teacher_feature") for f in other)
        early = [first(own[0]), second(own[0])]
        asked: list[Tensor | None] = [None, None]
        if self.part is not None:
            part = teacher[f"{self.part}@module"]
            entering = early if other[0].ndim == 4 else [to_tokens(m) for m in early]
            early, goal = [to_map(run_frozen(part, m, **self.given)) for m in entering], end
            asked = [*early]
        late = [projector(own[1], queries) for projector, queries in zip(last, asked, strict=True)]
        parts = {"early": self.views(early[0], goal, early[1]), "late": self.views(late[0], end, late[1])}
        if self.answers:
            parts["answers"] = self.answers * kd_loss(student.logits, teacher.logits, temperature=1.0)
        return parts

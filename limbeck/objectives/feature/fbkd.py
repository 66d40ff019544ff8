"""Feature-based distillation for detectors (FBKD): what attention finds important, and how places go together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.layers import LayerObjective, Tap
from limbeck.core.layout import same_places
from limbeck.core.objective import Contract, DataInfo
from limbeck.core.precision import without_autocast
from limbeck.core.reduction import Reduction, check_features, check_floating, check_positive, reduce, widen
from limbeck.core.relations import check_same_batch
from limbeck.core.trace import Trace
from limbeck.objectives.parts.non_local import RelationHeads


@without_autocast
def fbkd_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    adapted: Tensor,
    channels: Tensor,
    places: Tensor,
    student_relation: Tensor,
    teacher_relation: Tensor,
    *,
    temperature: float = 0.5,
    channel_mask: bool = True,
    masked_weight: float = 7e-5,
    pooled_weight: float = 4e-3,
    relation_weight: float = 7e-5,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Distances between features where attention is, between their pooled forms, and between their relations.

    .. math::
        L &= \alpha \Big\| \sqrt{M^s M^c} \, (F^T - f(F^S)) \Big\|_2 + \beta \big( \| \bar F^T_c - f_c \|_2
            + \| \bar F^T_s - f_s \|_2 \big) + \gamma \| r^T - f_r(r^S) \|_2 \\
        M^s &= \frac{HW}{2} \sum_{X \in S, T} \mathrm{softmax}_{hw} \Big( \frac 1 {C \tau} \sum_c |F^X_c| \Big), \qquad
        M^c = \frac{C}{2} \sum_{X \in S, T} \mathrm{softmax}_c \Big( \frac 1 {HW \tau} \sum_{hw} |F^X_{hw}| \Big)

    :math:`\bar F_c` and :math:`\bar F_s` are means over places and over channels. The masks carry no gradient.

    Args:
        student_feature, teacher_feature: ``[B, C, H, W]`` of one size; the teacher's is detached.
        adapted: :math:`f(F^S)`, the teacher's shape.
        channels, places: :math:`f_c` ``[B, C]`` and :math:`f_s` ``[B, 1, H, W]``: adapted means of the student.
        student_relation, teacher_relation: :math:`f_r(r^S)` and :math:`r^T` from non-local blocks, the teacher's shape.
        temperature: :math:`\tau`; 0.5 as in mmrazor.
        channel_mask: Use :math:`M^c`. The student's is that of ``adapted`` where widths differ.
        masked_weight, pooled_weight, relation_weight: :math:`\alpha, \beta, \gamma`; as in mmrazor.
        mask: Booleans ``[B]``, True where a sample counts.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises: LimbeckError where shapes do not fit, or the temperature is not above zero.

    Source: Zhang and Ma, "Improve Object Detection with Feature-based Knowledge Distillation", ICLR 2021.

    >>> import torch
    >>> t, s = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)
    >>> fbkd_loss(s, t, s, s[..., 0, 0], s, s, t, masked_weight=1.0, pooled_weight=0.0, relation_weight=0.0)
    tensor(1.4142)
    """
    check_floating(student_feature, "student_feature", least=4)
    check_same_batch(student_feature, teacher_feature, "student_feature", "teacher_feature")
    check_features(adapted, teacher_feature, least=4)
    check_features(student_relation, teacher_relation)
    check_positive(temperature, "temperature")
    student, teacher, adapted = widen(student_feature).detach(), widen(teacher_feature).detach(), widen(adapted)
    weight = 0.5 * (_attention(student, (1,), temperature) + _attention(teacher, (1,), temperature))
    if channel_mask:
        like = student if student.shape == teacher.shape else adapted.detach()
        weight = weight * 0.5 * (_attention(like, (2, 3), temperature) + _attention(teacher, (2, 3), temperature))
    gaps = (
        (masked_weight, weight.sqrt() * (teacher - adapted)),
        (pooled_weight, teacher.mean(dim=(2, 3)) - widen(channels)),
        (pooled_weight, teacher.mean(dim=1, keepdim=True) - widen(places)),
        (relation_weight, widen(teacher_relation) - widen(student_relation)),
    )
    values = torch.stack([scale * torch.linalg.vector_norm(gap.flatten(1), dim=1) for scale, gap in gaps])
    return reduce(values.sum(dim=0), mask, reduction)


def _attention(feature: Tensor, over: tuple[int, ...], temperature: float) -> Tensor:
    """A softmax of mean magnitudes, times how many there are: 1 on average."""
    magnitude = feature.abs().mean(dim=over, keepdim=True)
    return (magnitude.flatten(1) / temperature).softmax(dim=1).reshape(magnitude.shape) * magnitude[0].numel()


@register(
    Card(
        key="fbkd",
        name="FBKD",
        title="Improve Object Detection with Feature-based Knowledge Distillation: Towards Accurate and Efficient "
        "Detectors",
        year=2021,
        code="ArchipLab-LinfengZhang/Object-Detection-Knowledge-Distillation-ICLR2021",
        knowledge="feature",
        equation=r"\alpha \| \sqrt{M^s M^c} (F^T - f(F^S)) \|_2 + \beta ( \| \bar F^T_c - f_c \|_2 "
        r"+ \| \bar F^T_s - f_s \|_2 ) + \gamma \| r^T - f_r(r^S) \|_2",
        use="Between the pyramids of two detectors: strong responses count more, and relations between places, too.",
        defaults={"temperature": "0.5, as in mmrazor", "pool": "1; mmrazor's detectors pool 2 to 8 on large maps"},
        evidence="parity",
        evidence_note="open-mmlab/mmrazor@90c7af1, one sample at a time: its modules' outputs, and value and gradients "
        "without the channel mask, which, it notes, the authors' code leaves out",
        choices=(
            "Norms by sample, as in the paper; the code takes them over the batch.",
            "Both masks, as in the paper. Pooled features are compared after adaptation, with their sign, as in code.",
            "Of maps of different sizes the larger is pooled; the adaptations lead to the teacher's width.",
        ),
        tasks=("detection", "classification"),
        with_labels={"cross_entropy": 1.0},
    ),
    fbkd_loss,
)
class FBKD(LayerObjective):
    """Feature-based distillation for detectors; see ``limbeck.functional.fbkd_loss``. Layers add up.

    Args:
        tap: Where: a plural role, whose layers are paired by resolution, or layers, paired in order.
        teacher_tap: The teacher's, where they are called otherwise.
        temperature: Of the masks.
        pool: Of keys and values in the non-local blocks.

    >>> loss = FBKD(["neck.fpn_convs.0.conv", "neck.fpn_convs.1.conv"], pool=8)
    """

    contract = Contract(normalizer="samples", at_equal=None, decomposes=False, stop_gradient=True)
    heads: nn.ModuleList | None

    def __init__(
        self, tap: Tap = "stages", teacher_tap: Tap | None = None, temperature: float = 0.5, pool: int = 1
    ) -> None:
        super().__init__(tap, teacher_tap)
        check_positive(temperature, "temperature")
        check_positive(pool, "pool")
        self.temperature, self.pool, self.heads = temperature, pool, None

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        pairs = [same_places(s, t) for s, t in self.pairs(student, teacher)]
        self.heads = nn.ModuleList(RelationHeads(s.shape[1], t.shape[1], self.pool).to(s.device) for s, t in pairs)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        pairs = ((heads, *same_places(s, t)) for heads, s, t in self.each("heads", student, teacher))
        return torch.stack([fbkd_loss(s, t, *h(s, t), temperature=self.temperature) for h, s, t in pairs]).sum()

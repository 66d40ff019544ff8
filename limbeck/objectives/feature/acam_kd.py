"""Adaptive and cooperative attention masking (ACAM-KD): masks told from what student and teacher make together."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.layers import SameWidth, Tap
from limbeck.core.layout import to_map
from limbeck.core.objective import Contract, DataInfo
from limbeck.core.projectors import ConvProjector
from limbeck.core.reduction import Reduction, check_features, check_positive, reduce, widen
from limbeck.core.trace import Trace
from limbeck.objectives.parts.regions import check_masks, masked_mean, overlap


def acam_kd_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    channel_masks: Tensor,
    place_masks: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared distance of two maps under soft masks over channels and over places, each by its own mass.

    .. math::
        L = \frac 1 M \sum_m \frac{\| M^c_m \odot D \|^2}{H W \sum_k M^c_{m,k}} +
            \frac 1 M \sum_m \frac{\| M^s_m \odot D \|^2}{C \sum_p M^s_{m,p}}, \qquad D = F_T - F_S

    Args:
        student_feature: Maps ``[B, C, H, W]``, already of the teacher's width.
        teacher_feature: The same shape; detached.
        channel_masks: ``[B, M, C]``, from 0 to 1.
        place_masks: ``[B, M, H, W]``, from 0 to 1.
        mask: ``[B]`` booleans, True where a sample counts.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: Features of different shapes, or masks that lie elsewhere.

    Source:
        Lan and Tian, "ACAM-KD: Adaptive and Cooperative Attention Masking for Knowledge Distillation", 2025, arXiv
        2503.06307.

    Example:
        >>> import torch
        >>> student, teacher = torch.zeros(1, 2, 1, 2), torch.tensor([[[[1.0, 3.0]], [[0.0, 0.0]]]])
        >>> acam_kd_loss(student, teacher, torch.tensor([[[1.0, 0.0]]]), torch.ones(1, 1, 1, 2))
        tensor(7.5000)
    """
    check_features(student_feature, teacher_feature, least=4)
    shape = teacher_feature.shape
    check_masks(channel_masks, shape[:2], "channel_masks")
    check_masks(place_masks, (shape[0], *shape[2:]), "place_masks")
    gap = (widen(student_feature) - widen(teacher_feature.detach())).square().flatten(2)
    by_channel = masked_mean(gap.mean(dim=2), channel_masks)
    by_place = masked_mean(gap.mean(dim=1), place_masks.flatten(2))
    return reduce((by_channel + by_place).mean(dim=1), mask, reduction)


class CooperativeMasks(nn.Module):
    """The masks of one pair of layers: ``units`` of each kind that look at the student as the teacher attends to it."""

    def __init__(self, width: int, units: int) -> None:
        super().__init__()
        self.query, self.key = (ConvProjector(width, max(width // 2, 1), 1, bias=False) for _ in range(2))
        self.value = ConvProjector(width, width, 1)
        self.channels = nn.Parameter(0.02 * torch.randn(units, 1))
        self.places = nn.Parameter(0.02 * torch.randn(units, width))

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Masks ``[B, M, C]`` and ``[B, M, H, W]`` of two maps ``[B, C, H, W]``, which get no gradient."""
        student, teacher = student.detach(), teacher.detach()
        query, key, value = (m.flatten(2).mT for m in (self.query(teacher), self.key(student), self.value(student)))
        fused = F.scaled_dot_product_attention(query, key, value).to(self.places.dtype)  # [B, HW, C]
        by_place = (self.places @ fused.mT).sigmoid().unflatten(2, teacher.shape[2:])
        return (self.channels @ fused.mean(dim=1, keepdim=True)).sigmoid(), by_place


@register(
    Card(
        key="acam_kd",
        name="ACAM-KD",
        title="ACAM-KD: Adaptive and Cooperative Attention Masking for Knowledge Distillation",
        year=2025,
        arxiv="2503.06307",
        knowledge="feature",
        equation=r"\frac 1 M \sum_m \frac{\| M^c_m \odot D \|^2}{H W \sum_k M^c_{m,k}} + "
        r"\frac 1 M \sum_m \frac{\| M^s_m \odot D \|^2}{C \sum_p M^s_{m,p}} + \lambda L_{div}",
        use="For dense prediction (necks of detectors, maps of segmentation models): which places and channels count "
        "is told anew at each step from student and teacher together, and changes as the student learns.",
        defaults={
            "units": "6, the paper's for detection (segmentation: the number of classes)",
            "diversity": "1, the paper's",
            "tap": "the last layer of maps; the paper takes all levels of a detector's neck, or the segmentation map",
        },
        evidence="reading",
        evidence_note="the masked distances and the overlap are those of MasKD, which are compared with its code",
        choices=(
            "The masked distance is divided by the mask's mass, as in MasKD; notes on the paper leave that open.",
            "The diversity loss is the mean over pairs of masks and over the two kinds.",
            "No gradient runs through the attention into the student; units start with deviation 0.02.",
            "The student is the key and value and the teacher the query, as the paper's ablation prefers.",
        ),
        tasks=("classification", "segmentation", "detection"),
        with_labels={"cross_entropy": 1.0},
    ),
    acam_kd_loss,
)
class ACAMKD(SameWidth):
    """Adaptive and cooperative attention masking, summed over pairs; see ``limbeck.functional.acam_kd_loss``.

    Args:
        tap: Where to listen: a place, or several, paired in order (a plural role: by resolution or depth).
        teacher_tap: The teacher's, where they are called otherwise.
        units: Masks of each kind.
        diversity: Weight of the loss that keeps masks apart.
    """

    contract = Contract(at_equal=None, stop_gradient=True)
    masks: nn.ModuleList | None

    def __init__(
        self, tap: Tap = "stages:-1", teacher_tap: Tap | None = None, units: int = 6, diversity: float = 1.0
    ) -> None:
        super().__init__(tap, teacher_tap)
        check_positive(units, "units")
        self.units, self.diversity, self.masks = units, diversity, None

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        super().setup(student, teacher, batch, data)
        maps = [to_map(t) for _, t in self.features(student, teacher)]
        self.masks = nn.ModuleList(CooperativeMasks(m.shape[1], self.units) for m in maps).to(maps[0].device)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> dict[str, Tensor]:
        masked, diversity = [], []
        for cooperate, (s, t) in zip(self.ready("masks"), self.features(student, teacher), strict=True):
            s, t = to_map(s, "student_feature"), to_map(t, "teacher_feature")
            channels, places = cooperate(s, t)
            masked.append(acam_kd_loss(s, t, channels, places))
            diversity.append(reduce(overlap(channels) + overlap(places)) / 2)
        return {"masked": sum(masked[1:], masked[0]), "diversity": self.diversity * sum(diversity[1:], diversity[0])}

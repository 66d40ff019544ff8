"""Attention-based feature distillation (AFD): each layer of the teacher chooses the student layers that follow it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import TensorError
from limbeck.core.heads import BatchNorm
from limbeck.core.layers import LayerObjective, Tap
from limbeck.core.layout import to_map
from limbeck.core.objective import Contract, DataInfo
from limbeck.core.projectors import LinearProjector
from limbeck.core.reduction import Reduction, check_floating, check_positive, reduce, widen
from limbeck.core.relations import check_same_batch, unit
from limbeck.core.trace import Trace


def afd_loss(
    student_feature: Sequence[Tensor],
    teacher_feature: Sequence[Tensor],
    weights: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared distances between where layers are active, over all pairs, weighed by the teacher layer's attention.

    .. math::
        L = \sum_t \sum_s \alpha_{t,s} \frac 1 n
        \left\| \frac{\phi(h^T_t)}{\|\phi(h^T_t)\|} - \frac{\phi(h^S_s)}{\|\phi(h^S_s)\|} \right\|_2^2, \qquad
        \phi(h) = \mathrm{pool}_t\left( \frac 1 C \sum_c h_c^2 \right)

    Args:
        student_feature: The student's maps ``[B, C, H, W]``; their activity is pooled to each teacher map's size.
        teacher_feature: The teacher's; detached.
        weights: :math:`\alpha`, ``[B, T, S]``; a teacher layer's sum to 1.
        mask: ``[B]`` booleans, True where a sample counts.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: Weights of other numbers of layers, or features of other samples.

    Source:
        Ji et al., "Show, Attend and Distill", 2021, arXiv 2102.02973.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 2.0]]]])
        >>> afd_loss([student, teacher], [teacher], torch.tensor([[[0.25, 0.75]]]))
        tensor(0.2500)
    """
    check_floating(weights, "weights", least=3)
    if weights.shape[1:] != (len(teacher_feature), len(student_feature)):
        raise TensorError(
            "a weight for each pair of layers",
            where="weights",
            found=list(weights.shape),
            wanted=[len(weights), len(teacher_feature), len(student_feature)],
        )
    values: list[Tensor] = []
    energies = [_energy(s, "student_feature") for s in student_feature]
    pooled: dict[tuple[int, int], Tensor] = {}  # by size, since many layers of the teacher share one
    for i, feature in enumerate(teacher_feature):
        check_same_batch(weights, feature, "weights", "teacher_feature")
        goal = _energy(feature.detach(), "teacher_feature")
        size = (goal.shape[2], goal.shape[3])
        if size not in pooled:
            maps = [F.adaptive_avg_pool2d(e, size).flatten(1) for e in energies]
            pooled[size] = unit(torch.stack(maps, dim=1))  # [B, S, places]
        gaps = (pooled[size] - unit(goal.flatten(1)).unsqueeze(1)).square().mean(dim=2)
        values.append((widen(weights[:, i]) * gaps).sum(dim=1))
    return reduce(torch.stack(values).sum(dim=0), mask, reduction)


def _energy(feature: Tensor, name: str) -> Tensor:
    return widen(to_map(feature, name)).square().mean(dim=1, keepdim=True)


@register(
    Card(
        key="afd",
        name="AFD",
        title="Show, Attend and Distill: Knowledge Distillation via Attention-based Feature Matching",
        year=2021,
        arxiv="2102.02973",
        code="clovaai/attention-feature-distillation",
        knowledge="feature",
        equation=r"\sum_{t,s} \alpha_{t,s} \frac 1 n \left\| \bar\phi(h^T_t) - \bar\phi(h^S_s) \right\|_2^2, \quad "
        r"\alpha_t = \mathrm{softmax}_s\left( \frac{q_t^\top W_t k_s + p_t^\top p_s}{\sqrt d} \right)",
        use="Attention transfer without pairing layers by hand: all blocks of both models take part, and each block of "
        "the teacher finds the student's blocks that can follow it.",
        defaults={"tap": "all blocks, as in the authors' code", "dim": "128, as in the authors' code"},
        evidence="parity",
        evidence_note="values and gradients of the loss and of the attention of "
        "clovaai/attention-feature-distillation@dd990d0",
        with_labels={"cross_entropy": 1.0, "kd": 0.9},
        weight=200.0,
    ),
    afd_loss,
)
class AFD(LayerObjective):
    """Attention-based feature distillation; see ``limbeck.functional.afd_loss``.

    Args:
        tap: The student's layers.
        teacher_tap: The teacher's; any number.
        dim: Width of queries and keys.
    """

    contract = Contract(at_equal=None, decomposes=False, least_samples=2)
    keys: nn.ModuleList | None

    def __init__(self, tap: Tap = "blocks", teacher_tap: Tap | None = None, dim: int = 128) -> None:
        super().__init__(tap, teacher_tap)
        check_positive(dim, "dim")
        self.dim, self.keys = dim, None

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        own, other = self.layers(student, teacher)
        widths = [[to_map(f).shape[1] for f in side] for side in (own, other)]
        device, dim = own[0].device, self.dim
        self.keys, self.queries = (
            nn.ModuleList(nn.Sequential(LinearProjector(w, dim), BatchNorm(dim)) for w in side).to(device)
            for side in widths
        )
        self.bilinear = nn.Sequential(nn.Linear(dim, dim * len(other)), BatchNorm(dim * len(other))).to(device)
        self.student_place, self.teacher_place = (
            nn.Parameter(nn.init.xavier_normal_(torch.empty(len(side), dim, device=device))) for side in widths
        )

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        keys, (own, other) = self.ready("keys"), self.layers(student, teacher)
        check_same_batch(own[0], other[0], "student_feature", "teacher_feature")
        key, query = (
            torch.stack(
                [layer(widen(to_map(f)).mean(dim=(2, 3))) for layer, f in zip(layers, side, strict=True)], dim=1
            )
            for layers, side in ((keys, own), (self.queries, other))
        )  # [B, S, d] and [B, T, d]
        key = self.bilinear(key.relu().flatten(0, 1)).view(*key.shape[:2], len(other), self.dim)
        logits = torch.einsum("bstd,btd->bts", key, query) + self.teacher_place @ self.student_place.T
        return afd_loss(own, other, (logits / self.dim**0.5).softmax(dim=-1))

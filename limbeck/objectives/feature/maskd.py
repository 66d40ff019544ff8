"""Masked distillation with receptive tokens (MasKD): learned tokens mark the regions in which features are compared."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.layers import SameWidth
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.reduction import Reduction, check_features, check_positive, reduce, widen
from limbeck.core.trace import Trace
from limbeck.objectives.parts.regions import Receptors, check_masks, in_places, masked_mean


def maskd_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    masks: Tensor,
    weights: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared distance of two maps under several soft masks, each by its own mass.

    .. math:: L = \sum_k w_k \frac{1}{C \sum_i M_{k,i}} \sum_i M_{k,i}^2 \left\| T_i - S_i \right\|_2^2

    Args:
        student_feature: Maps ``[B, C, H, W]``, already of the teacher's width.
        teacher_feature: The same shape; detached.
        masks: ``[B, K, H, W]``, from 0 to 1.
        weights: ``[B, K]``, of sum 1; ``None``: all alike.
        mask: ``[B]`` booleans, True where a sample counts.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: Features of different shapes, or masks that lie elsewhere.

    Source:
        Huang et al., "Masked Distillation with Receptive Tokens", 2023, arXiv 2205.14589.

    Example:
        >>> import torch
        >>> maskd_loss(torch.zeros(1, 1, 1, 2), torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([[[[0.0, 1.0]]]]))
        tensor(9.)
    """
    check_features(student_feature, teacher_feature, least=4)
    check_masks(masks, (len(teacher_feature), *teacher_feature.shape[2:]), "masks")
    gap = (widen(student_feature) - widen(teacher_feature.detach())).square().mean(dim=1)
    values = masked_mean(gap.flatten(1), masks.flatten(2))
    return reduce(values.mean(dim=1) if weights is None else (values * weights).sum(dim=1), mask, reduction)


@register(
    Card(
        key="maskd",
        name="MasKD",
        title="Masked Distillation with Receptive Tokens",
        year=2023,
        arxiv="2205.14589",
        code="hunto/MasKD",
        knowledge="feature",
        equation=r"\sum_k w_k \frac{1}{C \sum_i M_{k,i}} \sum_i M_{k,i}^2 \left\| T_i - S_i \right\|_2^2, \quad "
        r"M = \sigma(E\, T)",
        use="Where some regions of a map matter more than others, as in detection and segmentation: the regions are "
        "learned from the teacher, and each counts by its mean, however small it is.",
        defaults={
            "tokens": "6, as in the authors' detection runs",
            "custom": "0.03: from there on a place counts by the student's mask too, as in the authors' code after "
            "5000 of 180000 steps",
            "tap": "the last layer of maps, which the classifier pools",
        },
        evidence="parity",
        evidence_note="values and gradients of the loss, and of the masks' overlap, of hunto/MasKD@b5af34f",
        choices=(
            "The tokens learn from the teacher's own answer instead of its task loss: no labels are needed, and any "
            "classifier over pooled places will do.",
            "In one stage the tokens learn beside the student, which does not move them; the paper trains them first, "
            "as does a scheme that asks for an opening.",
        ),
        tasks=("classification", "segmentation", "detection"),
        with_labels={"cross_entropy": 1.0},
    ),
    maskd_loss,
)
class MasKD(SameWidth):
    """Masked distillation with receptive tokens; see ``limbeck.functional.maskd_loss``.

    Args:
        tap: Where to listen: one layer.
        teacher_tap: The teacher's, where it is called otherwise; its classifier takes what this layer gives, pooled.
        tokens: How many regions.
        custom: From which progress on the student's masks count too; 1: never.
    """

    contract = Contract(at_equal=None)

    def __init__(
        self, tap: str = "stages:-1", teacher_tap: str | None = None, tokens: int = 6, custom: float = 0.03
    ) -> None:
        super().__init__(tap, teacher_tap)
        check_positive(tokens, "tokens")
        self.receptors, self.custom, self.opened = Receptors(self.teacher_taps[0], tokens), custom, False
        self.teacher_taps = self.receptors.teacher_taps

    def opening(self) -> Objective:
        self.opened = True
        return self.receptors

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        super().setup(student, teacher, batch, data)
        if not self.opened or self.receptors.tokens is None:
            self.receptors.setup(student, teacher, batch, data)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> dict[str, Tensor]:
        s, t = (in_places(f) for f in self.features(student, teacher)[-1])
        tokens = self.receptors.ready("tokens")
        with torch.no_grad():
            masks, weights = tokens.masks(t), tokens.weights(t)
            late = torch.as_tensor(batch.progress) >= self.custom
            masks = torch.where(late & (self.custom < 1), masks * tokens.masks(s), masks)
        parts = {} if self.opened else self.receptors(student, teacher, batch)
        return {"masked": maskd_loss(s, t, masks, weights), **parts}

"""Feature distillation through an orthogonal projection (VkD)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import ConfigError
from limbeck.core.layers import LayerObjective
from limbeck.core.objective import Contract, DataInfo
from limbeck.core.precision import without_autocast
from limbeck.core.projectors import OrthogonalProjector
from limbeck.core.reduction import Reduction, check_features, reduce, widen
from limbeck.core.relations import channel_dim, check_same_batch, pooled
from limbeck.core.trace import Trace

Normalise = Literal["layer_norm", "whiten"]


@without_autocast
def vkd_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    *,
    normalise: Normalise = "layer_norm",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Huber distance of the projected student feature from the normalised feature of the teacher.

    .. math:: L = \frac 1 D \sum_d \mathrm{smooth}_{L1}\left( (P z^S)_d - \mathrm{norm}(z^T)_d \right), \qquad
        P^\top P = I

    The student's side is not normalised. Layer normalisation, over channels, suits tasks that tell classes apart;
    whitening, over the batch, makes the teacher's channels uncorrelated, which suits generation, where variety counts.

    Args:
        student_feature: ``[B, D]``, already projected to the teacher's width.
        teacher_feature: ``[B, D]``; detached.
        normalise: Of the teacher: ``"layer_norm"``, or ``"whiten"``, which ties the samples of a batch together.
        mask: ``[B]`` booleans, True where a sample counts.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: Features of different shapes, or a mask that does not fit.
        ConfigError: No such normalisation.

    Source:
        Miles et al., "V_kD: Improving Knowledge Distillation using Orthogonal Projections", 2024, arXiv 2403.06213.

    Example:
        >>> import torch
        >>> vkd_loss(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]))
        tensor(0.5000)
    """
    check_features(student_feature, teacher_feature)
    if normalise not in ("layer_norm", "whiten"):
        raise ConfigError(
            "no such normalisation", where="normalise", found=repr(normalise), wanted="'layer_norm' or 'whiten'"
        )
    teacher = widen(teacher_feature.detach())
    teacher = F.layer_norm(teacher, teacher.shape[-1:]) if normalise == "layer_norm" else whiten(teacher, mask)
    student = widen(student_feature)
    values = F.smooth_l1_loss(student, teacher.to(student.dtype), reduction="none").flatten(1).mean(dim=1)
    return reduce(values, mask, reduction)


@torch.no_grad()
def whiten(rows: Tensor, mask: Tensor | None = None, eps: float = 1e-4) -> Tensor:
    r"""Rows with mean 0 and covariance 1, rotated as little as possible: :math:`(Z - \mu) \Sigma^{-1/2}`.

    Args:
        rows: ``[B, D]``.
        mask: ``[B]`` booleans: rows that count for mean and covariance.
        eps: Added to each variance, times their mean: directions in which there is hardly anything stay small.
    """
    counts = rows.new_ones(len(rows), 1, dtype=torch.bool) if mask is None else mask.unsqueeze(1)
    number = counts.sum().clamp(min=1)
    centred = (rows - rows.where(counts, 0).sum(dim=0) / number).where(counts, 0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / number)
    floor = (eps * values.mean()).clamp(min=torch.finfo(rows.dtype).tiny)
    return centred @ vectors @ ((values.clamp(min=0) + floor).rsqrt().unsqueeze(1) * vectors.T)


@register(
    Card(
        key="vkd",
        name="VkD",
        title="V_kD: Improving Knowledge Distillation using Orthogonal Projections",
        year=2024,
        arxiv="2403.06213",
        code="roymiles/vkd",
        knowledge="feature",
        equation=r"\mathrm{smooth}_{L1}\left( P z^S - \mathrm{norm}(z^T) \right), \quad P^\top P = I",
        use="Between architectures, such as a convolutional teacher and a transformer student: one vector a sample is "
        "compared, through a projection that cannot learn in the student's place.",
        defaults={
            "normalise": "layer_norm, the paper's for classification",
            "tap": "what enters the classifier; the paper's teacher and student pool their last feature so",
        },
        evidence="parity",
        evidence_note="value and gradient of the loss of roymiles/vkd@4b48050 (layer_norm); whitening is checked "
        "against its definition",
        choices=(
            "Orthogonality by Cayley's map; the authors' code leaves the map to torch, whose own is ten times slower.",
            "Whitening is not in the released classification code: here it is symmetric, over the batch.",
            "The paper's sum has KD at temperature 1; beside it stands limbeck's KD with its own temperature.",
        ),
        with_labels={"cross_entropy": 1.0, "kd": 1.0},
    ),
    vkd_loss,
)
class VkD(LayerObjective):
    """Feature distillation through an orthogonal projection; see ``limbeck.functional.vkd_loss``.

    Args:
        tap: The feature to project; the mean of its places that count.
        teacher_tap: The teacher's, where it is called otherwise.
        normalise: Of the teacher's feature: ``"layer_norm"`` or ``"whiten"``.

    >>> loss = 1.0 * VkD("penultimate")
    """

    contract = Contract(at_equal=None, mask=True)
    projector: OrthogonalProjector | None

    def __init__(
        self, tap: str = "penultimate", teacher_tap: str | None = None, normalise: Normalise = "layer_norm"
    ) -> None:
        super().__init__(tap, teacher_tap)
        self.normalise, self.projector = normalise, None
        if normalise == "whiten":
            self.contract = replace(self.contract, decomposes=False)  # type: ignore[misc]

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        s, t = self.pair(student, teacher)
        self.projector = OrthogonalProjector(s.shape[channel_dim(s)], t.shape[channel_dim(t)]).to(s.device)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        s, t = self.pair(student, teacher)
        check_same_batch(s, t, "student_feature", "teacher_feature")
        s, counts = pooled(s, batch.mask, "student_feature")
        projected = self.ready("projector")(s)
        return vkd_loss(projected, pooled(t, batch.mask, "teacher_feature")[0], normalise=self.normalise, mask=counts)

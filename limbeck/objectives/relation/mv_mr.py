"""MV-MR: embeddings that depend on the teacher's, by distance correlation, whatever coordinates either has."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.heads import BatchNorm
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.precision import without_autocast
from limbeck.core.projectors import LinearProjector
from limbeck.core.reduction import Reduction, check_features, check_positive, reduce
from limbeck.core.relations import channel_dim, check_same_batch, dcor, paired_rows, pooled
from limbeck.core.trace import Trace
from limbeck.core.views import perturbed, split_views, stack_views


@without_autocast
def mv_mr_loss(
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    other_view: Tensor | None = None,
    *,
    margin: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Dependence on the teacher and between two views, nearness of the views, and spread in every coordinate.

    .. math::
        L &= \mathrm{MSE}(z, z_o) + S(z) + S(z_o) + \left( 1 - \mathrm{dCor}(z, z_o) \right)
            + \left( 1 - \mathrm{dCor}(z, t) \right) \\
        S(z) &= \frac 1 D \sum_d \max\left( 0, m - \mathrm{std}_B(z_d) \right)

    Without a second view :math:`S(z) + 1 - \mathrm{dCor}(z, t)` is left. Distance correlation
    (``limbeck.core.relations.dcor``) needs no equal widths and no negatives. It ties the samples of a batch together.

    Args:
        student_embedding: z, ``[B, *]``; flattened to one row a sample.
        teacher_embedding: t, ``[B, *]``, of any width; detached.
        other_view: :math:`z_o`, of another view of the samples, shaped as z.
        margin: m, the deviation that is spread enough.
        mask: ``[B]`` booleans, True where a sample counts.
        reduction: ``"mean"``; ``"sum"``, the mean times the count; ``"none"`` (``[B]``).

    Raises:
        TensorError: Embeddings of different samples, or views of different shapes.

    Source: Kinakh, Drozdova and Voloshynovskiy, "MV-MR", 2023, arXiv 2303.12130.

    >>> import torch
    >>> z = torch.tensor([[0.0], [1.0], [5.0]])
    >>> mv_mr_loss(z, torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 3.0]]))
    tensor(0.0046)
    """
    z, t, counts = paired_rows(student_embedding, teacher_embedding, mask)
    values = (_narrow(z, margin, counts) + 1 - dcor(z, t, counts)).expand(len(z))
    if other_view is not None:
        check_features(other_view, student_embedding)
        other, _, _ = paired_rows(other_view, teacher_embedding, mask)
        gap = (z - other).square().mean(dim=1)
        values = values + gap + _narrow(other, margin, counts) + 1 - dcor(other, z, counts)
    return reduce(values, counts, reduction)


def _narrow(z: Tensor, margin: float, counts: Tensor | None) -> Tensor:
    """By how much coordinates deviate less than the margin, on average; 0 for a single sample."""
    weight = z.new_ones(len(z), 1) if counts is None else counts.unsqueeze(1).to(z.dtype)
    number = weight.sum()
    centred = (z - (z * weight).sum(dim=0) / number.clamp(min=1)) * weight
    deviation = torch.linalg.vector_norm(centred, dim=0) / (number - 1).clamp(min=1).sqrt()
    return (margin - deviation).clamp(min=0).mean() * (number > 1)


@register(
    Card(
        key="mv_mr",
        name="MV-MR",
        title="MV-MR: multi-views and multi-representations for self-supervised learning and knowledge distillation",
        year=2023,
        arxiv="2303.12130",
        code="vkinakh/mv-mr",
        knowledge="relation",
        equation=r"\mathrm{MSE}(z, z_o) + S(z) + S(z_o) + (1 - \mathrm{dCor}(z, z_o)) + (1 - \mathrm{dCor}(z, t))",
        use="To distil an encoder without labels, from any embeddings, such as CLIP's or hand-made descriptors. Large "
        "batches; each sample is seen twice.",
        defaults={"margin": "1, as in the authors' code"},
        evidence="parity",
        evidence_note="distance correlation: value and gradients of vkinakh/mv-mr@7136f70; the rest by formulas",
        choices=(
            "No least distance; the code has 0.01, between a sample and itself too, so that equals do not reach 1.",
            "The second view is made from what the loader gives, and every term of the loss sees both.",
        ),
        tasks=("classification", "embedding"),
        with_labels={"cross_entropy": 1.0},
        cost="Both models see every image twice.",
    ),
    mv_mr_loss,
)
class MVMR(Objective):
    """Distance correlation with the teacher over two views; see ``limbeck.functional.mv_mr_loss``.

    A perceptron of three layers stands between the student's feature and z; it is dropped after training.

    Args:
        tap: The student's feature; the mean of its places that count.
        teacher_tap: The teacher's, where it is called otherwise.
        margin: The deviation that is spread enough.
        views: See every image twice, as it is and perturbed; what is no image is seen once in any case.
    """

    contract = Contract(at_equal=None, decomposes=False, permutation=False, least_samples=2)

    def __init__(
        self, tap: str = "penultimate", teacher_tap: str | None = None, margin: float = 1.0, views: bool = True
    ) -> None:
        super().__init__()
        check_positive(margin, "margin")
        self.tap, self.teacher_tap, self.margin, self.views = tap, teacher_tap or tap, margin, views
        self.student_taps, self.teacher_taps = (self.tap,), (self.teacher_tap,)
        self.projector: nn.Module | None = None
        if not views:
            self.contract = replace(self.contract, permutation=True)  # type: ignore[misc]

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        feature = student[self.tap]
        own = feature.shape[channel_dim(feature)]
        width = 4 * own  # 8192 to 2048 in the authors' code
        inner = [BatchNorm(width), nn.ReLU(), nn.Linear(width, width, bias=False)]
        layers = [LinearProjector(own, width, bias=False), *inner, BatchNorm(width), nn.ReLU()]
        self.projector = nn.Sequential(*layers, nn.Linear(width, width, bias=False)).to(feature.device)

    def prepare(self, batch: Batch) -> Batch:
        images = batch.inputs
        image = isinstance(images, Tensor) and images.is_floating_point() and images.ndim == 4
        if not self.views or not image or "views" in batch.extras:
            return batch
        return stack_views(batch, [images, perturbed(images, probability=1.0)])

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        s, t = student[self.tap], teacher[self.teacher_tap]
        check_same_batch(s, t, "student_feature", "teacher_feature")
        (s, _), (t, _) = pooled(s, None, "student_feature"), pooled(t, None, "teacher_feature")
        first, *others = split_views(self.ready("projector")(s), batch)
        told = split_views(t, batch)[0]
        return mv_mr_loss(others[0] if others else first, told, first if others else None, margin=self.margin)

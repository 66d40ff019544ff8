"""Multi-label distillation (L2D): each class's yes or no, and the structure of label-wise embeddings."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.objective import Contract
from limbeck.core.reduction import Reduction
from limbeck.core.trace import Trace
from limbeck.objectives.parts.label_embeddings import LabelEmbeddings
from limbeck.objectives.relation.cled import cled_loss
from limbeck.objectives.relation.iled import iled_loss
from limbeck.objectives.response.mld import mld_loss


def l2d_loss(
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    mld_weight: float = 10 / 64,
    cled_weight: float = 100.0,
    iled_weight: float = 1000.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The sum of ``mld_loss``, ``cled_loss`` and ``iled_loss``, as the paper weighs them.

    .. math:: L = \lambda_M L_\mathrm{MLD} + \lambda_C L_\mathrm{CD} + \lambda_I L_\mathrm{ID}

    Args:
        student_embedding: ``[B, C, D]``, an embedding for each class.
        teacher_embedding: ``[B, C, D_t]``; detached.
        student_logits: ``[B, C]``.
        teacher_logits: ``[B, C]``; detached.
        labels: ``[B, C]`` floating; above one half is a label, negative is not known.
        mld_weight: :math:`\lambda_M`.
        cled_weight: :math:`\lambda_C`.
        iled_weight: :math:`\lambda_I`.
        mask: ``[B]`` booleans, True where a sample counts.
        reduction: ``"mean"`` over samples, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: Shapes or dtypes do not fit.

    Source: Yang et al., "Multi-Label Knowledge Distillation", 2023, arXiv 2308.06453.

    Example:
        >>> import torch
        >>> embedding = torch.eye(3).unsqueeze(0)
        >>> l2d_loss(embedding, 2 * embedding, torch.zeros(1, 3), torch.ones(1, 3), torch.ones(1, 3))
        tensor(0.0520)
    """
    parts = _parts(student_embedding, teacher_embedding, student_logits, teacher_logits, labels, mask, reduction)
    return mld_weight * parts["mld"] + cled_weight * parts["cled"] + iled_weight * parts["iled"]


def _parts(
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    reduction: Reduction = "mean",
) -> dict[str, Tensor]:
    return {
        "mld": mld_loss(student_logits, teacher_logits, mask=mask, reduction=reduction),
        "cled": cled_loss(student_embedding, teacher_embedding, labels, mask=mask, reduction=reduction),
        "iled": iled_loss(student_embedding, teacher_embedding, labels, mask=mask, reduction=reduction),
    }


@register(
    Card(
        key="l2d",
        name="L2D",
        title="Multi-Label Knowledge Distillation",
        year=2023,
        arxiv="2308.06453",
        code="penghui-yang/L2D",
        knowledge="response",
        equation=r"\lambda_M L_\mathrm{MLD} + \lambda_C L_\mathrm{CD} + \lambda_I L_\mathrm{ID}",
        use="Multi-label data: mld, cled and iled together, as the paper weighs them: much for embeddings made of the "
        "classifier, whose structure says nothing of signs. Set cled_weight and iled_weight to 1 there.",
        defaults={
            "tap": "the classifier's weights times the feature that enters them, for each class",
            "mld_weight": "10 / 64: the code adds 10 times the mean over a batch of 64 to the sum of the labels' loss",
            "cled_weight": "100, the code's, where the labels' loss and this are sums over the batch",
            "iled_weight": "1000, likewise",
        },
        evidence="parity",
        evidence_note="value and gradient of penghui-yang/L2D@ea7fa55 (10 MLD + 100 CD + 1000 ID over a batch)",
        choices=(
            "All parts are averaged over samples, and so is the labels' loss beside them.",
            "Embeddings from the classifier's weights where the models have no label queries of their own.",
        ),
        needs=("labels",),
        tasks=("multilabel",),
        with_labels={"binary_cross_entropy": 1.0},
        cost="Distances between all samples for every class, and between all classes for every sample.",
    ),
    l2d_loss,
)
class L2D(LabelEmbeddings):
    """Multi-label distillation; see ``limbeck.functional.l2d_loss``.

    Args:
        tap: A place that gives ``[B, C, D]``; default: made of classifier and feature.
        teacher_tap: The teacher's, where it is called otherwise.
        mld_weight: Of the logits' part.
        cled_weight: Of the class-aware part.
        iled_weight: Of the instance-aware part.

    >>> loss = L2D(cled_weight=0.0)
    """

    contract = Contract(normalizer="samples", mask=True, decomposes=False)

    def __init__(
        self,
        tap: str | None = None,
        teacher_tap: str | None = None,
        mld_weight: float = 10 / 64,
        cled_weight: float = 100.0,
        iled_weight: float = 1000.0,
    ) -> None:
        super().__init__(tap, teacher_tap)
        self.student_taps, self.teacher_taps = (*self.student_taps, "logits"), (*self.teacher_taps, "logits")
        self.weights = {"mld": mld_weight, "cled": cled_weight, "iled": iled_weight}

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> dict[str, Tensor]:
        embeddings = self.embeddings(student, teacher, batch)
        parts = _parts(*embeddings, student.logits, teacher.logits, batch.require("labels"), batch.mask)
        return {name: self.weights[name] * part for name, part in parts.items()}

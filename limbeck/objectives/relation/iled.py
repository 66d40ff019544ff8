"""Instance-aware label-wise embedding distillation (ID, of L2D): how the labels of one sample lie to one another."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.objective import Contract
from limbeck.core.precision import without_autocast
from limbeck.core.reduction import Reduction, reduce
from limbeck.core.trace import Trace
from limbeck.objectives.parts.label_embeddings import LabelEmbeddings, compared, structure_rows


@without_autocast
def iled_loss(
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Huber distance between student's and teacher's distances among the labels that a sample has.

    .. math::
        L = \frac 1 B \sum_i \frac 1 {n_i} \sum_{c,d \in P_i} h\left( \psi^S_{icd} - \psi^T_{icd} \right), \qquad
        \psi_{icd} = \frac{\|e_{ic} - e_{id}\|_2}{\mu_i}

    :math:`P_i` are the :math:`n_i` labels of sample i, :math:`\mu_i` the mean of their distances above zero, h the
    Huber loss with delta 1. A sample with one label at most adds nothing.

    Args:
        student_embedding: ``[B, C, D]``, an embedding for each class.
        teacher_embedding: ``[B, C, D_t]``; detached.
        labels: ``[B, C]`` floating; above one half is a label, negative is not known.
        mask: ``[B]`` booleans, True where a sample counts.
        reduction: ``"mean"`` over samples, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: Shapes or dtypes do not fit.

    Source: Yang et al., "Multi-Label Knowledge Distillation", 2023, arXiv 2308.06453.

    Example:
        >>> import torch
        >>> student = torch.tensor([[[0.0], [1.0], [3.0]]])
        >>> iled_loss(student, student.square(), torch.ones(1, 3))
        tensor(0.0741)
    """
    student, teacher, present = compared(student_embedding, teacher_embedding, labels, mask, "ILED")
    return reduce(structure_rows(student, teacher, present).sum(dim=1), mask, reduction)


@register(
    Card(
        key="iled",
        name="Instance-aware LED",
        title="Multi-Label Knowledge Distillation",
        year=2023,
        arxiv="2308.06453",
        code="penghui-yang/L2D",
        knowledge="relation",
        equation=r"\frac 1 B \sum_i \frac 1 {n_i} \sum_{c,d \in P_i} h(\psi^S_{icd} - \psi^T_{icd})",
        use="Multi-label data with several labels a sample: how the labels of a sample differ. It asks nothing of how "
        "many samples share a label; beside mld and cled it is L2D. "
        "Without a decoder's embeddings a weight of 1 is plenty.",
        defaults={"tap": "the classifier's weights times the feature that enters them, for each class"},
        evidence="parity",
        evidence_note="value and gradient of penghui-yang/L2D@ea7fa55 (ID), whose sum is reduction='sum'",
        choices=(
            "Averaged over samples; with the weight of 1000 that is the code's sum, whose labels' loss is a sum too.",
            "Positives by the labels, not by rows that are not zero.",
            "Embeddings from the classifier's weights where the models have no label queries of their own.",
        ),
        needs=("labels",),
        tasks=("multilabel",),
        with_labels={"binary_cross_entropy": 1.0},
        weight=1000.0,
        cost="Distances between all classes, for every sample, of both models.",
    ),
    iled_loss,
)
class ILED(LabelEmbeddings):
    """Instance-aware label-wise embedding distillation; see ``limbeck.functional.iled_loss``.

    Args:
        tap: A place that gives ``[B, C, D]``, such as a label-query decoder; default: made of classifier and feature.
        teacher_tap: The teacher's, where it is called otherwise.

    >>> loss = 1000.0 * ILED("decoder")
    """

    contract = Contract(normalizer="samples", mask=True)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return iled_loss(*self.embeddings(student, teacher, batch), batch.require("labels"), mask=batch.mask)

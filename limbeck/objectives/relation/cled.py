"""Class-aware label-wise embedding distillation (CD, of L2D): how the samples of one class lie to one another."""

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
def cled_loss(
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    labels: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Huber distance between student's and teacher's distances among the samples that share a label.

    .. math::
        L = \frac 1 B \sum_c \frac 1 {n_c} \sum_{i,j \in P_c} h\left( \psi^S_{cij} - \psi^T_{cij} \right), \qquad
        \psi_{cij} = \frac{\|e_{ic} - e_{jc}\|_2}{\mu_c}

    :math:`P_c` are the :math:`n_c` samples of the batch with label c, :math:`\mu_c` the mean of their distances above
    zero, h the Huber loss with delta 1. A class that one sample has at most adds nothing. The loss of a batch is not
    the mean of the losses of its parts.

    Args:
        student_embedding: ``[B, C, D]``, an embedding for each class.
        teacher_embedding: ``[B, C, D_t]``; detached.
        labels: ``[B, C]`` floating; above one half is a label, negative is not known.
        mask: ``[B]`` booleans, True where a sample counts.
        reduction: ``"mean"`` over samples; ``"sum"``, the authors' sum over classes; ``"none"``: ``[B]``, the part of
            each sample as first of a pair.

    Raises:
        TensorError: Shapes or dtypes do not fit.

    Source: Yang et al., "Multi-Label Knowledge Distillation", 2023, arXiv 2308.06453.

    Example:
        >>> import torch
        >>> student = torch.tensor([[[0.0]], [[1.0]], [[3.0]]])
        >>> cled_loss(student, student.square(), torch.ones(3, 1))
        tensor(0.0247)
    """
    student, teacher, present = compared(student_embedding, teacher_embedding, labels, mask, "CLED")
    values = structure_rows(student.transpose(0, 1), teacher.transpose(0, 1), present.T)
    return reduce(values.sum(dim=0), mask, reduction)


@register(
    Card(
        key="cled",
        name="Class-aware LED",
        title="Multi-Label Knowledge Distillation",
        year=2023,
        arxiv="2308.06453",
        code="penghui-yang/L2D",
        knowledge="relation",
        equation=r"\frac 1 B \sum_c \frac 1 {n_c} \sum_{i,j \in P_c} h(\psi^S_{cij} - \psi^T_{cij})",
        use="Multi-label data with labels that many samples of a batch share: how the samples of a class differ. "
        "Beside mld and iled it is L2D. "
        "Without a decoder's embeddings a weight of 1 is plenty.",
        defaults={"tap": "the classifier's weights times the feature that enters them, for each class"},
        evidence="parity",
        evidence_note="value and gradient of penghui-yang/L2D@ea7fa55 (CD), whose sum is reduction='sum'",
        choices=(
            "Averaged over samples; with the weight of 100 that is the code's sum, whose labels' loss is a sum too.",
            "Positives by the labels, not by rows that are not zero.",
            "Embeddings from the classifier's weights where the models have no label queries of their own.",
        ),
        needs=("labels",),
        tasks=("multilabel",),
        with_labels={"binary_cross_entropy": 1.0},
        weight=100.0,
        cost="Distances between all samples of a batch, for every class, of both models.",
    ),
    cled_loss,
)
class CLED(LabelEmbeddings):
    """Class-aware label-wise embedding distillation; see ``limbeck.functional.cled_loss``.

    Args:
        tap: A place that gives ``[B, C, D]``, such as a label-query decoder; default: made of classifier and feature.
        teacher_tap: The teacher's, where it is called otherwise.

    >>> loss = 100.0 * CLED("decoder")
    """

    contract = Contract(normalizer="samples", mask=True, decomposes=False)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return cled_loss(*self.embeddings(student, teacher, batch), batch.require("labels"), mask=batch.mask)

"""Binary cross-entropy: what a student of multi-label data learns without a teacher."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.labels import binary_labels
from limbeck.core.objective import Contract
from limbeck.core.reduction import Reduction, check_floating, check_inside, reduce, widen
from limbeck.core.trace import Trace
from limbeck.objectives.response.cross_entropy import CrossEntropy


def binary_cross_entropy_loss(
    student_logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy of each class's yes or no, summed over classes.

    .. math:: L = -\sum_c q_c \log \sigma(z_c) + (1 - q_c) \log (1 - \sigma(z_c)), \qquad
        q = (1 - \epsilon)\,\mathrm{label} + \epsilon / 2

    It is the negative log-likelihood of a sample's whole set of labels, so it is summed over classes and averaged over
    samples: PyTorch's loss, whose mean runs over both, is this one divided by the number of classes.

    Args:
        student_logits: ``[B, *, C]``.
        labels: ``[B, *, C]`` floating, from 0 to 1; an entry is negative where it is not known whether the sample is of
            that class, and adds nothing there.
        label_smoothing: :math:`\epsilon`, the share of each label that is one half.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over places that count, ``"sum"``, or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Labels that do not fit the logits, or above 1.
        ConfigError: ``label_smoothing`` outside 0 to 1.

    Source:
        Cox, "The Regression Analysis of Binary Sequences", 1958, Journal of the Royal Statistical Society B 20(2).

    Example:
        >>> import torch
        >>> binary_cross_entropy_loss(torch.tensor([[0.0, 2.0, 5.0]]), torch.tensor([[1.0, 0.0, -1.0]]))
        tensor(2.8201)
    """
    check_floating(student_logits, "student_logits", least=2)
    check_inside(label_smoothing, "label_smoothing", closed=True)
    targets, known = binary_labels(labels, student_logits, "binary cross-entropy")
    logits = widen(student_logits)
    targets = (1 - label_smoothing) * targets.to(logits.dtype) + label_smoothing / 2
    values = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").masked_fill(~known, 0.0)
    return reduce(values.sum(dim=-1), mask, reduction)


@register(
    Card(
        key="binary_cross_entropy",
        name="Binary cross-entropy",
        title="The Regression Analysis of Binary Sequences",
        year=1958,
        knowledge="control",
        equation=r"-\sum_c q_c \log \sigma(z_c) + (1 - q_c) \log (1 - \sigma(z_c))",
        use="The task itself where a sample may have any number of labels: alone it is the control without a teacher; "
        "beside a method it keeps the student on the labels.",
        evidence="formula",
        evidence_note="the equation in plain loops, and torch.nn.functional.binary_cross_entropy_with_logits",
        needs=("labels",),
        tasks=("multilabel",),
    ),
    binary_cross_entropy_loss,
)
class BinaryCrossEntropy(CrossEntropy):
    """Binary cross-entropy with the batch's labels; see ``limbeck.functional.binary_cross_entropy_loss``.

    Args:
        label_smoothing: The share of each label that is one half.

    >>> loss = BinaryCrossEntropy(label_smoothing=0.1)
    """

    contract = Contract(normalizer="positions", at_equal=None, mask=True)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return binary_cross_entropy_loss(
            student.logits, batch.require("labels"), label_smoothing=self.label_smoothing, mask=batch.mask
        )

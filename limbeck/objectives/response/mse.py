"""Mean squared error: what a student of a regression learns without a teacher."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_floating, check_same_shape, reduce, widen
from limbeck.core.trace import Trace


def mse_loss(
    student_output: Tensor, labels: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Squared distance of a prediction from its target, averaged over the target's numbers.

    .. math:: L = \frac 1 P \sum_j (p_j - y_j)^2

    Args:
        student_output: ``[B, *, P]`` predicted numbers, such as coordinates.
        labels: The targets, of the same shape.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over places that count, ``"sum"`` or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Shapes or dtypes do not fit.

    Source:
        Rumelhart, Hinton and Williams, "Learning representations by back-propagating errors", 1986, Nature 323, whose
        error is half the sum.

    Example:
        >>> import torch
        >>> mse_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]]))
        tensor(2.5000)
    """
    check_floating(student_output, "student_output", least=2)
    check_floating(labels, "labels", least=2)
    check_same_shape(student_output, labels, "student_output", "labels")
    predicted = widen(student_output)
    return reduce((predicted - labels.to(predicted.dtype)).square().mean(dim=-1), mask, reduction)


@register(
    Card(
        key="mse",
        name="Mean squared error",
        title="Learning representations by back-propagating errors",
        year=1986,
        knowledge="control",
        equation=r"\frac 1 P \sum_j (p_j - y_j)^2",
        use="The task itself where numbers are predicted: alone it is the control without a teacher.",
        evidence="formula",
        evidence_note="torch.nn.functional.mse_loss",
        needs=("labels",),
        tasks=("regression",),
    ),
    mse_loss,
)
class MSE(Objective):
    """Mean squared error against the batch's targets; see ``limbeck.functional.mse_loss``.

    >>> loss = MSE()
    """

    contract = Contract(normalizer="positions", at_equal=None, mask=True)
    student_taps = ("logits",)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return mse_loss(student.logits, batch.require("labels"), mask=batch.mask)

"""The quadratic score: squared error of probabilities against the labels, a control beside cross-entropy."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.labels import soft_labels
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_logits, fit_mask, reduce, widen
from limbeck.core.trace import Trace


def brier_loss(
    student_logits: Tensor, labels: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Squared distance between the student's probabilities and the labels, averaged over classes.

    .. math:: L = \frac 1 C \sum_c (p_c - y_c)^2, \qquad p = \mathrm{softmax}(z^S)

    Args:
        student_logits: ``[B, *, C]``.
        labels: Integers ``[B, *]``, negative where a place has no label; or soft labels, floating ``[B, *, C]``.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over places that count and have a label, ``"sum"``, or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Labels that do not fit the logits, or name no class.

    Source:
        Brier, "Verification of forecasts expressed in terms of probability", 1950, Monthly Weather Review 78(1), whose
        score is the sum; the mean is that of Borup and Andersen, 2021, arXiv 2102.13088.

    Example:
        >>> import torch
        >>> brier_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
        tensor(0.2500)
    """
    check_logits(student_logits, labels=labels)
    probabilities = widen(student_logits).softmax(dim=-1)
    wanted = soft_labels(labels, probabilities.shape[-1]).to(probabilities.dtype)
    values = (probabilities - wanted).square().mean(dim=-1)
    if not labels.is_floating_point():
        mask = labels >= 0 if mask is None else (labels >= 0) & fit_mask(mask, values)
    return reduce(values, mask, reduction)


@register(
    Card(
        key="brier",
        name="Brier score",
        title="Verification of forecasts expressed in terms of probability",
        year=1950,
        knowledge="control",
        equation=r"\frac 1 C \sum_c (p_c - y_c)^2",
        use="In the place of cross-entropy where errors shall stay bounded: the labels' part of the weighted targets "
        "of scheme kernel_self_distill, beside prob_mse.",
        evidence="formula",
        evidence_note="torch.nn.functional.mse_loss of softmax and one-hot labels",
        choices=("The mean over classes, as where it stands beside prob_mse; Brier's score is the sum.",),
        needs=("labels",),
    ),
    brier_loss,
)
class Brier(Objective):
    """Quadratic score against the batch's labels; see ``limbeck.functional.brier_loss``.

    >>> loss = Brier()
    """

    contract = Contract(normalizer="labels", at_equal=None, mask=True)
    student_taps = ("logits",)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return brier_loss(student.logits, batch.require("labels"), mask=batch.mask)

"""Cross-entropy with the labels: what a student learns without a teacher."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.labels import split_labels
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_inside, check_logits, fit_mask, reduce, widen
from limbeck.core.trace import Trace


def cross_entropy_loss(
    student_logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy between the labels and the student's probabilities.

    .. math:: L = -\sum_c q_c \log p_c, \qquad p = \mathrm{softmax}(z^S), \qquad
        q = (1 - \epsilon)\,\mathrm{label} + \epsilon / C

    Args:
        student_logits: ``[B, *, C]``.
        labels: Integers ``[B, *]``, negative where a place has no label; or soft labels, floating ``[B, *, C]``.
        label_smoothing: The share :math:`\epsilon` of the label that is spread evenly over all classes.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over places that count and have a label, ``"sum"``, or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Labels that do not fit the logits, or name no class.
        ConfigError: ``label_smoothing`` outside 0 to 1.

    Source:
        Good, "Rational Decisions", 1952, Journal of the Royal Statistical Society B 14(1), section 8: the logarithmic
        score.

    Example:
        >>> import torch
        >>> cross_entropy_loss(torch.tensor([[0.0, 0.0], [5.0, 1.0]]), torch.tensor([1, -1]))
        tensor(0.6931)
    """
    check_logits(student_logits, labels=labels)
    check_inside(label_smoothing, "label_smoothing", closed=True)
    log_p = widen(student_logits).log_softmax(dim=-1)
    if labels.is_floating_point():
        values = -(labels.to(log_p.dtype) * log_p).sum(dim=-1)
    else:
        labels, labelled = split_labels(labels, log_p.shape[-1])
        values = -log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        mask = labelled if mask is None else labelled & fit_mask(mask, values)
    if label_smoothing:
        values = (1 - label_smoothing) * values - label_smoothing * log_p.mean(dim=-1)
    return reduce(values, mask, reduction)


@register(
    Card(
        key="cross_entropy",
        name="Cross-entropy",
        title="Rational Decisions",
        year=1952,
        knowledge="control",
        tasks=("classification", "language"),
        equation=r"-\sum_c q_c \log p_c",
        use="The task itself: alone it is the control without a teacher; beside a method it keeps the student on the "
        "labels.",
        evidence="formula",
        evidence_note="torch.nn.functional.cross_entropy",
        needs=("labels",),
    ),
    cross_entropy_loss,
)
class CrossEntropy(Objective):
    """Cross-entropy with the batch's labels; see ``limbeck.functional.cross_entropy_loss``.

    Args:
        label_smoothing: The share of each label that is spread evenly over all classes.

    >>> loss = CrossEntropy(label_smoothing=0.1)
    """

    contract = Contract(normalizer="labels", at_equal=None, mask=True)
    student_taps = ("logits",)

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        check_inside(label_smoothing, "label_smoothing", closed=True)
        self.label_smoothing = label_smoothing

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        labels = batch.require("labels")
        return cross_entropy_loss(student.logits, labels, label_smoothing=self.label_smoothing, mask=batch.mask)

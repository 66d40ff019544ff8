"""Label smoothing: the control that needs no teacher."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_inside
from limbeck.core.trace import Trace
from limbeck.objectives.response.cross_entropy import cross_entropy_loss


def label_smoothing_loss(
    student_logits: Tensor,
    labels: Tensor,
    *,
    smoothing: float = 0.1,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy with labels of which a part is spread evenly over all classes.

    .. math:: L = -\sum_c q_c \log p_c, \qquad q = (1 - \epsilon)\,\mathrm{label} + \epsilon / C

    It is distillation from a teacher that knows nothing but the label, so a method that does not beat it has
    transferred nothing.

    Args:
        student_logits: ``[B, *, C]``.
        labels: Integers ``[B, *]``, negative where a place has no label; or soft labels, floating ``[B, *, C]``.
        smoothing: :math:`\epsilon`; 0.1 as in the paper.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over places that count and have a label, ``"sum"``, or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Labels that do not fit the logits, or name no class.
        ConfigError: ``smoothing`` outside 0 to 1.

    Source:
        Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, arXiv 1512.00567, section 7.

    Example:
        >>> import torch
        >>> label_smoothing_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor(0.2269)
    """
    return cross_entropy_loss(student_logits, labels, label_smoothing=smoothing, mask=mask, reduction=reduction)


@register(
    Card(
        key="label_smoothing",
        name="Label smoothing",
        title="Rethinking the Inception Architecture for Computer Vision",
        year=2016,
        arxiv="1512.00567",
        knowledge="control",
        tasks=("classification", "language"),
        equation=r"-\sum_c \left( (1 - \epsilon) q_c + \epsilon / C \right) \log p_c",
        use="The control that tells a teacher's knowledge from mere softening: a method should beat it.",
        defaults={"smoothing": "0.1, the paper's value"},
        evidence="formula",
        evidence_note="torch.nn.functional.cross_entropy",
        needs=("labels",),
    ),
    label_smoothing_loss,
)
class LabelSmoothing(Objective):
    """Cross-entropy with smoothed labels; see ``limbeck.functional.label_smoothing_loss``.

    Args:
        smoothing: The share of each label that is spread evenly over all classes.

    >>> loss = LabelSmoothing()
    """

    contract = Contract(normalizer="labels", at_equal=None, mask=True)
    student_taps = ("logits",)

    def __init__(self, smoothing: float = 0.1) -> None:
        super().__init__()
        check_inside(smoothing, "smoothing", closed=True)
        self.smoothing = smoothing

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return label_smoothing_loss(student.logits, batch.require("labels"), smoothing=self.smoothing, mask=batch.mask)

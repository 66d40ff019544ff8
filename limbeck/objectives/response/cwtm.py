"""CWTM: labels alone, each weighed by how sure the teacher is; a control for what its other classes teach."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import soften
from limbeck.core.labels import class_labels
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_logits, fit_mask, reduce
from limbeck.core.trace import Trace


def cwtm_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy with the labels, weighted by the teacher's greatest probability.

    .. math:: L = -\sum_b \frac{w_b}{\sum_u w_u} \log q_{b, y_b}, \qquad w_b = \max_c p_{b,c}

    Args:
        student_logits, teacher_logits: ``[B, *, C]``; the teacher's are detached.
        labels: Integers ``[B, *]``, negative where a place has no label; such a place does not count.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"``: as above; ``"none"``: the parts times how many count, ``"sum"``: the sum of these.

    Raises:
        TensorError: Shapes do not fit, no labels, or soft ones.

    Source:
        Furlanello et al., "Born Again Neural Networks", 2018, arXiv 1805.04770, equation 9.

    Example:
        >>> import torch
        >>> cwtm_loss(torch.zeros(2, 2), torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1]))
        tensor(0.6931)
    """
    check_logits(student_logits, teacher_logits, labels)
    target, counts = class_labels(labels, student_logits.shape[-1], "CWTM")
    values = -soften(student_logits).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    counts = counts if mask is None else counts & fit_mask(mask, values)
    sure = soften(teacher_logits.detach()).amax(dim=-1).exp().masked_fill(~counts, 0.0)
    weight = sure * counts.sum() / sure.sum().clamp(min=1e-12)
    return reduce(weight * values.masked_fill(~counts, 0.0), counts, reduction)


@register(
    Card(
        key="cwtm",
        name="CWTM",
        title="Born Again Neural Networks",
        year=2018,
        arxiv="1805.04770",
        knowledge="response",
        equation=r"-\sum_b \frac{\max_c p_{b,c}}{\sum_u \max_c p_{u,c}} \log q_{b, y_b}",
        use="A control for KD: the teacher says which samples count, and nothing about their other classes. Alone, in "
        "scheme ban as in the paper; what KD gains over it is what the other classes teach.",
        evidence="formula",
        evidence_note="value and gradient against a plain loop, and the weights that the paper's equation gives",
        choices=("Weights are normalised over the batch, as the paper writes; over each micro-batch where it is cut.",),
        needs=("labels",),
    ),
    cwtm_loss,
)
class CWTM(Objective):
    """Labels weighed by the teacher's confidence; see ``limbeck.functional.cwtm_loss``.

    >>> loss = CWTM()
    """

    contract = Contract(normalizer="labels", at_equal=None, mask=True, decomposes=False)
    student_taps = teacher_taps = ("logits",)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return cwtm_loss(student.logits, teacher.logits, batch.require("labels"), mask=batch.mask)

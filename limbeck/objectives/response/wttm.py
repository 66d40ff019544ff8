"""Weighted transformed teacher matching (WTTM): TTM, weighted by how smooth each of the teacher's answers is."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import soften
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_positive, reduce
from limbeck.core.trace import Trace
from limbeck.objectives.response.ttm import ttm_loss


def wttm_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    gamma: float = 0.2,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""TTM, in which the sum of the teacher's powers weighs each place.

    .. math::
        L = U_\gamma(p)\, \mathrm{KL}(p^{(\gamma)} \,\|\, q), \qquad U_\gamma(p) = \sum_c p_c^\gamma, \quad
        p^{(\gamma)}_c = p_c^\gamma / U_\gamma(p)

    For :math:`\gamma < 1` the weight runs from 1, where the teacher is sure, to :math:`C^{1 - \gamma}`, where all
    classes are alike to it: soft answers count more.

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``; detached.
        labels: Not used; taken so that all response losses are called alike.
        gamma: :math:`\gamma`; 0.2 in the authors' example.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over counted places, ``"sum"`` or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Shapes or dtypes do not fit.
        ConfigError: ``gamma`` not above zero.

    Source:
        Zheng and Yang, "Knowledge Distillation Based on Transformed Teacher Matching", 2024, arXiv 2402.11148.

    Example:
        >>> import torch
        >>> wttm_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor(1.0597)
    """
    divergence = ttm_loss(student_logits, teacher_logits, labels, gamma=gamma, reduction="none")
    smoothness = (gamma * soften(teacher_logits.detach())).logsumexp(dim=-1).exp()
    return reduce(smoothness * divergence, mask, reduction)


@register(
    Card(
        key="wttm",
        name="WTTM",
        title="Knowledge Distillation Based on Transformed Teacher Matching",
        year=2024,
        arxiv="2402.11148",
        code="zkxufo/TTM",
        knowledge="response",
        equation=r"\left( \sum_c p_c^\gamma \right) \mathrm{KL}(p^{(\gamma)} \,\|\, q), \quad "
        r"p^{(\gamma)}_c = p_c^\gamma / \sum_j p_j^\gamma",
        use="As TTM, with more weight on samples that the teacher finds hard; its paper's better half. Its authors "
        "also combine it with CRD.",
        defaults={"gamma": "0.2 (a temperature of 5), as in the authors' example on CIFAR-100"},
        evidence="parity",
        evidence_note="value and gradient of zkxufo/TTM@fe457b3 (WTTM)",
        choices=("The weight 4 of the authors' example, which has CRD beside it; their runs without tune it by pair.",),
        with_labels={"cross_entropy": 1.0},
        weight=4.0,
    ),
    wttm_loss,
)
class WTTM(Objective):
    """Weighted transformed teacher matching; see ``limbeck.functional.wttm_loss``.

    Args:
        gamma: The power of the teacher's probabilities.

    >>> loss = 4.0 * WTTM()
    """

    contract = Contract(normalizer="positions", at_equal=None, mask=True, spare_class=True)
    student_taps = teacher_taps = ("logits",)

    def __init__(self, gamma: float = 0.2) -> None:
        super().__init__()
        check_positive(gamma, "gamma")
        self.gamma = gamma

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return wttm_loss(student.logits, teacher.logits, gamma=self.gamma, mask=batch.mask)

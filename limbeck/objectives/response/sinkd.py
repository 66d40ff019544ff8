"""Sinkhorn distillation (SinKD): the batch's predictions are carried onto the teacher's at least cost."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Contract, Objective
from limbeck.core.precision import without_autocast
from limbeck.core.reduction import Reduction, check_logits, check_positive, fit_mask, reduce, widen
from limbeck.core.trace import Trace
from limbeck.core.transport import sinkhorn


@without_autocast
def sinkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 2.0,
    epsilon: float = 0.1,
    iterations: int = 20,
    columns: list[int] | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""What it costs to carry the student's predictions of a batch onto the teacher's, by an entropic optimal plan.

    .. math::
        L = \frac 1 N \sum_{i,j} P_{ij} W_{ij}, \qquad W_{ij} = \left\| p^S_i - p^T_j \right\|_1, \quad
        p = \mathrm{softmax}(z / T)

    :math:`P` is doubly stochastic: :math:`e^{-W / \varepsilon}` with rows and columns scaled in turn, in the log
    domain; gradients flow through it. The ``N`` rows are all places that count, so memory grows with :math:`N^2`.

    The loss does not see which sample is which: a student that swaps two predictions pays nothing. Use it beside a loss
    by sample, such as KD. Nor is it exactly 0 at equality, since entropy spreads the plan.

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``; detached.
        labels: Not used; taken so that all response losses are called alike.
        temperature: :math:`T`; 2 in the authors' code.
        epsilon: :math:`\varepsilon`, the weight of the entropy; 0.1 in the authors' code. Costs lie between 0 and 2.
        iterations: How often rows and columns are scaled; 20 in the authors' code.
        columns: The classes to look at, such as the words that name labels in a vocabulary; all by default.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over counted places, ``"sum"``, or ``"none"`` (``[B, *]``, what each place costs).

    Raises:
        TensorError: Logits of different shapes.
        ConfigError: An option not above zero, or columns that are no classes.

    Source:
        Cui et al., "Sinkhorn Distance Minimization for Knowledge Distillation", 2024, arXiv 2402.17110.

    Example:
        >>> student = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
        >>> sinkd_loss(student, torch.tensor([[0.8, 0.2], [0.3, 0.7]]).log(), temperature=1.0)
        tensor(0.3000)
    """
    check_logits(student_logits, teacher_logits, labels)
    check_positive(temperature, "temperature")
    places, classes = student_logits.shape[:-1], student_logits.shape[-1]
    student, teacher = (widen(z).reshape(-1, classes) for z in (student_logits, teacher_logits.detach()))
    if columns is not None:
        if not columns or not all(0 <= c < classes for c in columns):
            raise ConfigError("not all are classes", where="columns", found=columns, wanted=f"0 to {classes - 1}")
        student, teacher = student[:, columns], teacher[:, columns]
    counts = None
    if mask is not None:
        counts = fit_mask(mask, student_logits[..., 0]).reshape(-1)
        student, teacher = (z.masked_fill(~counts.unsqueeze(1), 0.0) for z in (student, teacher))

    cost = torch.cdist((student / temperature).softmax(dim=1), (teacher / temperature).softmax(dim=1), p=1)
    number = counts.sum() if counts is not None else len(cost)
    plan = number * sinkhorn(cost, epsilon, iterations, rows=counts, columns=counts)
    return reduce((plan * cost).sum(dim=1).reshape(places), mask, reduction)


@register(
    Card(
        key="sinkd",
        name="SinKD",
        title="Sinkhorn Distance Minimization for Knowledge Distillation",
        year=2024,
        arxiv="2402.17110",
        code="2018cx/SinKD",
        knowledge="response",
        equation=r"\frac 1 N \sum_{i,j} P_{ij} \left\| p^S_i - p^T_j \right\|_1, \quad "
        r"P = \mathrm{Sinkhorn}(e^{-W / \varepsilon})",
        use="Beside KD and the labels where teacher and student disagree much, so that a divergence says little: it "
        "compares whole batches of predictions. Never alone, since it does not know which sample is which.",
        defaults={
            "temperature": "2, as in the authors' code",
            "epsilon": "0.1, as in the authors' code",
            "iterations": "20, as in the authors' code",
            "columns": "all classes; the paper's language-model runs keep the words that name labels",
        },
        evidence="parity",
        evidence_note="value and gradient of 2018cx/SinKD@1ffac90",
        choices=(
            "The mean over samples; the authors' code sums over the batch and multiplies by 0.001.",
            "The weight is the paper's 0.8 on that mean. Its scripts (0.8 on 0.001 times the sum, batches of 16) come "
            "to 0.013.",
            "KD stands beside it with T^2 and T = 4; 0.2 is the 0.8 of the scripts over their T^2 = 4.",
            "The log domain: the same plan for any small epsilon.",
        ),
        tasks=("classification", "language"),
        with_labels={"cross_entropy": 0.2, "kd": 0.2},
        weight=0.8,
    ),
    sinkd_loss,
)
class SinKD(Objective):
    """Sinkhorn distillation; see ``limbeck.functional.sinkd_loss``.

    Args:
        temperature: T.
        epsilon: Weight of the entropy.
        iterations: How often rows and columns are scaled.
        columns: The classes to look at; all by default.

    >>> from limbeck.objectives import KD, CrossEntropy
    >>> loss = 0.2 * CrossEntropy() + 0.2 * KD() + 0.8 * SinKD()
    """

    contract = Contract(normalizer="positions", at_equal=None, mask=True, decomposes=False, spare_class=True)
    student_taps = teacher_taps = ("logits",)

    def __init__(
        self, temperature: float = 2.0, epsilon: float = 0.1, iterations: int = 20, columns: list[int] | None = None
    ) -> None:
        super().__init__()
        for name, value in (("temperature", temperature), ("epsilon", epsilon), ("iterations", iterations)):
            check_positive(value, name)
        self.temperature, self.epsilon, self.iterations, self.columns = temperature, epsilon, iterations, columns

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        options = {n: getattr(self, n) for n in ("temperature", "epsilon", "iterations", "columns")}
        return sinkd_loss(student.logits, teacher.logits, mask=batch.mask, **options)

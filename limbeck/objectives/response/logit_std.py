"""Logit standardisation in KD: each sample's logits as z-scores before they are softened."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import kl_rows, softened_divergence, standardise
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_logits, check_positive
from limbeck.core.trace import Trace


def logit_std_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 2.0,
    unbiased: bool = False,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""KD between logits that are standardised over the classes, place by place.

    .. math::
        L = T^2 \, \mathrm{KL}\big(\mathrm{softmax}(h(z^T) / T) \,\|\, \mathrm{softmax}(h(z^S) / T)\big), \qquad
        h(z) = \frac{z - \bar z}{\sigma(z)}

    The student has to match the order and the relative gaps of the teacher's logits, not their size: the loss does not
    change when either side's logits are shifted or scaled up. Logits that do not vary at all pass no gradient.

    Args:
        student_logits: ``[B, *, C]``; the gradient runs through mean and deviation.
        teacher_logits: ``[B, *, C]``; detached.
        labels: Not used; taken so that all response losses are called alike.
        temperature: The base temperature T; 2 in the paper's main runs.
        unbiased: Divide the squares by C - 1 instead of C.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over counted places, ``"sum"`` or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Shapes or dtypes do not fit.
        ConfigError: A temperature that is not above zero.

    Source:
        Sun et al., "Logit Standardization in Knowledge Distillation", 2024, arXiv 2403.01427.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[9.0, 5.0, 1.0]])
        >>> logit_std_loss(student, teacher), logit_std_loss(student, 40 * student).abs() < 1e-6
        (tensor(1.8844), tensor(True))
    """
    check_logits(student_logits, teacher_logits, labels)
    student, teacher = (standardise(z, correction=int(unbiased)) for z in (student_logits, teacher_logits))
    return softened_divergence(
        kl_rows, student, teacher, labels, temperature=temperature, mask=mask, reduction=reduction
    )


@register(
    Card(
        key="logit_std",
        name="Logit standardisation",
        title="Logit Standardization in Knowledge Distillation",
        year=2024,
        arxiv="2403.01427",
        code="sunshangquan/logit-standardization-KD",
        knowledge="response",
        equation=r"T^2\,\mathrm{KL}(\mathrm{softmax}(h(z_t)/T)\,\|\,\mathrm{softmax}(h(z_s)/T)), \quad "
        r"h(z) = (z - \bar z) / \sigma(z)",
        use="In place of KD where the teacher is much surer than the student can be: only the relations of its logits "
        "count, not their size. Wants more than a few classes.",
        defaults={
            "temperature": "2, the base temperature of the paper's main runs",
            "unbiased": "no: the paper divides by the number of classes, its code by one less",
        },
        evidence="parity",
        evidence_note="value and gradient of sunshangquan/logit-standardization-KD@f6e5aa5 (kd_loss, with unbiased)",
        choices=(
            "The biased standard deviation of the paper's algorithm; the released code has PyTorch's unbiased one, "
            "which comes to a temperature lower by a factor of the root of (C - 1) / C.",
            "Logits that do not vary pass no gradient; the released 1e-7 beside the deviation would pass one of 1e7.",
        ),
        with_labels={"cross_entropy": 0.1},
        weight=9.0,
    ),
    logit_std_loss,
)
class LogitStd(Objective):
    """KD of standardised logits; see ``limbeck.functional.logit_std_loss``.

    Args:
        temperature: The base temperature T.
        unbiased: Divide the squares by C - 1 instead of C.

    >>> loss = 9.0 * LogitStd(temperature=3.0)
    """

    contract = Contract(normalizer="positions", mask=True, temperature="squared")
    student_taps = teacher_taps = ("logits",)

    def __init__(self, temperature: float = 2.0, unbiased: bool = False) -> None:
        super().__init__()
        check_positive(temperature, "temperature")
        self.temperature, self.unbiased = temperature, unbiased

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return logit_std_loss(
            student.logits,
            teacher.logits,
            temperature=self.temperature,
            unbiased=self.unbiased,
            mask=batch.mask,
        )

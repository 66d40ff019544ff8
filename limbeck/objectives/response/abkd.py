"""ABKD: the alpha-beta divergence, which says apart how much hard classes and sure ones count."""

from __future__ import annotations

import math
from functools import partial

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import alpha_beta_rows, softened_divergence
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_positive
from limbeck.core.trace import Trace


def abkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    alpha: float = 0.8,
    beta: float = 0.3,
    temperature: float = 4.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Alpha-beta divergence between the softened predictions.

    .. math::
        L = -\frac{T^2}{\alpha \beta} \sum_c \left( p_c^\alpha q_c^\beta
        - \frac{\alpha}{\alpha + \beta} p_c^{\alpha + \beta} - \frac{\beta}{\alpha + \beta} q_c^{\alpha + \beta} \right)

    with :math:`p = \mathrm{softmax}(z^T / T)` and :math:`q = \mathrm{softmax}(z^S / T)`. A smaller :math:`\alpha`
    looks harder at classes on which both differ most, a larger :math:`\beta` at those the student is sure of. Where an
    exponent is 0 the loss is the limit: (1, 0) is KD, (0, 1) reverse KL. On :math:`\alpha + \beta = 1` lie the
    alpha-divergences.

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``; detached.
        labels: Not used; taken so that all response losses are called alike.
        alpha: :math:`\alpha`, 0 or more; 0.8 in the authors' example on CIFAR-100, 0.2 for language models.
        beta: :math:`\beta`, 0 or more; 0.3 in that example, 0.7 for language models.
        temperature: T; 4 in the authors' classification code, 1 for language models.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over counted places, ``"sum"`` or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Shapes or dtypes do not fit.
        ConfigError: An exponent below 0, or a temperature that is not above zero.

    Source:
        Wang et al., "ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge Distillation via
        alpha-beta-Divergence", 2025, arXiv 2505.04560.

    Example:
        >>> import torch
        >>> abkd_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor(1.8174)
    """
    _check(alpha, beta)
    rows = partial(alpha_beta_rows, alpha=alpha, beta=beta)
    return softened_divergence(
        rows, student_logits, teacher_logits, labels, temperature=temperature, mask=mask, reduction=reduction
    )


def _check(alpha: float, beta: float) -> None:
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0 <= value < math.inf:
            raise ConfigError("must be zero or more, and finite", where=name, found=value)


@register(
    Card(
        key="abkd",
        name="ABKD",
        title="ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge Distillation via "
        "alpha-beta-Divergence",
        year=2025,
        arxiv="2505.04560",
        code="ghwang-s/abkd",
        knowledge="response",
        equation=r"-\frac{T^2}{\alpha \beta} \sum_c \left( p_c^\alpha q_c^\beta - \frac{\alpha}{\alpha + \beta} "
        r"p_c^{\alpha + \beta} - \frac{\beta}{\alpha + \beta} q_c^{\alpha + \beta} \right)",
        use="Where neither KD nor reverse KL suits: two numbers choose how much probability goes to classes the "
        "student misses, and how much to those it is sure of. For image classes the authors take a large alpha and a "
        "small beta, for language models the other way round.",
        defaults={
            "alpha": "0.8, the authors' example on CIFAR-100 (ResNet56, ResNet20); 0.2 for language models",
            "beta": "0.3, the same example; 0.7 for language models",
            "temperature": "4, as in the authors' classification code; 1 for language models",
        },
        evidence="parity",
        evidence_note="values and gradients of ghwang-s/abkd@df81318 (ABKL, general and limiting cases)",
        choices=(
            "KD's factor T^2 stands in the loss; the authors' weight 64 at T = 4 holds it, and is 4 here.",
            "Where alpha is 0 the limit has 1 / beta^2 (and where beta is 0, 1 / alpha^2); the released code has "
            "1 / beta and 1 / alpha, which agree at 1.",
            "Negative exponents are refused: a class that one side rules out would cost infinitely much.",
        ),
        tasks=("classification", "language"),
        with_labels={"cross_entropy": 1.0},
        weight=4.0,
    ),
    abkd_loss,
)
class ABKD(Objective):
    """Alpha-beta divergence; see ``limbeck.functional.abkd_loss``.

    Args:
        alpha: The teacher's exponent.
        beta: The student's exponent.
        temperature: T.

    >>> loss = ABKD(alpha=0.2, beta=0.7, temperature=1.0)
    """

    contract = Contract(normalizer="positions", mask=True, temperature="squared", spare_class=True)
    student_taps = teacher_taps = ("logits",)

    def __init__(self, alpha: float = 0.8, beta: float = 0.3, temperature: float = 4.0) -> None:
        super().__init__()
        _check(alpha, beta)
        check_positive(temperature, "temperature")
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return abkd_loss(
            student.logits,
            teacher.logits,
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            mask=batch.mask,
        )

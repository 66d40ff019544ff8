"""Generalised Jensen-Shannon divergence: teacher and student both compared with their mixture."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import jensen_shannon_rows, softened_divergence
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_inside, check_positive
from limbeck.core.trace import Trace

_ENDS = "KL divided by beta is its limit at 0 (method kd), reverse KL by 1 - beta that at 1 (method reverse_kl)"


def jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Divergence of teacher and student from a mixture of both.

    .. math::
        L = T^2 \left( \beta\, \mathrm{KL}(p \| m) + (1 - \beta)\, \mathrm{KL}(q \| m) \right), \qquad
        m = \beta p + (1 - \beta) q, \quad p = \mathrm{softmax}(z^T / T),\ q = \mathrm{softmax}(z^S / T)

    Bounded (by :math:`\log 2` at :math:`\beta = 1/2` and T = 1), so that a place where both disagree wholly does not
    rule the batch. A small :math:`\beta` makes it behave like KL, a large one like reverse KL.

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``; detached.
        labels: Not used; taken so that all response losses are called alike.
        beta: The teacher's share of the mixture, between 0 and 1; 0.5 is the symmetric divergence. GKD tries 0.1, 0.5
            and 0.9.
        temperature: T; 1 in the paper.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over counted places, ``"sum"`` or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Shapes or dtypes do not fit.
        ConfigError: ``beta`` not between 0 and 1, or a temperature that is not above zero.

    Source:
        Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes", 2023, arXiv
        2306.13649, equation 1; the symmetric one already in f-DISTILL, arXiv 2307.15190.

    Example:
        >>> import torch
        >>> jsd_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor(0.3278)
    """
    check_inside(beta, "beta", remedy=_ENDS)
    rows = partial(jensen_shannon_rows, beta=beta)
    return softened_divergence(
        rows, student_logits, teacher_logits, labels, temperature=temperature, mask=mask, reduction=reduction
    )


@register(
    Card(
        key="jsd",
        name="Generalised JSD",
        title="On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
        year=2023,
        arxiv="2306.13649",
        knowledge="response",
        equation=r"T^2 \left( \beta\, \mathrm{KL}(p \| m) + (1 - \beta)\, \mathrm{KL}(q \| m) \right), \quad "
        r"m = \beta p + (1 - \beta) q",
        use="Where the teacher is sometimes badly wrong or the student too small to cover all it says: the divergence "
        "is bounded, and beta moves it from covering (small) to seeking the teacher's modes (large).",
        defaults={
            "beta": "0.5, the symmetric divergence; GKD also uses 0.1 and 0.9",
            "temperature": "1, as in GKD",
        },
        evidence="parity",
        evidence_note="value and gradient of jongwooko/distillm@d47e77f (js_distance, float32) and of "
        "MANGA-UOFA/fdistill@8e2ff7c (both halves of its symmetric divergence, float64); GKD has released no code",
        choices=(
            "A temperature, with KD's factor T^2, which GKD leaves at 1.",
            "The labels beside it stand for the training on labels that comes before it in the paper.",
        ),
        tasks=("classification", "language"),
        with_labels={"cross_entropy": 1.0},
    ),
    jsd_loss,
)
class JSD(Objective):
    """Generalised Jensen-Shannon divergence; see ``limbeck.functional.jsd_loss``.

    Args:
        beta: The teacher's share of the mixture.
        temperature: T.

    >>> loss = JSD(beta=0.1)
    """

    contract = Contract(normalizer="positions", mask=True, temperature="squared", spare_class=True)
    student_taps = teacher_taps = ("logits",)

    def __init__(self, beta: float = 0.5, temperature: float = 1.0) -> None:
        super().__init__()
        check_inside(beta, "beta", remedy=_ENDS)
        check_positive(temperature, "temperature")
        self.beta, self.temperature = beta, temperature

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return jsd_loss(student.logits, teacher.logits, beta=self.beta, temperature=self.temperature, mask=batch.mask)

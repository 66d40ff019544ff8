"""Adaptive KL (AKL): KL and reverse KL, weighed by where teacher and student differ."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import kl_rows, softened_divergence
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_inside, check_positive
from limbeck.core.trace import Trace

_ENDS = "with all classes in the head this is the method kd, with almost none nearly reverse_kl"


def adaptive_kl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    head: float = 0.5,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""KL where the teacher's most probable classes are missed, reverse KL where its improbable ones are.

    .. math::
        L = T^2 \frac{g_h\, \mathrm{KL}(p \| q) + g_t\, \mathrm{KL}(q \| p)}{g_h + g_t}, \qquad
        g_h = \sum_{c \in \text{head}} |p_c - q_c|, \quad g_t = \sum_{c \notin \text{head}} |p_c - q_c|

    with :math:`p = \mathrm{softmax}(z^T / T)` and :math:`q = \mathrm{softmax}(z^S / T)`. The head are the teacher's
    most probable classes, as many as together have at most ``head`` of its probability, and the first of all in any
    case. Each place has its own weights; they carry no gradient.

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``; detached.
        labels: Not used; taken so that all response losses are called alike.
        head: How much probability the head has, between 0 and 1; 0.5 in the authors' code.
        temperature: T; 1 in the paper.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over counted places, ``"sum"`` or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Shapes or dtypes do not fit.
        ConfigError: ``head`` not between 0 and 1, or a temperature that is not above zero.

    Source:
        Wu et al., "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models", 2024,
        arXiv 2404.02657.

    Example:
        >>> adaptive_kl_loss(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[0.0, 2.0, 1.0]]))
        tensor(1.3442)
    """
    check_inside(head, "head", remedy=_ENDS)
    return softened_divergence(
        partial(_rows, head=head),
        student_logits,
        teacher_logits,
        labels,
        temperature=temperature,
        mask=mask,
        reduction=reduction,
    )


def _rows(log_p: Tensor, log_q: Tensor, head: float) -> Tensor:
    share = head_share(log_p, log_q, head)
    # A divergence may be infinite where its weight is 0.
    forward = kl_rows(log_p, log_q).masked_fill(share == 0, 0.0)
    reverse = kl_rows(log_q, log_p).masked_fill(share == 1, 0.0)
    return share * forward + (1 - share) * reverse


@torch.no_grad()
def head_share(log_p: Tensor, log_q: Tensor, head: float) -> Tensor:
    r"""How much of the gap between two predictions lies in the first one's head, :math:`g_h / (g_h + g_t)`, ``[*]``.

    One half where there is no gap.

    >>> p, q = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.5, 0.2, 0.3])
    >>> head_share(p.log(), q.log(), 0.5)
    tensor(0.2500)
    """
    ordered, order = log_p.exp().sort(dim=-1, descending=True, stable=True)
    gap = (ordered - log_q.exp().gather(-1, order)).abs()
    tail = ordered.cumsum(dim=-1) > head
    tail[..., 0] = False
    within, beyond = gap.masked_fill(tail, 0.0).sum(dim=-1), gap.masked_fill(~tail, 0.0).sum(dim=-1)
    whole = within + beyond
    return torch.where(whole > 0, within / whole.masked_fill(whole == 0, 1.0), 0.5)


@register(
    Card(
        key="adaptive_kl",
        name="Adaptive KL (AKL)",
        title="Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models",
        year=2024,
        arxiv="2404.02657",
        code="wutaiqiang/LLM_KD_AKL",
        knowledge="response",
        equation=r"T^2 \frac{g_h\, \mathrm{KL}(p \| q) + g_t\, \mathrm{KL}(q \| p)}{g_h + g_t}",
        use="For language models that are trained for few epochs, where KL learns the likely tokens first and reverse "
        "KL the unlikely ones: it takes of both what the place at hand needs.",
        defaults={"head": "0.5, as in the authors' code", "temperature": "1, as in the paper"},
        evidence="parity",
        evidence_note="value and gradient of wutaiqiang/LLM_KD_AKL@ff278be (float32)",
        choices=(
            "The head as the authors' code has it: without the class that carries it over the threshold, except the "
            "first. Another implementation (SakanaAI/TAID) sorts upwards and takes some of the tail for the head.",
            "A temperature, with KD's factor T^2, which the paper leaves at 1.",
            "The labels beside it stand for the training on labels that comes before it in the paper.",
        ),
        tasks=("classification", "language"),
        with_labels={"cross_entropy": 1.0},
    ),
    adaptive_kl_loss,
)
class AdaptiveKL(Objective):
    """Adaptive KL; see ``limbeck.functional.adaptive_kl_loss``.

    Args:
        head: How much of the teacher's probability its head has.
        temperature: T.

    >>> loss = AdaptiveKL(head=0.8)
    """

    contract = Contract(normalizer="positions", mask=True, temperature="squared", spare_class=True, stop_gradient=True)
    student_taps = teacher_taps = ("logits",)

    def __init__(self, head: float = 0.5, temperature: float = 1.0) -> None:
        super().__init__()
        check_inside(head, "head", remedy=_ENDS)
        check_positive(temperature, "temperature")
        self.head, self.temperature = head, temperature

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        logits = student.logits, teacher.logits
        return adaptive_kl_loss(*logits, head=self.head, temperature=self.temperature, mask=batch.mask)

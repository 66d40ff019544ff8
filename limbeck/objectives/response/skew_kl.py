"""Skew KL divergence (DistiLLM): the student is compared with a mixture that holds some of the teacher."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import kl_rows, log_mixture, softened_divergence
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_inside, check_positive
from limbeck.core.trace import Trace

_END = "without skew this is the method kd or reverse_kl"


def skew_kl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    skew: float = 0.1,
    reverse: bool = False,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""KL whose second distribution is mixed with some of the first, which bounds it and steadies its gradient.

    .. math::
        L &= T^2\, \mathrm{KL}(p \,\|\, \lambda p + (1 - \lambda) q) \qquad \text{(skew KL)} \\
        L &= T^2\, \mathrm{KL}(q \,\|\, \lambda q + (1 - \lambda) p) \qquad \text{(skew reverse KL)}

    with :math:`p = \mathrm{softmax}(z^T / T)` and :math:`q = \mathrm{softmax}(z^S / T)`. Neither exceeds
    :math:`- T^2 \log \lambda`. Plain KL is the limit :math:`\lambda \to 0`.

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``; detached.
        labels: Not used; taken so that all response losses are called alike.
        skew: :math:`\lambda`, between 0 and 1; 0.1 in the paper.
        reverse: Skew reverse KL instead.
        temperature: T; 1 in the paper.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over counted places, ``"sum"`` or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Shapes or dtypes do not fit.
        ConfigError: ``skew`` not between 0 and 1, or a temperature that is not above zero.

    Source:
        Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models", 2024, arXiv 2402.03898.

    Example:
        >>> import torch
        >>> skew_kl_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor(1.0988)
    """
    check_inside(skew, "skew", remedy=_END)

    def rows(teacher: Tensor, student: Tensor) -> Tensor:
        first, second = (student, teacher) if reverse else (teacher, student)
        return kl_rows(first, log_mixture(first, second, skew))

    return softened_divergence(
        rows, student_logits, teacher_logits, labels, temperature=temperature, mask=mask, reduction=reduction
    )


@register(
    Card(
        key="skew_kl",
        name="Skew KL (DistiLLM)",
        title="DistiLLM: Towards Streamlined Distillation for Large Language Models",
        year=2024,
        arxiv="2402.03898",
        code="jongwooko/distillm",
        knowledge="response",
        equation=r"T^2\,\mathrm{KL}(p \,\|\, \lambda p + (1 - \lambda) q)",
        use="In place of KD or reverse KL for language models, whose many unlikely tokens make both noisy: gradients "
        "stay of one size. The reverse one is the paper's better half on text that the student has written.",
        defaults={
            "skew": "0.1, the paper's value",
            "reverse": "skew KL; DistiLLM reports both",
            "temperature": "1, as in the paper",
        },
        evidence="parity",
        evidence_note="value and gradient of jongwooko/distillm@d47e77f (skewed_forward_kl less the teacher's entropy, "
        "and skewed_reverse_kl; float32)",
        choices=(
            "The divergence where the authors' code has the cross-entropy: the same gradient, and 0 at equality.",
            "A temperature, with KD's factor T^2, which the paper leaves at 1.",
            "The labels beside it stand for the training on labels that comes before it in the paper.",
        ),
        tasks=("classification", "language"),
        with_labels={"cross_entropy": 1.0},
    ),
    skew_kl_loss,
)
class SkewKL(Objective):
    """Skew KL divergence; see ``limbeck.functional.skew_kl_loss``.

    Args:
        skew: The share of the first distribution in the second.
        reverse: Skew reverse KL instead.
        temperature: T.

    >>> loss = SkewKL(reverse=True)
    """

    contract = Contract(normalizer="positions", mask=True, temperature="squared", spare_class=True)
    student_taps = teacher_taps = ("logits",)

    def __init__(self, skew: float = 0.1, reverse: bool = False, temperature: float = 1.0) -> None:
        super().__init__()
        check_inside(skew, "skew", remedy=_END)
        check_positive(temperature, "temperature")
        self.skew, self.reverse, self.temperature = skew, reverse, temperature

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return skew_kl_loss(
            student.logits,
            teacher.logits,
            skew=self.skew,
            reverse=self.reverse,
            temperature=self.temperature,
            mask=batch.mask,
        )

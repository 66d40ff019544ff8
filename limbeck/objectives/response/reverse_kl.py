"""Reverse Kullback-Leibler divergence: the student is asked to put nothing where the teacher puts nothing."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import kl_rows, softened_divergence
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_positive
from limbeck.core.trace import Trace


def reverse_kl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Divergence of the teacher's prediction from the student's: KD the other way round.

    .. math:: L = T^2 \, \mathrm{KL}\big(\mathrm{softmax}(z^S / T) \,\|\, \mathrm{softmax}(z^T / T)\big)

    It seeks a mode of the teacher where KD covers all of them. A class that the teacher rules out with a logit of minus
    infinity, and the student does not, makes it infinite.

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``; detached.
        labels: Not used; taken so that all response losses are called alike.
        temperature: T; 1 in the papers.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over counted places, ``"sum"`` or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Shapes or dtypes do not fit.
        ConfigError: A temperature that is not above zero.

    Source:
        Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation", 2023, arXiv 2307.15190; also
        GKD, arXiv 2306.13649.

    Example:
        >>> import torch
        >>> reverse_kl_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]))
        tensor(1.6596)
    """
    return softened_divergence(
        lambda teacher, student: kl_rows(student, teacher),
        student_logits,
        teacher_logits,
        labels,
        temperature=temperature,
        mask=mask,
        reduction=reduction,
    )


@register(
    Card(
        key="reverse_kl",
        name="Reverse KL",
        title="f-Divergence Minimization for Sequence-Level Knowledge Distillation",
        year=2023,
        arxiv="2307.15190",
        code="MANGA-UOFA/fdistill",
        knowledge="response",
        equation=r"T^2\,\mathrm{KL}(\mathrm{softmax}(z_s/T)\,\|\,\mathrm{softmax}(z_t/T))",
        use="For students much smaller than the teacher, language models above all: better to be right about one of "
        "the teacher's answers than to spread over all of them. Beside KD it makes the symmetric divergence.",
        defaults={"temperature": "1, as in the papers"},
        evidence="parity",
        evidence_note="value and gradient of jongwooko/distillm@d47e77f (reverse_kl, float32)",
        choices=(
            "A temperature, with KD's factor T^2, which the papers leave at 1.",
            "The labels beside it stand for the training on labels that comes before it in the paper.",
        ),
        tasks=("classification", "language"),
        with_labels={"cross_entropy": 1.0},
    ),
    reverse_kl_loss,
)
class ReverseKL(Objective):
    """Reverse Kullback-Leibler divergence; see ``limbeck.functional.reverse_kl_loss``.

    Args:
        temperature: T.

    >>> from limbeck.objectives import KD
    >>> loss = 0.5 * KD(temperature=1.0) + 0.5 * ReverseKL()
    """

    contract = Contract(normalizer="positions", mask=True, temperature="squared", spare_class=True)
    student_taps = teacher_taps = ("logits",)

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        check_positive(temperature, "temperature")
        self.temperature = temperature

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return reverse_kl_loss(student.logits, teacher.logits, temperature=self.temperature, mask=batch.mask)

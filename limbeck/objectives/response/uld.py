"""Universal logit distillation (ULD): sorted probabilities compared, whatever the tokens they belong to."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_floating, check_positive, check_same_shape, fit_mask, reduce, widen
from limbeck.core.trace import Trace
from limbeck.objectives.parts.paired_tokens import Pairing, by_sample, pairs_of, partners


def uld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Wasserstein distance between predictions over vocabularies of which nothing is known.

    .. math:: L = \frac 1 B \sum_b \frac 1 {n_b} \sum_i \sum_c \left| p_{(c)} - q_{(c)} \right|, \qquad
        p = \mathrm{softmax}(z^T / T),\ q = \mathrm{softmax}(z^S / T)

    where :math:`p_{(c)}` is the c-th largest probability, 0 beyond the smaller vocabulary. It is how far probability
    has to move if any class is equally far from any other: only how sure a prediction is counts, not of what. The mean
    runs over a sample's :math:`n_b` places that count, then over samples.

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C']`` at the same places; detached. See ``parts.paired_tokens`` for other places.
        labels: Not used; taken so that all response losses are called alike.
        temperature: T; 1 in the authors' code.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"``, ``"sum"`` over counted places, or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Logits of other places.
        ConfigError: A temperature that is not above zero.

    Source:
        Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs", 2024,
        arXiv 2402.12030.

    >>> uld_loss(torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.2, 0.2, 0.6]]).log())
    tensor(0.6000)
    """
    check_floating(student_logits, "student_logits", least=2)
    check_floating(teacher_logits, "teacher_logits", least=2)
    check_positive(temperature, "temperature")
    check_same_shape(student_logits[..., 0], teacher_logits[..., 0], "student_logits", "teacher_logits")
    ordered = [
        (widen(z) / temperature).softmax(dim=-1).sort(dim=-1, descending=True).values
        for z in (student_logits, teacher_logits.detach())
    ]
    size = max(p.shape[-1] for p in ordered)
    q, p = (torch.nn.functional.pad(o, (0, size - o.shape[-1])) for o in ordered)
    values = (q - p).abs().sum(dim=-1)
    if reduction != "mean":
        return reduce(values, mask, reduction)
    return by_sample(
        values, torch.ones_like(values, dtype=torch.bool) if mask is None else fit_mask(mask, values), mask
    )


@register(
    Card(
        key="uld",
        name="ULD",
        title="Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs",
        year=2024,
        arxiv="2402.12030",
        code="Nicolas-BZRD/llm-recipes",
        knowledge="response",
        equation=r"\frac 1 n \sum_i \sum_c | p_{(c)} - q_{(c)} |",
        use="For a teacher with another tokenizer, beside the labels: it carries over how sure the teacher is. With "
        "one tokenizer kd says more.",
        defaults={
            "pairing": "by order, as in the authors' code",
            "temperature": "1, as in the authors' code",
        },
        evidence="parity",
        evidence_note="value and gradient of Nicolas-BZRD/llm-recipes@ab6e798 (DistillationLoss, with its pairing)",
        choices=(
            "All places count that the data say do; the authors' training leaves the student's end of text out.",
            "pairing 'text' is ours: places that have read equally far, whose predictions go on from the same text.",
            "A sample of which no place has a partner adds 0.",
        ),
        needs=("teacher_mask",),
        tasks=("classification", "language", "cross-tokenizer"),
        with_labels={"cross_entropy": 1.0},
        weight=1.5,
    ),
    uld_loss,
)
class ULD(Objective):
    """Universal logit distillation; see ``limbeck.functional.uld_loss``.

    Args:
        pairing: Which of the teacher's places belongs to which: ``"order"``, the k-th that counts to the k-th, or
            ``"text"``, those that have read equally far. With one tokenizer each to itself.
        temperature: T.

    >>> loss = 1.5 * ULD(pairing="text")
    """

    contract = Contract(normalizer="samples", mask=True, spare_class=True)
    student_taps = teacher_taps = ("logits",)

    def __init__(self, pairing: Pairing = "order", temperature: float = 1.0) -> None:
        super().__init__()
        check_positive(temperature, "temperature")
        self.pairing, self.temperature = pairing, temperature

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        pairs = pairs_of(batch, self.pairing, student.logits, teacher.logits)
        said = partners(teacher.logits, pairs)
        if pairs is None:
            return uld_loss(student.logits, said, temperature=self.temperature, mask=batch.mask)
        values = uld_loss(student.logits, said, temperature=self.temperature, reduction="none")
        return by_sample(values, pairs >= 0, batch.mask)

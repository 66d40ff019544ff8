"""Refined logit distillation (RLD): what the teacher says of a sample, without what it gets wrong."""

from __future__ import annotations

import math

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import kl_rows
from limbeck.core.labels import class_labels
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_logits, check_positive, fit_mask, reduce, widen
from limbeck.core.schedules import WarmUp
from limbeck.core.top_k import TopK
from limbeck.core.trace import Trace


def rld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    confidence_temperature: float | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The teacher's confidence, carried over to the label, and its view of the classes that it ranks below the label.

    .. math::
        L &= \alpha T_c^2\, \mathrm{KL}\left( (\max_c p^T_c, 1 - \max_c p^T_c) \,\|\, (p^S_y, 1 - p^S_y) \right)
            + \beta T^2\, \mathrm{KL}\left( \hat p^T \,\|\, \hat p^S \right), \qquad p = \mathrm{softmax}(z / T_c) \\
        \hat p &= \mathrm{softmax}\left( (z_c / T)_{c \in M} \right), \qquad M = \{ c : z^T_c < z^T_y \}

    Where the teacher is wrong, plain KD pulls away from the label. Here its highest probability is asked of the label,
    whichever class it stands at, and the label with all classes that it believes in at least as much is left out of the
    rest. A teacher that ranks the label last teaches nothing of the rest. Where it is right this is DKD.

    Args:
        student_logits: ``[B, *, C]`` with two classes or more.
        teacher_logits: ``[B, *, C]``; detached.
        labels: Integers ``[B, *]``, negative where a place has no label; such a place does not count.
        alpha: Weight of the confidence; 1 in the authors' runs.
        beta: Weight of the other classes; 8 in the authors' code, 0.5 in its ImageNet runs.
        temperature: :math:`T`; 4 in the authors' code, 1 in its ImageNet runs.
        confidence_temperature: :math:`T_c`; ``None``: the same, as in the authors' CIFAR-100 runs.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over places that count and have a label, ``"sum"``, or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: No labels, soft labels, fewer than two classes, or shapes that differ.
        ConfigError: A temperature that is not above zero.

    Source:
        Sun et al., "Knowledge Distillation with Refined Logits", 2024, arXiv 2408.07703.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2.0, 3.0, 1.0]])
        >>> rld_loss(student, teacher, torch.tensor([0]), temperature=1.0)
        tensor(0.9957)
    """
    check_logits(student_logits, teacher_logits, labels)
    check_positive(temperature, "temperature")
    confidence = temperature if confidence_temperature is None else confidence_temperature
    check_positive(confidence, "confidence_temperature")
    labels, labelled = class_labels(labels, student_logits.shape[-1], "RLD", others=True)
    target = labels.unsqueeze(-1)
    student, teacher = widen(student_logits), widen(teacher_logits.detach())

    told = TopK.at(teacher, teacher.argmax(dim=-1, keepdim=True), confidence).buckets()
    sure = kl_rows(told, TopK.at(student, target, confidence).buckets())

    below = (teacher < teacher.gather(-1, target)) & (teacher > -math.inf)
    none = ~below.any(dim=-1, keepdim=True)  # then any two equal rows will do
    rest = [(z / temperature).masked_fill(~below, -math.inf).masked_fill(none, 0.0) for z in (teacher, student)]
    others = kl_rows(rest[0].log_softmax(dim=-1), rest[1].log_softmax(dim=-1))

    values = alpha * confidence**2 * sure + beta * temperature**2 * others
    mask = labelled if mask is None else labelled & fit_mask(mask, values)
    return reduce(values, mask, reduction)


@register(
    Card(
        key="rld",
        name="RLD",
        title="Knowledge Distillation with Refined Logits",
        year=2024,
        arxiv="2408.07703",
        code="zju-SWJ/RLD",
        knowledge="response",
        equation=r"\alpha T_c^2\, \mathrm{KL}(b^T \| b^S) + \beta T^2\, \mathrm{KL}(\hat p^T \| \hat p^S), \quad "
        r"b^T = (\max_c p^T_c, 1 - \max_c p^T_c),\ b^S = (p^S_y, 1 - p^S_y)",
        use="In place of KD or DKD where labels are to be trusted more than the teacher, which errs often enough to "
        "matter on the training set.",
        defaults={
            "alpha": "1, as in the authors' runs",
            "beta": "8, as in the authors' code; 0.5 in its ImageNet runs",
            "temperature": "4, as in the authors' code; 1 in its ImageNet runs",
            "confidence_temperature": "the same, as in the authors' CIFAR-100 runs (--same-t)",
        },
        evidence="parity",
        evidence_note="value and gradient of zju-SWJ/RLD@d54578f (rld_loss)",
        choices=("The warm-up over the first 20 of 240 epochs is its usual weight, as for DKD.",),
        needs=("labels",),
        with_labels={"cross_entropy": 1.0},
        weight=WarmUp(0.083),
    ),
    rld_loss,
)
class RLD(Objective):
    """Refined logit distillation; see ``limbeck.functional.rld_loss``.

    Args:
        alpha: Weight of the confidence.
        beta: Weight of the other classes.
        temperature: T.
        confidence_temperature: That of the confidence; by default the same.

    >>> loss = WarmUp(0.083) * RLD(beta=4.0)
    """

    contract = Contract(normalizer="labels", at_equal=None, mask=True, temperature="squared", spare_class=True)
    student_taps = teacher_taps = ("logits",)

    def __init__(
        self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0,
        confidence_temperature: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_positive(temperature, "temperature")
        self.alpha, self.beta, self.temperature = alpha, beta, temperature
        self.confidence_temperature = confidence_temperature

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return rld_loss(
            student.logits,
            teacher.logits,
            batch.require("labels"),
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            confidence_temperature=self.confidence_temperature,
            mask=batch.mask,
        )

"""Dynamic contrastive distillation (DCD): hard negatives chosen by the teacher, samples weighed by difficulty."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import kl_rows, soften
from limbeck.core.errors import ConfigError
from limbeck.core.matching import hardest, match_scores, only
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_positive, reduce
from limbeck.core.schedules import Linear
from limbeck.core.trace import Trace

Difficulty = Literal["gap", "entropy"]


def dcd_itr_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    hard: int = 4,
    difficulty: Difficulty = "gap",
    pace: float | Tensor = 0.5,
    contrast: float = 1.0,
    distil: float = 1.0,
    tau: float = 1.0,
    temperature: float = 2.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Contrast and divergence over each match and the few negatives that the teacher finds hardest.

    .. math::
        L_i = -a \log \frac{e^{s_{ii} / \tau}}{\sum_{j \in H_i} e^{s_{ij} / \tau}}
            + b \, w_i \, T^2 \, \mathrm{KL}\left( p^T_i \,\|\, p^S_i \right), \qquad
        w_i = \frac{e^{-d_i / \lambda}}{\mathrm{mean}_k \, e^{-d_k / \lambda}}

    :math:`H_i` is the match and its K hardest negatives, p the softmax of the scores over it, :math:`d_i` their
    divergence or the entropy of :math:`p^T_i`; weights carry no gradient. Rows and columns are averaged.

    Args:
        student_logits: Match scores ``[B, B]``: row by image, column by text; the diagonal matches. Pairs that are not
            selected do not matter.
        teacher_logits: The same; carries no gradient.
        labels: Not used; taken so that all response losses are called alike.
        hard: K; at most the negatives there are.
        difficulty: ``"gap"``: the student's divergence from the teacher; ``"entropy"``: the teacher's own doubt.
        pace: :math:`\lambda`: the smaller, the less hard samples count.
        contrast, distil: The weights a and b.
        tau: :math:`\tau`, of the contrast: 1 for scores as they are trained with, 0.07 for cosines.
        temperature: T.
        mask: ``[B]`` booleans, True where a pair counts; others are nobody's negatives.
        reduction: ``"mean"`` over pairs that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: Scores that are not square, or of different shapes.
        ConfigError: An unknown difficulty, or a setting not above zero.

    Source: Rao et al., "Dynamic Contrastive Distillation for Image-Text Retrieval", 2022, arXiv 2207.01426.

    >>> import torch
    >>> dcd_itr_loss(2 * torch.eye(3), 2 * torch.eye(3), hard=1)
    tensor(0.1269)
    """
    for name, value in (("hard", hard), ("tau", tau), ("temperature", temperature)):
        check_positive(value, name)
    if difficulty not in ("gap", "entropy"):
        raise ConfigError("no such measure", where="difficulty", found=repr(difficulty), wanted="'gap' or 'entropy'")
    s, t, negatives = match_scores(student_logits, teacher_logits, mask)
    values = s.new_zeros(len(s))
    for own, other in ((s, t), (s.T, t.T)):
        columns, there = hardest(other, negatives, hard)
        a, b = (torch.cat([x.diagonal()[:, None], only(x.gather(1, columns), there)], 1) for x in (own, other))
        log_p = soften(b, temperature)
        gap = kl_rows(log_p, soften(a, temperature))
        doubt = gap.detach() if difficulty == "gap" else -(log_p.exp() * log_p).sum(dim=1)
        matched = (a / tau).logsumexp(dim=1) - a[:, 0] / tau
        values = values + 0.5 * (contrast * matched + distil * temperature**2 * _weights(-doubt / pace, mask) * gap)
    return reduce(values, mask, reduction)


def _weights(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the samples that count, times their number: 1 on average."""
    return logits.softmax(0) * len(logits) if mask is None else only(logits, mask).softmax(0) * mask.sum()


@register(
    Card(
        key="dcd_itr",
        name="DCD",
        title="Dynamic Contrastive Distillation for Image-Text Retrieval",
        year=2022,
        arxiv="2207.01426",
        knowledge="relation",
        equation=r"-a \log \frac{e^{s_{ii} / \tau}}{\sum_{j \in H_i} e^{s_{ij} / \tau}} "
        r"+ b \, w_i \, T^2 \, \mathrm{KL}(p^T_i \| p^S_i)",
        use="To compress a fusion encoder for retrieval, beside its own matching loss: only hard pairs are compared.",
        defaults={
            "pace": "0.5, and 5 at the end, so that hard samples come to count; the abstract leaves it open",
        },
        evidence="reading",
        choices=(
            "Formulas follow the abstract's two ideas: negatives chosen by the teacher, weights by difficulty.",
            "Difficulty is the student's divergence from the teacher; candidates come from the batch.",
        ),
        tasks=("retrieval",),
    ),
    dcd_itr_loss,
)
class DCDITR(Objective):
    """Dynamic contrastive distillation; see ``limbeck.functional.dcd_itr_loss`` for the other options.

    Args:
        pace: How gently difficulty weighs at the start of training.
        last_pace: At its end; below ``pace`` hard samples come first.
    """

    contract = Contract(normalizer="samples", at_equal=None, mask=True, decomposes=False, stop_gradient=True)
    student_taps = teacher_taps = ("logits",)

    def __init__(
        self,
        hard: int = 4,
        difficulty: Difficulty = "gap",
        pace: float = 0.5,
        last_pace: float = 5.0,
        contrast: float = 1.0,
        distil: float = 1.0,
        tau: float = 1.0,
        temperature: float = 2.0,
    ) -> None:
        super().__init__()
        check_positive(min(pace, last_pace), "pace")
        self.hard, self.difficulty, self.pace, self.last_pace = hard, difficulty, pace, last_pace
        self.contrast, self.distil, self.tau, self.temperature = contrast, distil, tau, temperature
        if difficulty == "entropy":
            self.contract = replace(self.contract, stop_gradient=False)  # type: ignore[misc]

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        options = {n: getattr(self, n) for n in ("hard", "difficulty", "contrast", "distil", "tau", "temperature")}
        pace = Linear(self.pace, self.last_pace)(batch.progress).to(student.logits.device)
        return dcd_itr_loss(student.logits, teacher.logits, pace=pace, **options, mask=batch.mask)

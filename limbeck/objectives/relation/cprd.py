"""Contrastive partial ranking distillation (CPRD): a query's hard negatives in the order of a cross-encoder."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.matching import hardest, match_scores, only
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_positive, reduce
from limbeck.core.trace import Trace


def cprd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    hard: int = 16,
    threshold: float | None = None,
    easy: bool = True,
    contrast: float = 1.0,
    ranking: float = 1.0,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The contrast of each matching pair, and a truncated list-wise loss on the order of the hard negatives.

    .. math::
        L_i = -\log \frac{e^{s_{ii}}}{\sum_j e^{s_{ij}}} - \frac \lambda K \sum_{k=1}^K
            \log \frac{e^{s_{i,r_k}}}{\sum_{l \ge k} e^{s_{i,r_l}} + \sum_{e \in E_i} e^{s_{ie}}}

    :math:`r_1, \dots, r_K` are the K negatives that the student scores highest, in the teacher's order; E are the other
    negatives, which are ranked below them and not among themselves. The match itself takes no part in the ranking. Both
    parts are averaged over the two directions (rows, columns). Of the teacher's scores only the order matters. The loss
    ties the samples of a batch together.

    Args:
        student_logits: Match scores ``[B, B]``: row by image (query), column by text; the diagonal matches.
        teacher_logits: The same; carries no gradient.
        labels: Not used; taken so that all response losses are called alike.
        hard: K; at most the negatives there are. 16 here; the paper's number was not to be had.
        threshold: The least score of the teacher at which a negative's rank counts; the others count as easy.
        easy: Whether easy negatives stand in the denominators.
        contrast: Weight of the first part, the dual encoder's own loss.
        ranking: :math:`\lambda`.
        temperature: By which the student's scores are divided: 1 for scores as they are trained with, 0.07 for cosines.
        mask: ``[B]`` booleans, True where a pair counts; others are nobody's negatives.
        reduction: ``"mean"`` over pairs that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: Scores that are not square, or of different shapes.
        ConfigError: ``hard`` or ``temperature`` not above zero.

    Source: Chen et al., "How to Make Cross Encoder a Good Teacher ...?", 2024, arXiv 2407.07479.

    >>> import torch
    >>> cprd_loss(torch.eye(3), torch.tensor([[2.0, 1, 0], [1, 2, 0], [1, 0, 2]]), contrast=0.0)
    tensor(0.3466)
    """
    check_positive(hard, "hard")
    check_positive(temperature, "temperature")
    s, t, negatives = match_scores(student_logits, teacher_logits, mask)
    s = s / temperature
    values = s.new_zeros(len(s))
    for own, other in ((s, t), (s.T, t.T)):
        others = only(own, negatives).logsumexp(dim=1)
        matched = torch.logaddexp(s.diagonal(), others) - s.diagonal()
        ranked = _ranking(own, other, negatives, hard, threshold, easy)
        values = values + 0.5 * (contrast * matched + ranking * ranked)
    return reduce(values, mask, reduction)


def _ranking(s: Tensor, t: Tensor, negatives: Tensor, hard: int, threshold: float | None, easy: bool) -> Tensor:
    columns, there = hardest(s, negatives, hard)
    order = only(t.gather(1, columns), there).argsort(dim=1, descending=True, stable=True)
    columns, there = columns.gather(1, order), there.gather(1, order)
    ranked = only(s.gather(1, columns), there)
    below = ranked.flip(1).logcumsumexp(dim=1).flip(1)
    if easy:
        below = torch.logaddexp(below, only(s, negatives.scatter(1, columns, False)).logsumexp(dim=1, keepdim=True))
    if threshold is not None:
        there = there & (t.gather(1, columns) >= threshold)
    return (below - ranked).masked_fill(~there, 0.0).sum(dim=1) / there.sum(dim=1).clamp(min=1)


@register(
    Card(
        key="cprd",
        name="CPRD",
        title="How to Make Cross Encoder a Good Teacher for Efficient Image-Text Retrieval?",
        year=2024,
        arxiv="2407.07479",
        knowledge="relation",
        equation=r"-\frac 1 K \sum_{k=1}^K \log \frac{e^{s_{i,r_k}}}{\sum_{l \ge k} e^{s_{i,r_l}} + \sum_{e \in E_i} "
        r"e^{s_{ie}}}",
        use="To teach a dual encoder by a cross-encoder whose scores are of another kind: only their order is used. "
        "Wants large batches, whose pairs are each other's negatives.",
        defaults={"hard": "16, unspecified in what could be read", "ranking": "1, unspecified in what could be read"},
        evidence="reading",
        evidence_note="worked numbers and the identities of the loss, computed independently",
        choices=(
            "The form of the loss follows the abstract and a note on the paper; released code there is none.",
            "Negatives come from the batch; the paper adds queues of momentum encoders.",
            "The student picks the hard negatives, the teacher orders them; a threshold is an option.",
        ),
        tasks=("retrieval",),
    ),
    cprd_loss,
)
class CPRD(Objective):
    """Contrastive partial ranking distillation; see ``limbeck.functional.cprd_loss`` for the options."""

    contract = Contract(normalizer="samples", at_equal=None, mask=True, decomposes=False)
    student_taps = teacher_taps = ("logits",)

    def __init__(
        self,
        hard: int = 16,
        threshold: float | None = None,
        easy: bool = True,
        contrast: float = 1.0,
        ranking: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        check_positive(hard, "hard")
        check_positive(temperature, "temperature")
        self.hard, self.threshold, self.easy = hard, threshold, easy
        self.contrast, self.ranking, self.temperature = contrast, ranking, temperature

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        names = ("hard", "threshold", "easy", "contrast", "ranking", "temperature")
        options = {name: getattr(self, name) for name in names}
        return cprd_loss(student.logits, teacher.logits, **options, mask=batch.mask)

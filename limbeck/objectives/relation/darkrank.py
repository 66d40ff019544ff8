"""DarkRank: for every sample, its neighbours in the order in which the teacher would name them."""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import kl_rows
from limbeck.core.matching import only
from limbeck.core.objective import Contract, Objective
from limbeck.core.precision import without_autocast
from limbeck.core.reduction import Reduction, check_inside, check_positive, reduce
from limbeck.core.relations import distances, paired_rows, unit
from limbeck.core.trace import Trace


@without_autocast
def darkrank_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    *,
    scale: float = 3.5,
    power: float = 2.0,
    length: int = 4,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Divergence between two distributions over the orders of each sample's nearest neighbours.

    .. math::
        L = \frac 1 N \sum_q \mathrm{KL}\left( P^T(\pi) \,\|\, P^S(\pi) \right), \qquad
        P(\pi) = \prod_{i=1}^K \frac{e^{S(x_{\pi(i)})}}{\sum_{j \ge i} e^{S(x_{\pi(j)})}}, \qquad
        S(x) = -\left( \alpha \| x - q \|_2^2 \right)^\beta

    Vectors have length 1. Every sample is the query q once; :math:`\pi` runs over all orders of the K samples that the
    teacher holds nearest to it. This is the paper's soft transfer; its cost grows with K!.

    Args:
        student_feature: ``[B, *]``; flattened to one vector a sample.
        teacher_feature: ``[B, *]``, of any width; detached.
        scale: :math:`\alpha`; 3.5 in the authors' example. power: :math:`\beta`; 2 there.
        length: K, 2 to 6; 4 in the authors' example. In a smaller batch, all others.
        mask: ``[B]`` booleans, True where a sample counts, as query and as neighbour; or over the first dimensions of
            both features.
        reduction: ``"mean"`` over queries that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: Features of different batch sizes, or a mask that does not fit.
        ConfigError: ``scale`` or ``power`` not above zero, or a list too short or too long.

    Source: Chen et al., "DarkRank: Accelerating Deep Metric Learning via Cross Sample Similarities Transfer", 2018,
        arXiv 1707.01220.

    >>> import torch
    >>> teacher = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    >>> darkrank_loss(teacher.flip(0), teacher, power=1.0)
    tensor(2.7020)
    """
    check_positive(scale, "scale")
    check_positive(power, "power")
    check_inside(length, "length", 2, 6, closed=True)
    student, teacher, counts = paired_rows(student_feature, teacher_feature, mask)
    own, told = (-(scale * distances(unit(x)).square()).pow(power) for x in (student, teacher))

    there = ~torch.eye(len(student), dtype=torch.bool, device=student.device)
    if counts is not None:
        there = there & counts
    nearest = only(told, there).topk(min(length, len(student) - 1), dim=1).indices
    orders = torch.tensor(list(permutations(range(nearest.shape[1]))), dtype=torch.long, device=student.device)
    p, q = (_log_orders(only(s, there).gather(1, nearest)[:, orders]) for s in (told, own))
    return reduce(kl_rows(p, q), counts, reduction)


def _log_orders(scores: Tensor) -> Tensor:
    """Log-probability of naming these in this order, best first, ``[*]`` from scores ``[*, K]`` (Plackett and Luce)."""
    named = [scores[..., i] - scores[..., i:].logsumexp(dim=-1) for i in range(scores.shape[-1])]
    return sum(named, scores[..., :0].sum(dim=-1))


@register(
    Card(
        key="darkrank",
        name="DarkRank",
        title="DarkRank: Accelerating Deep Metric Learning via Cross Sample Similarities Transfer",
        year=2018,
        arxiv="1707.01220",
        code="TuSimple/DarkRank",
        knowledge="relation",
        equation=r"\frac 1 N \sum_q \mathrm{KL}\left( P^T(\pi) \,\|\, P^S(\pi) \right), \quad "
        r"P(\pi) = \prod_i \frac{e^{S(x_{\pi(i)})}}{\sum_{j \ge i} e^{S(x_{\pi(j)})}}",
        use="For embeddings that are searched: who is nearer counts, not how near. Widths may differ and nothing is "
        "learned beside the student. Batches that hold several samples of a class say most.",
        defaults={
            "scale": "3.5, as in the authors' example",
            "power": "2, as in the authors' example",
            "length": "4, as in the authors' example",
            "tap": "what enters the classifier, whose vector of length 1 is compared, as in the authors' code",
        },
        evidence="parity",
        evidence_note="value of TuSimple/DarkRank@5e6a74f (ListNetLoss), and its gradient by differences of that value",
        choices=(
            "The divergence where the code has the cross-entropy: the same gradient, and 0 at equality.",
            "Every sample is a query. The authors' loader pairs samples, so that the first half of a batch are.",
            "The gradient also reaches the query; the code's own, written by hand, leaves it out.",
            "The hard transfer (ListMLE), the likelihood of the one order of all others, is left out.",
        ),
        tasks=("classification", "embedding"),
        with_labels={"cross_entropy": 1.0},
        weight=16.0,
    ),
    darkrank_loss,
)
class DarkRank(Objective):
    """Cross-sample similarities transfer; see ``limbeck.functional.darkrank_loss``.

    Args:
        tap: The embedding to compare.
        teacher_tap: The teacher's, where it is called otherwise.
        scale, power: Of the scores.
        length: How many neighbours are ordered.
    """

    contract = Contract(mask=True, decomposes=False)

    def __init__(
        self, tap: str = "penultimate", teacher_tap: str | None = None, scale: float = 3.5, power: float = 2.0,
        length: int = 4,
    ) -> None:  # fmt: skip
        super().__init__()
        check_inside(length, "length", 2, 6, closed=True)
        self.tap, self.teacher_tap, self.scale, self.power, self.length = tap, teacher_tap or tap, scale, power, length
        self.student_taps, self.teacher_taps = (self.tap,), (self.teacher_tap,)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        s, t = student[self.tap], teacher[self.teacher_tap]
        return darkrank_loss(s, t, scale=self.scale, power=self.power, length=self.length, mask=batch.mask)

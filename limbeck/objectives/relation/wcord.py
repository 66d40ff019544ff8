"""Wasserstein contrastive distillation (WCoRD): optimal transport's dual against a memory, its primal in the batch."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.memory import Banks
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.precision import without_autocast
from limbeck.core.projectors import LinearProjector
from limbeck.core.reduction import Reduction, check_features, check_positive, check_same_shape, reduce, widen
from limbeck.core.relations import channel_dim, check_same_batch, cosines, pooled, rows, unit
from limbeck.core.trace import Trace
from limbeck.core.transport import sinkhorn
from limbeck.objectives.parts.critic import LipschitzCritic


@without_autocast
def wcord_loss(
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    positive: Tensor,
    negative: Tensor,
    *,
    dual: float = 0.8,
    primal: float = 0.05,
    epsilon: float = 0.05,
    iterations: int = 20,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Wasserstein distances in both forms: dependence of teacher and student, and their distance within the batch.

    .. math::
        L = \lambda_1 \frac 1 B \sum_i \left[ \frac 1 K \sum_k g(n_{ik}) - g(t_i, s_i) \right]
            + \lambda_2 \sum_{ij} \Pi^*_{ij} C_{ij}, \qquad C_{ij} = 1 - \cos(s_i, t_j)

    The critic g is 1-Lipschitz, so the first part, negated, bounds from below how far the joint distribution lies from
    the product (Kantorovich and Rubinstein). :math:`\Pi^*` is the entropic transport plan between uniform marginals, as
    a constant; that part pairs nobody: another order of the students costs the same.

    Args:
        student_embedding: ``[B, E]`` (``[B, *]`` is flattened).
        teacher_embedding: The same shape; detached: trained by the primal part, both would shrink to a point.
        positive: :math:`g(t_i, s_i)`, ``[B]``.
        negative: :math:`g(n_{ik})`, ``[B, K]``: of the teacher's or student's side of a sample with another sample's.
        dual, primal: :math:`\lambda_1, \lambda_2`.
        epsilon: Weight of the plan's entropy. iterations: Of Sinkhorn's algorithm.
        mask: ``[B]`` booleans, True where a sample counts.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: Embeddings of different shapes, or another number of scores.
        ConfigError: ``epsilon`` or ``iterations`` not above zero.

    Source: Chen et al., "Wasserstein Contrastive Representation Distillation", 2020, arXiv 2012.08674.

    >>> import torch
    >>> wcord_loss(torch.eye(2), torch.eye(2).flip(0), torch.ones(2), torch.zeros(2, 3), primal=1.0)
    tensor(-0.8000)
    """
    check_features(student_embedding, teacher_embedding)
    student, counts = rows(widen(student_embedding), mask)
    teacher, _ = rows(widen(teacher_embedding.detach()), mask)
    check_same_shape(student[:, 0], positive, "student_embedding's samples", "positive")
    check_same_shape(positive, negative[:, 0], "positive", "negative's samples")
    cost = 1 - cosines(student, teacher)
    plan = sinkhorn(cost.detach(), epsilon, iterations, rows=counts, columns=counts)
    number = len(cost) if counts is None else counts.sum()
    values = dual * (negative.mean(dim=1) - positive) + primal * number * (plan * cost).sum(dim=1)
    return reduce(values, counts, reduction)


@register(
    Card(
        key="wcord",
        name="WCoRD",
        title="Wasserstein Contrastive Representation Distillation",
        year=2020,
        arxiv="2012.08674",
        knowledge="relation",
        equation=r"\lambda_1 \frac 1 B \sum_i \left[ \frac 1 K \sum_k g(n_{ik}) - g(t_i, s_i) \right] "
        r"+ \lambda_2 \sum_{ij} \Pi^*_{ij} C_{ij}",
        use="Where CRD works, and where teacher and student see other modalities or other classes.",
        defaults={
            "negatives": "64 of each side; the paper's number was not to be had",
            "dim": "128, as in CRD, like the momentum of the banks, 0.5",
        },
        evidence="reading",
        choices=(
            "The critic is a perceptron of two spectrally normalised layers; negatives are averaged, not summed.",
            "The teacher's embedding learns by the dual part alone; trained by the primal part it shrinks to a point.",
        ),
        needs=("index", "samples"),
        with_labels={"cross_entropy": 1.0},
        cost="Twice 64 pairs of each sample pass the critic, there and back.",
    ),
    wcord_loss,
)
class WCoRD(Objective):
    """Wasserstein contrastive distillation; see ``limbeck.functional.wcord_loss``. Banks are those of CRD; see there.

    Args:
        tap: The feature to embed; the mean of its places that count.
        teacher_tap: The teacher's, where it is called otherwise.
        dual: Weight of the dual part. primal: Of the primal part.
        negatives: How many of each side a sample meets.
        seed: Of the banks' start and of the draws.
    """

    contract = Contract(normalizer="samples", at_equal=None, mask=True, decomposes=False, stop_gradient=True)

    def __init__(
        self, tap: str = "penultimate", teacher_tap: str | None = None, dual: float = 0.8, primal: float = 0.05,
        epsilon: float = 0.05, iterations: int = 20, negatives: int = 64, dim: int = 128, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value in (("epsilon", epsilon), ("iterations", iterations), ("negatives", negatives), ("dim", dim)):
            check_positive(value, name)
        self.tap, self.teacher_tap = tap, teacher_tap or tap
        self.student_taps, self.teacher_taps = (self.tap,), (self.teacher_tap,)
        self.negatives, self.dim, self.seed = negatives, dim, seed
        self.loss = partial(wcord_loss, dual=dual, primal=primal, epsilon=epsilon, iterations=iterations)
        self.embed: nn.ModuleList | None = None

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        features = student[self.tap], teacher[self.teacher_tap]
        layers = [LinearProjector(f.shape[channel_dim(f)], self.dim) for f in features]
        self.embed = nn.ModuleList([*layers, LipschitzCritic(self.dim)]).to(features[0].device)
        self.banks = Banks.of(data, self.dim, self.seed, "wcord").to(features[0].device)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        to_s, to_t, g = self.ready("embed")
        s_feature, counts = pooled(student[self.tap], batch.mask, "student_feature")
        t_feature, _ = pooled(teacher[self.teacher_tap].detach(), batch.mask, "teacher_feature")
        check_same_batch(s_feature, t_feature, "student_feature", "teacher_feature")
        check_same_batch(s_feature, batch.require("index"), "student_feature", "batch.index")
        s, t, index = unit(to_s(s_feature)), unit(to_t(t_feature)), batch.require("index")
        student_bank, teacher_bank, _, others = self.banks.against(index, self.negatives)
        scores = g(t, s, teacher_bank, student_bank, others)
        if self.training:
            self.banks.remember(s.detach(), t.detach(), index, 0.5, counts)
        return self.loss(s, t, scores[:, 0], scores[:, 1:], mask=counts)

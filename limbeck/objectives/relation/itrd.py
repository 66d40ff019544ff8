"""Information-theoretic representation distillation (ITRD): correlation by channel, mutual information by sample."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import standardise
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.precision import without_autocast
from limbeck.core.projectors import LinearProjector
from limbeck.core.reduction import Reduction, check_features, check_positive, reduce
from limbeck.core.relations import channel_dim, gram, paired_rows, pooled, unit
from limbeck.core.trace import Trace


@without_autocast
def itrd_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    *,
    correlation: float = 2.0,
    mutual: float = 1.0,
    alpha: float = 1.01,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""How far channels are from being correlated with the teacher's, and how little the batches' Gram matrices share.

    .. math::
        L &= \lambda_c \log_2 \sum_d | v_d - 1 |^{2 \alpha} + \lambda_m \left( \| G^S \|_F^2 - \| G^{ST} \|_F^2 \right),
            \qquad v_d = \frac 1 n \sum_i \tilde s_{id} \tilde t_{id} \\
        G^S &= \frac{K^S}{\operatorname{tr} K^S}, \quad
            G^{ST} = \frac{K^S \circ K^T}{\operatorname{tr}(K^S \circ K^T)}, \quad K_{ij} = \cos(z_i, z_j)

    :math:`\tilde z` has mean 0 and (unbiased) deviation 1 in the batch; the logarithm keeps the gradient's size as
    correlations near 1. The second part is Renyi's mutual information of order 2, negated and without its logarithms:
    0 where every two samples are alike for the teacher that are at all alike for the student, else above.

    Args:
        student_feature: ``[B, *]``, as wide as the teacher's; flattened to one row a sample.
        teacher_feature: The same shape; detached.
        correlation: :math:`\lambda_c`; 2 in the authors' example.
        mutual: :math:`\lambda_m`; 1 in the authors' example.
        alpha: :math:`\alpha`, the order of the first part; 1.01 in the authors' example.
        mask: ``[B]`` booleans, True where a sample counts.
        reduction: ``"mean"``; ``"sum"``, the mean times the count; ``"none"`` (``[B]``, the same for all).

    Raises:
        TensorError: Features of different shapes, or a mask that does not fit.
        ConfigError: ``alpha`` not above zero.

    Source: Miles et al., "Information Theoretic Representation Distillation", 2022, arXiv 2112.00459.

    >>> import torch
    >>> itrd_loss(torch.tensor([[0.0, 1.0], [1.0, 1.0]]), torch.tensor([[1.0, 2.0], [3.0, 2.0]]), alpha=1.0)
    tensor(0.7054)
    """
    check_features(student_feature, teacher_feature)
    check_positive(alpha, "alpha")
    student, teacher, counts = paired_rows(student_feature, teacher_feature, mask)
    number = len(student) if counts is None else counts.sum().clamp(min=1)
    column = None if counts is None else counts.unsqueeze(1)
    s, t = (standardise(z, 0, mask=column) for z in (student, teacher))
    apart = (1 - (s * t).sum(dim=0) / number).abs()

    s, t = unit(student), unit(teacher)
    own, both = gram(s), gram(s) * gram(t)
    traces = s.square().sum(), (s.square().sum(dim=1) * t.square().sum(dim=1)).sum()
    own, both = (k / trace.masked_fill(trace == 0, 1.0) for k, trace in zip((own, both), traces, strict=True))

    value = correlation * apart.pow(2 * alpha).sum().log2() + mutual * (own.square().sum() - both.square().sum())
    return reduce(value.expand(len(student)), counts, reduction)


@register(
    Card(
        key="itrd",
        name="ITRD",
        title="Information Theoretic Representation Distillation",
        year=2022,
        arxiv="2112.00459",
        code="roymiles/ITRD",
        knowledge="relation",
        equation=r"\lambda_c \log_2 \sum_d |v_d - 1|^{2 \alpha} "
        r"+ \lambda_m \left( \| G^S \|_F^2 - \| G^{ST} \|_F^2 \right)",
        use="On what enters the classifier, in place of contrastive methods: batches of a few dozen do, without any "
        "memory. A linear embedding to the teacher's width is learned beside the student.",
        defaults={
            "correlation": "2, as in the authors' example",
            "mutual": "1, as in the authors' example; 0.05 is the default of their code",
            "alpha": "1.01, as in the authors' example; 1.5 is the default of their code",
            "tap": "what enters the classifier, as in the authors' code",
        },
        evidence="parity",
        evidence_note="value and gradient of roymiles/ITRD@5d08c6b (forward_correlation_it, forward_mutual_it)",
        choices=(
            "Both parts see the embedded feature; the authors' code leaves it out of the second where widths agree.",
            "The deviation is unbiased and the mean over n, as in the authors' code: equal channels have v = 1 - 1/n, "
            "which keeps the logarithm finite.",
        ),
        with_labels={"cross_entropy": 1.0},
    ),
    itrd_loss,
)
class ITRD(Objective):
    """Information-theoretic representation distillation; see ``limbeck.functional.itrd_loss``.

    Args:
        tap: The feature; the mean of its places that count.
        teacher_tap: The teacher's, where it is called otherwise.
        correlation: Weight of the correlation by channel.
        mutual: Weight of the mutual information.
        alpha: Order of the first part.

    >>> loss = ITRD(alpha=1.5, mutual=0.05)
    """

    contract = Contract(at_equal=None, mask=True, decomposes=False)
    embed: LinearProjector | None

    def __init__(
        self, tap: str = "penultimate", teacher_tap: str | None = None, correlation: float = 2.0, mutual: float = 1.0,
        alpha: float = 1.01,
    ) -> None:  # fmt: skip
        super().__init__()
        check_positive(alpha, "alpha")
        self.tap, self.teacher_tap = tap, teacher_tap or tap
        self.student_taps, self.teacher_taps = (self.tap,), (self.teacher_tap,)
        self.correlation, self.mutual, self.alpha, self.embed = correlation, mutual, alpha, None

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        features = student[self.tap], teacher[self.teacher_tap]
        self.embed = LinearProjector(*(f.shape[channel_dim(f)] for f in features)).to(features[0].device)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        s, counts = pooled(student[self.tap], batch.mask, "student_feature")
        t, _ = pooled(teacher[self.teacher_tap], batch.mask, "teacher_feature")
        return itrd_loss(
            self.ready("embed")(s), t, correlation=self.correlation, mutual=self.mutual, alpha=self.alpha, mask=counts
        )

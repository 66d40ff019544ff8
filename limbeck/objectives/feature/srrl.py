"""Softmax regression representation learning (SRRL): the student's feature is judged by the teacher's classifier."""

from __future__ import annotations

from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import TensorError
from limbeck.core.heads import BatchNorm
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.precision import without_autocast
from limbeck.core.projectors import ConvProjector, LinearProjector
from limbeck.core.reduction import Reduction, check_features, check_floating, reduce, widen
from limbeck.core.relations import channel_dim, pooled
from limbeck.core.trace import Trace


@without_autocast
def srrl_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    weight: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Distance of the student's feature from the teacher's, and of what the teacher's classifier makes of both.

    .. math:: L = \frac \alpha D \left\| h^S - h^T \right\|_2^2 + \frac \beta C \left\| W h^S - W h^T \right\|_2^2

    The second part is the squared distance of logits; the classifier's bias falls out of it. It counts a difference of
    features as much as the teacher's decision depends on it.

    Args:
        student_feature: ``[B, *, D]``: what the connector gave, as wide as the teacher's.
        teacher_feature: ``[B, *, D]``: what enters the teacher's classifier; detached.
        weight: :math:`W`, the teacher's classifier ``[C, D]``; detached.
        alpha: Weight of feature matching.
        beta: Weight of softmax regression.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over places that count, ``"sum"``, or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Features of different shapes, or a classifier that does not read them.

    Source:
        Yang et al., "Knowledge distillation via softmax regression representation learning", 2021, ICLR.

    Example:
        >>> import torch
        >>> srrl_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]))
        tensor(38.)
    """
    check_features(student_feature, teacher_feature)
    check_floating(weight, "weight", least=2)
    if weight.shape[1:] != student_feature.shape[-1:]:
        raise TensorError(
            "this classifier does not read this feature",
            where="weight",
            found=f"{list(weight.shape)} for a feature {list(student_feature.shape)}",
            wanted=f"[C, {student_feature.shape[-1]}]",
        )
    gap = widen(student_feature) - widen(teacher_feature.detach())
    answers = gap @ widen(weight.detach()).to(gap.dtype).T
    values = alpha * gap.square().mean(dim=-1) + beta * answers.square().mean(dim=-1)
    return reduce(values, mask, reduction)


@register(
    Card(
        key="srrl",
        name="SRRL",
        title="Knowledge distillation via softmax regression representation learning",
        year=2021,
        code="jingyang2017/KD_SRRL",
        knowledge="feature",
        equation=r"\frac \alpha D \left\| h^S - h^T \right\|_2^2 + \frac \beta C \left\| W h^S - W h^T \right\|_2^2",
        use="Between any two networks that end in a linear classifier, when the last feature is what the student is "
        "for: it is pulled to where the teacher's own classifier gives the teacher's answer.",
        defaults={
            "alpha": "1, as in the authors' code",
            "beta": "1, as in the authors' code",
            "tap": "the last map, which the connector reads before it is pooled, as in the authors' code",
        },
        evidence="parity",
        evidence_note="value and gradient of jingyang2017/KD_SRRL@d2e802f and DefangChen/SimKD@2b389c3",
        choices=(
            "The connector is the authors' 1x1 convolution, batch normalisation and ReLU, and is dropped after "
            "training; it normalises by the batch alone. With tap='penultimate' it reads the pooled feature, as in "
            "SimKD's comparison.",
            "Where the teacher's feature can be negative (transformers), which the paper does not consider, the "
            "connector ends without its ReLU.",
        ),
        tasks=("classification", "cross-architecture"),
        with_labels={"cross_entropy": 1.0},
    ),
    srrl_loss,
)
class SRRL(Objective):
    """Softmax regression representation learning; see ``limbeck.functional.srrl_loss``.

    Args:
        alpha: Weight of feature matching.
        beta: Weight of softmax regression.
        tap: What the connector reads: a map, tokens, or the pooled feature.

    >>> from limbeck.objectives import CrossEntropy
    >>> loss = CrossEntropy() + SRRL(tap="penultimate")
    """

    contract = Contract(normalizer="positions", at_equal=None, decomposes=False, least_samples=2)
    teacher_taps = ("penultimate", "logits@weight")
    connector: nn.Module | None

    def __init__(self, alpha: float = 1.0, beta: float = 1.0, tap: str = "stages:-1") -> None:
        super().__init__()
        self.alpha, self.beta, self.tap = alpha, beta, tap
        self.student_taps, self.connector = (tap,), None

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        feature, goal = student[self.tap], teacher["penultimate"]
        width, wanted = feature.shape[channel_dim(feature)], goal.shape[-1]
        first: nn.Module = LinearProjector(width, wanted, bias=False)
        if feature.ndim == 4:
            first = ConvProjector(width, wanted, 1, bias=False)
        nn.init.normal_(first.weight, std=(2 / wanted) ** 0.5)  # type: ignore[arg-type]
        last = nn.ReLU() if bool((goal >= 0).all()) else nn.Identity()
        self.connector = nn.Sequential(first, BatchNorm(wanted), last).to(feature.device)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        feature, goal = student[self.tap], teacher["penultimate"]
        check_floating(feature, "student_feature", least=2)
        h = self.ready("connector")(feature)
        h = pooled(h)[0] if goal.ndim == 2 else h
        return srrl_loss(h, goal, teacher["logits@weight"], alpha=self.alpha, beta=self.beta, mask=batch.mask)

"""Prime-aware adaptive distillation (PAD): samples the student is sure of count for more."""

from __future__ import annotations

from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.heads import BatchNorm
from limbeck.core.layers import LayerObjective
from limbeck.core.objective import Contract, DataInfo
from limbeck.core.projectors import LinearProjector, projector
from limbeck.core.reduction import Reduction, check_features, check_positive, check_same_shape, reduce, widen
from limbeck.core.relations import check_same_batch, pooled, project
from limbeck.core.trace import Trace


def pad_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    log_variance: Tensor,
    *,
    eps: float = 1e-6,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared distance of two features under a learned variance: where it is large, the distance counts little.

    .. math:: L = \frac 1 D \sum_d \frac{(t_d - s_d)^2}{\epsilon + \sigma_d^2} + \ln \sigma_d^2

    For a given distance the loss is smallest where the variance equals its square, so that the variance measures how
    hard a sample is.

    Args:
        student_feature: ``[B, D]``.
        teacher_feature: The same shape; detached.
        log_variance: :math:`\ln \sigma^2`, the same shape, told from the student's feature.
        eps: :math:`\epsilon`, which bounds how much a sample can count.
        mask: ``[B]`` booleans, True where a sample counts.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: Tensors of different shapes.

    Source:
        Zhang et al., "Prime-Aware Adaptive Distillation", 2020, arXiv 2008.01458.

    Example:
        >>> import torch
        >>> pad_loss(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2), eps=0.0)
        tensor(5.)
    """
    check_features(student_feature, teacher_feature)
    check_same_shape(student_feature, log_variance, "student_feature", "log_variance")
    gap = (widen(student_feature) - widen(teacher_feature.detach())).square()
    log_variance = widen(log_variance)
    values = gap / (eps + log_variance.exp()) + log_variance
    return reduce(values.flatten(1).mean(dim=1), mask, reduction)


@register(
    Card(
        key="pad",
        name="PAD",
        title="Prime-Aware Adaptive Distillation",
        year=2020,
        arxiv="2008.01458",
        knowledge="feature",
        equation=r"\frac 1 D \sum_d \frac{(t_d - s_d)^2}{\epsilon + \sigma_d^2} + \ln \sigma_d^2",
        use="A refinement of plain feature regression: hard samples, whose teacher features the student cannot reach, "
        "are given less weight. Best after a stage of plain regression.",
        defaults={
            "eps": "1e-6, as in torchdistill, after the authors' code",
            "tap": "what enters the classifier, as in the paper",
        },
        evidence="parity",
        evidence_note="value and gradients of yoshitomo-matsubara/torchdistill@3e4373c",
        choices=(
            "A variance for each channel, told by a linear layer with batch normalisation, as in torchdistill.",
            "One stage; the paper goes on from a student that learned by the plain distance, which a recipe of two "
            "stages does.",
            "A student of another width gets a linear map.",
        ),
        with_labels={"cross_entropy": 1.0},
    ),
    pad_loss,
)
class PAD(LayerObjective):
    """Prime-aware adaptive distillation; see ``limbeck.functional.pad_loss``.

    Args:
        tap: The feature; the mean of its places.
        teacher_tap: The teacher's, where it is called otherwise.
        eps: Added to each variance.
    """

    contract = Contract(at_equal=None, decomposes=False, least_samples=2)
    variance: nn.Module | None

    def __init__(self, tap: str = "penultimate", teacher_tap: str | None = None, eps: float = 1e-6) -> None:
        super().__init__(tap, teacher_tap)
        check_positive(eps, "eps")
        self.eps, self.variance = eps, None

    def _vectors(self, student: Trace, teacher: Trace) -> tuple[Tensor, Tensor]:
        s, t = self.pair(student, teacher)
        s, t = pooled(s, name="student_feature")[0], pooled(t, name="teacher_feature")[0]
        check_same_batch(s, t, "student_feature", "teacher_feature")
        return s, t

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        s, t = self._vectors(student, teacher)
        self.projector = nn.Identity() if s.shape == t.shape else projector(s, t)
        width = t.shape[1]
        self.variance = nn.Sequential(LinearProjector(s.shape[1], width), BatchNorm(width)).to(s.device)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        variance, (s, t) = self.ready("variance"), self._vectors(student, teacher)
        return pad_loss(project(self.projector, s, "student_feature"), t, variance(s), eps=self.eps)

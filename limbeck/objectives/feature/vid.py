"""Variational information distillation (VID): from the student's features the teacher's can be told."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import TensorError
from limbeck.core.layers import LayerObjective
from limbeck.core.layout import aligned
from limbeck.core.objective import Contract, DataInfo
from limbeck.core.projectors import projector
from limbeck.core.reduction import Reduction, check_features, check_positive, reduce, widen
from limbeck.core.relations import channel_dim, project
from limbeck.core.trace import Trace


def vid_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    raw_variance: Tensor,
    *,
    eps: float = 1e-5,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Negative log-likelihood of the teacher's feature under Gaussians around what was told from the student's.

    .. math:: L = \frac 1 C \sum_c \frac 1 2 \left( \frac{(t_c - \mu_c(s))^2}{\sigma_c^2} + \log \sigma_c^2 \right),
        \qquad \sigma_c^2 = \log(1 + e^{\alpha_c}) + \epsilon

    The mean over places and samples of a lower bound of the mutual information of the two, up to a constant and the
    sign. Each channel has one learned variance: what the student cannot tell it need not.

    Args:
        student_feature: :math:`\mu(s)`, what the regressor gave: ``[B, D]``, ``[B, T, D]`` or ``[B, C, *]``.
        teacher_feature: The same shape; detached.
        raw_variance: :math:`\alpha`, ``[C]``; learned.
        eps: The least variance; 1e-5 as in RepDistiller.
        mask: Booleans, True where a place counts: ``[B]``, or ``[B, T]`` for tokens, ``[B, *]`` for maps.
        reduction: ``"mean"`` over places that count, ``"sum"`` over them (of the mean over channels), or ``"none"``:
            ``[B]``, ``[B, T]`` or ``[B, *]``.

    Raises:
        TensorError: Features of different shapes, or not one variance a channel.

    Source:
        Ahn et al., "Variational Information Distillation for Knowledge Transfer", 2019, arXiv 1904.05835.

    Example:
        >>> import torch
        >>> vid_loss(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]), torch.zeros(2))
        tensor(1.2594)
    """
    check_features(student_feature, teacher_feature)
    check_positive(eps, "eps")
    student, teacher = widen(student_feature), widen(teacher_feature.detach())
    dim = channel_dim(student)
    if raw_variance.shape != (student.shape[dim],):
        wanted = f"[{student.shape[dim]}]"
        raise TensorError("one variance a channel", where="raw_variance", found=list(raw_variance.shape), wanted=wanted)
    variance = F.softplus(raw_variance.to(student.dtype)) + eps
    variance = variance.reshape(-1, *[1] * (student.ndim - 1 - dim))
    values = 0.5 * ((student - teacher).square() / variance + variance.log())
    return reduce(values.mean(dim=dim), mask, reduction)


def regressor(student_feature: Tensor, teacher_feature: Tensor) -> nn.Sequential:
    """Three layers without bias at each place, the teacher's width within, ReLU between; examples of both are given."""
    wide = teacher_feature
    layers = [projector(student_feature, wide, bias=False), *(projector(wide, wide, bias=False) for _ in range(2))]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


@register(
    Card(
        key="vid",
        name="VID",
        title="Variational Information Distillation for Knowledge Transfer",
        year=2019,
        arxiv="1904.05835",
        knowledge="feature",
        equation=r"\frac 1 C \sum_c \frac 1 2 \left( \frac{(t_c - \mu_c(s))^2}{\sigma_c^2} + \log \sigma_c^2 \right)",
        use="Hints that forgive: channels of the teacher which the student cannot tell get a large variance and cease "
        "to matter. For networks of different kinds, and for transfer to another task.",
        defaults={
            "initial_variance": "5, as in RepDistiller",
            "eps": "1e-5, as in RepDistiller",
            "tap": "the last layer at each resolution, as in the CRD benchmark",
        },
        evidence="parity",
        evidence_note="value and gradients (features, variances) of HobbitLong/RepDistiller@b84f547 and "
        "megvii-research/mdistiller@a08d46f, which name the authors' code as theirs; that is no longer public",
        choices=(
            "The mean over channels and places where the paper sums, as in RepDistiller, so that the weight need not "
            "change with the layer's size.",
            "The regressor has three layers without batch normalisation, as in RepDistiller. It is given the student's "
            "map pooled to the teacher's resolution where it is the larger; else the teacher's is pooled.",
            "The variances are learned, as in the paper; mdistiller leaves them out of its optimizer.",
        ),
        with_labels={"cross_entropy": 1.0},
    ),
    vid_loss,
)
class VID(LayerObjective):
    """Variational information distillation; see ``limbeck.functional.vid_loss``. Layers add up.

    Args:
        tap: Where: a plural role, whose layers are paired by resolution, or layers, paired in order.
        teacher_tap: The teacher's, where they are called otherwise.
        initial_variance: Of every channel, before training.
        eps: The least variance.

    >>> loss = VID(["layer1", "layer2", "layer3"])
    """

    contract = Contract(normalizer="positions", at_equal=None, mask=True)
    regressors: nn.ModuleList | None
    raw_variances: nn.ParameterList

    def __init__(
        self,
        tap: str | list[str] = "stages",
        teacher_tap: str | list[str] | None = None,
        initial_variance: float = 5.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(tap, teacher_tap)
        check_positive(eps, "eps")
        check_positive(initial_variance - eps, "initial_variance - eps")
        self.initial_variance, self.eps = initial_variance, eps
        self.regressors = None

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        pairs = [aligned(s, t) for s, t in self.pairs(student, teacher)]
        raw = math.log(math.expm1(self.initial_variance - self.eps))
        self.regressors = nn.ModuleList(regressor(s, t) for s, t in pairs)
        self.raw_variances = nn.ParameterList(torch.full((t.shape[channel_dim(t)],), raw) for _, t in pairs)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        losses = []
        for (layer, s, t), raw in zip(self.each("regressors", student, teacher), self.raw_variances, strict=True):
            s, t = aligned(s, t)
            losses.append(vid_loss(project(layer, s, "student_feature"), t, raw, eps=self.eps, mask=batch.mask))
        return torch.stack(losses).sum()

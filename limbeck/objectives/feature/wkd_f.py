"""Wasserstein distillation of features (WKD-F): maps as Gaussians, and how far these lie apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import TensorError
from limbeck.core.heads import BatchNorm
from limbeck.core.layers import LayerObjective, Tap
from limbeck.core.layout import to_map
from limbeck.core.objective import Contract, DataInfo
from limbeck.core.projectors import ConvProjector
from limbeck.core.reduction import Reduction, check_floating, check_positive, reduce, widen
from limbeck.core.relations import check_same_batch
from limbeck.core.trace import Trace


def wkd_f_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    *,
    gamma: float = 4.0,
    grid: int = 1,
    eps: float = 1e-5,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared Wasserstein distance between Gaussians with diagonal covariance, fitted to the places of each cell.

    .. math:: L = \frac{1}{g^2} \sum_{\text{cells}} \left( \gamma \left\| \mu^T - \mu^S \right\|_2^2
        + \left\| \delta^T - \delta^S \right\|_2^2 \right), \qquad
        \delta_c = \sqrt{\operatorname{var}(F_c) + \epsilon}

    With :math:`\gamma = 1` it is the distance itself. Sums run over channels. Resolutions may differ: which value
    stands where in a cell does not matter.

    Args:
        student_feature: ``[B, C, H, W]``, projected to the teacher's width.
        teacher_feature: ``[B, C, *]``; detached.
        gamma: Weight of the means; 4 in the authors' run on CIFAR-100, 2 on ImageNet.
        grid: g, cells along each side; 1 in that run, 4 on ImageNet. They are those of adaptive pooling.
        eps: Added to each variance.
        mask: ``[B]`` booleans, True where a sample counts.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: No maps, or of other samples or widths.
        ConfigError: ``grid`` or ``eps`` not above zero.

    Source: Lv et al., "Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation", 2024,
        arXiv 2412.08139, equations 8 and 9.

    >>> import torch
    >>> wkd_f_loss(torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([[[[2.0, 6.0]]]]), gamma=1.0)
    tensor(6.0000)
    """
    check_floating(student_feature, "student_feature", least=4)
    check_floating(teacher_feature, "teacher_feature", least=4)
    check_positive(grid, "grid")
    check_positive(eps, "eps")
    if student_feature.shape[:2] != teacher_feature.shape[:2] or not student_feature.ndim == teacher_feature.ndim == 4:
        found, wanted = list(teacher_feature.shape), f"{list(student_feature.shape[:2])} and two sides"
        raise TensorError("not maps of the same samples and width", where="teacher_feature", found=found, wanted=wanted)
    student, teacher = (_gaussians(widen(f), grid, eps) for f in (student_feature, teacher_feature.detach()))
    means, deviations = ((s - t).square().sum(dim=1).mean(dim=1) for s, t in zip(student, teacher, strict=True))
    return reduce(gamma * means + deviations, mask, reduction)


def _gaussians(feature: Tensor, grid: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel in each cell, ``[B, C, cells]`` each."""
    rows, columns = ([(i * n // grid, -(-(i + 1) * n // grid)) for i in range(grid)] for n in feature.shape[2:])
    cells = [feature[:, :, a:b, c:d].flatten(2) for a, b in rows for c, d in columns]
    variance = [x.var(dim=2, correction=min(1, x.shape[2] - 1)) for x in cells]
    return torch.stack([x.mean(dim=2) for x in cells], dim=2), (torch.stack(variance, dim=2) + eps).sqrt()


@register(
    Card(
        key="wkd_f",
        name="WKD-F",
        title="Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation",
        year=2024,
        arxiv="2412.08139",
        code="JiamingLv/WKD",
        knowledge="feature",
        equation=r"\frac{1}{g^2} \sum_{\text{cells}} \left( \gamma \| \mu^T - \mu^S \|_2^2 "
        r"+ \| \delta^T - \delta^S \|_2^2 \right)",
        use="Between convolutional networks, also of different resolutions: what is asked is how strong and how varied "
        "each channel is in a part of the image, not each value. Beside WKD-L in the paper's best runs.",
        defaults={
            "gamma": "4, as in the authors' run from ResNet-32x4 to ResNet-8x4",
            "grid": "1, as in that run; 4 on ImageNet",
            "tap": "the last map, as in the authors' code",
        },
        evidence="parity",
        evidence_note="value and gradient of JiamingLv/WKD@214cf88 (wkd_feature_loss)",
        choices=(
            "The weight is for a teacher 256 channels wide, since the distance is a sum over channels.",
            "The connector is the authors' 1x1 convolution, batch normalisation and ReLU (none where the teacher's "
            "feature can be negative), and normalises by the batch alone.",
        ),
        with_labels={"cross_entropy": 1.0},
        weight=0.08,
    ),
    wkd_f_loss,
)
class WKDF(LayerObjective):
    """Wasserstein distillation of features, of the last pair of layers; see ``limbeck.functional.wkd_f_loss``.

    Args:
        tap: The map to compare; tokens become maps.
        teacher_tap: The teacher's, where it is called otherwise.
        gamma: Weight of the means.
        grid: Cells along each side.

    >>> loss = 0.02 * WKDF(gamma=2.0, grid=4)
    """

    contract = Contract(at_equal=None, decomposes=False, least_samples=2)
    connector: nn.Module | None

    def __init__(
        self, tap: Tap = "stages:-1", teacher_tap: Tap | None = None, gamma: float = 4.0, grid: int = 1
    ) -> None:
        super().__init__(tap, teacher_tap)
        check_positive(grid, "grid")
        self.gamma, self.grid, self.connector = gamma, grid, None

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        s, t = (to_map(f, "student_feature") for f in self.pair(student, teacher))
        last = nn.ReLU() if bool((t >= 0).all()) else nn.Identity()
        layer = ConvProjector(s.shape[1], t.shape[1], 1)
        self.connector = nn.Sequential(layer, BatchNorm(t.shape[1]), last).to(s.device)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        s, t = self.pair(student, teacher)
        check_same_batch(s, t, "student_feature", "teacher_feature")
        s, t = self.ready("connector")(to_map(s, "student_feature")), to_map(t, "teacher_feature")
        mask = None if batch.mask is None else batch.mask.reshape(len(batch.mask), -1).any(dim=1)
        return wkd_f_loss(s, t, gamma=self.gamma, grid=self.grid, mask=mask)

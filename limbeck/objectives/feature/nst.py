"""Neuron selectivity transfer (NST): the student's channels light up at the places where the teacher's do."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import ConfigError
from limbeck.core.layers import LayerObjective
from limbeck.core.layout import aligned
from limbeck.core.objective import Contract
from limbeck.core.precision import without_autocast
from limbeck.core.reduction import Reduction, check_floating, fit_mask, reduce, widen
from limbeck.core.relations import channel_dim, unit
from limbeck.core.trace import Trace

Kernel = Literal["poly", "linear", "gaussian"]


@without_autocast
def nst_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    *,
    kernel: Kernel = "poly",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared maximum mean discrepancy between the student's and the teacher's channels, each a pattern over places.

    .. math::
        L = \frac 1 {C_T^2} \sum_{ij} k(t_i, t_j) + \frac 1 {C_S^2} \sum_{ij} k(s_i, s_j)
            - \frac 2 {C_S C_T} \sum_{ij} k(s_i, t_j), \qquad s_i = \frac{f^S_i}{\|f^S_i\|_2}, \;
            t_j = \frac{f^T_j}{\|f^T_j\|_2}

    :math:`f_i` is one channel of one sample, flattened over its places. Kernels: ``poly`` :math:`(x^\top y)^2`,
    ``linear`` :math:`x^\top y`, ``gaussian`` :math:`\exp(-\|x - y\|^2 / 2 \sigma^2)` with :math:`\sigma^2` the mean
    squared distance between the sample's student and teacher channels. Widths may differ; of maps of different sizes
    the larger is pooled.

    Args:
        student_feature: Maps ``[B, C, H, W]`` or tokens ``[B, T, D]``.
        teacher_feature: The same, of any width; detached.
        kernel: ``"poly"``, with which the paper's runs are best; ``"linear"`` or ``"gaussian"``.
        mask: Booleans, True where a sample ``[B]`` or a place (``[B, T]``, ``[B, H, W]``) counts; places need features
            of equal size.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        LimbeckError: Vectors, other samples, a mask that does not fit, or no such kernel.

    Source:
        Huang and Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017, arXiv 1707.01219.

    Example:
        >>> import torch
        >>> student = torch.tensor([[[[2.0, 0.0]]]])
        >>> nst_loss(student, torch.tensor([[[[3.0, 0.0]], [[0.0, 1.0]]]]))
        tensor(0.5000)
    """
    if kernel not in ("poly", "linear", "gaussian"):
        raise ConfigError("no such kernel", where="kernel", found=repr(kernel), wanted="'poly', 'linear' or 'gaussian'")
    check_floating(student_feature, "student_feature", least=3)
    check_floating(teacher_feature, "teacher_feature", least=3)
    student, teacher = aligned(widen(student_feature), widen(teacher_feature.detach()))
    s, t = _patterns(student, mask), _patterns(teacher, mask)
    across, own, other = s @ t.transpose(1, 2), s @ s.transpose(1, 2), t @ t.transpose(1, 2)
    if kernel == "gaussian":
        sizes = [x.square().sum(dim=2) for x in (s, t)]  # 1, but 0 for a dead channel
        pairs = ((across, *sizes), (own, sizes[0], sizes[0]), (other, sizes[1], sizes[1]))
        apart = [_distances(*pair) for pair in pairs]
        spread = apart[0].mean(dim=(1, 2), keepdim=True)
        spread = spread.masked_fill(spread <= 0, 1.0)
        across, own, other = (torch.exp(-distance / (2 * spread)) for distance in apart)
    elif kernel == "poly":
        across, own, other = across.square(), own.square(), other.square()
    values = other.mean(dim=(1, 2)) + own.mean(dim=(1, 2)) - 2 * across.mean(dim=(1, 2))
    return reduce(values, None if mask is None else mask.reshape(len(mask), -1).any(dim=1), reduction)


def _patterns(feature: Tensor, mask: Tensor | None) -> Tensor:
    """``[B, C, N]``: the channels as unit vectors over the places that count; a dead channel is 0."""
    channels = feature.movedim(channel_dim(feature), 1)
    if mask is not None:
        channels = channels.masked_fill(~fit_mask(mask, channels[:, 0]).unsqueeze(1), 0.0)
    return unit(channels.flatten(2))


def _distances(products: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Squared distances ``[B, i, j]`` from products and squared lengths."""
    return (first.unsqueeze(2) + second.unsqueeze(1) - 2 * products).clamp(min=0)


@register(
    Card(
        key="nst",
        name="NST",
        title="Like What You Like: Knowledge Distill via Neuron Selectivity Transfer",
        year=2017,
        arxiv="1707.01219",
        code="TuSimple/neuron-selectivity-transfer",
        knowledge="feature",
        equation=r"\frac 1 {C_T^2} \sum_{ij} k(t_i, t_j) + \frac 1 {C_S^2} \sum_{ij} k(s_i, s_j) "
        r"- \frac 2 {C_S C_T} \sum_{ij} k(s_i, t_j)",
        use="Between layers of any width without a projector: which places excite the channels, as distributions. "
        "Finer than AT, at a higher cost; combines with KD.",
        defaults={
            "kernel": "poly, the paper's best and the only one in its code",
            "tap": "the last layer at each resolution, as in the CRD benchmark; the paper takes the last alone",
        },
        evidence="parity",
        evidence_note="value and gradient of HobbitLong/RepDistiller@b84f547 and megvii-research/mdistiller@a08d46f, "
        "with the polynomial kernel; the others against the paper's equations",
        choices=(
            "The Gaussian kernel's width is the mean squared distance between student and teacher channels of the "
            "sample, gradient included; the paper says 'of the pairs'.",
            "The constant term of the teacher alone is kept, as in RepDistiller, so that equal features cost 0.",
        ),
        with_labels={"cross_entropy": 1.0},
        weight=50.0,
    ),
    nst_loss,
)
class NST(LayerObjective):
    """Neuron selectivity transfer; see ``limbeck.functional.nst_loss``. Layers add up.

    Args:
        tap: Where: a plural role, whose layers are paired by resolution, or layers, paired in order.
        teacher_tap: The teacher's, where they are called otherwise.
        kernel: ``"poly"``, ``"linear"`` or ``"gaussian"``.

    >>> loss = 50.0 * NST("stages:-1")
    """

    contract = Contract(normalizer="samples", mask=True)

    def __init__(
        self, tap: str | list[str] = "stages", teacher_tap: str | list[str] | None = None, kernel: Kernel = "poly"
    ) -> None:
        super().__init__(tap, teacher_tap)
        self.kernel = kernel

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        pairs = self.pairs(student, teacher)
        return torch.stack([nst_loss(s, t, kernel=self.kernel, mask=batch.mask) for s, t in pairs]).sum()

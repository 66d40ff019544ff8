"""Correlation congruence (CC): a kernel between the samples of a batch, the same for student and teacher."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.precision import without_autocast
from limbeck.core.projectors import LinearProjector
from limbeck.core.reduction import Reduction, check_features, check_positive, reduce, widen
from limbeck.core.relations import channel_dim, gram, paired_rows, pooled, unit
from limbeck.core.trace import Trace

Kernel = Literal["gaussian", "bilinear", "neighbours"]


@without_autocast
def cc_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    *,
    kernel: Kernel = "gaussian",
    gamma: float = 0.4,
    order: int = 2,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared distance between the correlation matrices of a batch under a kernel.

    .. math::
        L = \frac 1 {B^2} \left\| C^S - C^T \right\|_F^2, \qquad
        C_{ij} = e^{-2 \gamma} \sum_{p=0}^P \frac{(2 \gamma)^p}{p!} \left( x_i^\top x_j \right)^p, \quad \|x_i\| = 1

    That is the Taylor expansion of the Gaussian kernel :math:`e^{-\gamma \|x_i - x_j\|^2}` to order P; the bilinear
    kernel is :math:`x_i^\top x_j`. ``"neighbours"`` is the form that the authors gave to RepDistiller, on features of
    one width, as they are: :math:`\frac 1 {B-1} \sum_i \langle |s_i - t_i|, |s_{i+1} - t_{i+1}| \rangle`. The loss ties
    the samples of a batch together: the loss of a batch is not the mean of the losses of its parts.

    Args:
        student_feature: ``[B, *]``; flattened to one row a sample.
        teacher_feature: ``[B, *]``; detached, except for ``"neighbours"``, whose embedding of the teacher learns too.
        kernel: The form.
        gamma: :math:`\gamma`; 0.4, torchdistill's value.
        order: P, where the expansion ends; 2, torchdistill's value.
        mask: Booleans ``[B]``, True where a sample counts; or over the first dimensions of both features (tokens),
            where a place left out is 0 in both. Not for ``"neighbours"``.
        reduction: ``"mean"``; ``"sum"``, the mean times the count; ``"none"``: ``[B]``, the part of each row.

    Raises:
        ConfigError: An unknown kernel, a mask beside ``"neighbours"``, ``gamma`` or ``order`` not above zero.

    Source: Peng et al., "Correlation Congruence for Knowledge Distillation", 2019, arXiv 1904.01802, section 3.

    >>> import torch
    >>> cc_loss(torch.eye(2), torch.ones(2, 3))
    tensor(0.1266)
    """
    check_positive(gamma, "gamma")
    check_positive(order, "order")
    if kernel == "neighbours":
        check_features(student_feature, teacher_feature)
        if mask is not None:
            raise ConfigError("neighbours in a batch know no mask", where="kernel", remedy="take kernel='gaussian'")
        gap = (widen(student_feature) - widen(teacher_feature)).flatten(1).abs()
        products = F.pad((gap[:-1] * gap[1:]).sum(dim=1), (0, 1))
        return reduce(products * len(gap) / max(len(gap) - 1, 1), None, reduction)
    student, teacher, counts = paired_rows(student_feature, teacher_feature, mask)
    gap = (_matrix(student, kernel, gamma, order) - _matrix(teacher, kernel, gamma, order)).square()
    weight = gap.new_ones(len(gap)) if counts is None else counts.to(gap.dtype)
    return reduce(gap @ weight / weight.sum().clamp(min=1), counts, reduction)


def _matrix(x: Tensor, kernel: str, gamma: float, order: int) -> Tensor:
    products = gram(unit(x))
    if kernel == "bilinear":
        return products
    if kernel != "gaussian":
        raise ConfigError("no such kernel", where="kernel", found=repr(kernel), remedy="take 'gaussian'")
    terms = [(2 * gamma) ** p / math.factorial(p) * products**p for p in range(order + 1)]
    return math.exp(-2 * gamma) * sum(terms[1:], terms[0])


@register(
    Card(
        key="cc",
        name="CC",
        title="Correlation Congruence for Knowledge Distillation",
        year=2019,
        arxiv="1904.01802",
        knowledge="relation",
        equation=r"\frac 1 {B^2} \left\| C^S - C^T \right\|_F^2, \quad "
        r"C_{ij} = e^{-2 \gamma} \sum_{p=0}^P \frac{(2 \gamma)^p}{p!} (x_i^\top x_j)^p",
        use="Beside KD, to keep how samples correlate, not only what each one says. Widths may differ.",
        defaults={
            "gamma": "0.4, as in torchdistill",
            "order": "2, as in torchdistill",
            "tap": "the classifier's input",
        },
        evidence="parity",
        evidence_note="kernels: value and gradient of the matrices of yoshitomo-matsubara/torchdistill@3e4373c; "
        "'neighbours': value and gradient of HobbitLong/RepDistiller@b84f547, restructured from the authors' code",
        choices=(
            "The squared norm, as in the paper; torchdistill takes the norm, and does not scale rows to length 1.",
            "No learned embedding before a kernel, which needs none; 'neighbours' has RepDistiller's, of width 128.",
            "A weight of 100, which gives it a size beside the labels like that of SP; the paper's units are open.",
        ),
        with_labels={"cross_entropy": 1.0},
        weight=100.0,
    ),
    cc_loss,
)
class CC(Objective):
    """Correlation congruence; see ``limbeck.functional.cc_loss``. RepDistiller gives ``"neighbours"`` the weight 0.02.

    Args:
        tap: The feature to compare.
        teacher_tap: The teacher's, where it is called otherwise.
    """

    contract = Contract(normalizer="samples", mask=True, decomposes=False)

    def __init__(
        self, tap: str = "penultimate", teacher_tap: str | None = None, kernel: Kernel = "gaussian", gamma: float = 0.4,
        order: int = 2,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tap, self.teacher_tap, self.kernel, self.gamma, self.order = tap, teacher_tap or tap, kernel, gamma, order
        self.student_taps, self.teacher_taps = (self.tap,), (self.teacher_tap,)
        self.embed: nn.ModuleList | None = None
        if kernel == "neighbours":
            self.contract = replace(self.contract, mask=False, permutation=False, at_equal=None)  # type: ignore[misc]

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        if self.kernel == "neighbours":
            features = student[self.tap], teacher[self.teacher_tap]
            self.embed = nn.ModuleList(LinearProjector(f.shape[channel_dim(f)], 128).to(f.device) for f in features)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        s, t = student[self.tap], teacher[self.teacher_tap].detach()
        if self.kernel == "neighbours":
            s, t = (layer(pooled(f)[0]) for layer, f in zip(self.ready("embed"), (s, t), strict=True))
        return cc_loss(s, t, kernel=self.kernel, gamma=self.gamma, order=self.order, mask=batch.mask)

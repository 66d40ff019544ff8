"""Flow of solution procedure (FSP): how one layer's channels go with the next one's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import ConfigError
from limbeck.core.layers import SameWidth, Tap, check_flow
from limbeck.core.layout import to_map
from limbeck.core.objective import Contract, Objective
from limbeck.core.precision import without_autocast
from limbeck.core.reduction import Reduction, check_floating, check_same_shape, fit_mask, reduce, widen
from limbeck.core.relations import channel_dim
from limbeck.core.trace import Trace

Pool = Literal["max", "avg"]


@without_autocast
def fsp_loss(
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    *,
    pool: Pool = "max",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared distance of the student's FSP matrices from the teacher's, one for each two layers that follow.

    .. math:: L = \sum_l \frac 1 {C_l C_{l+1}} \left\| G^S_l - G^T_l \right\|_F^2, \qquad
        G_l = \frac 1 N \sum_{n=1}^N f_{l,n} f_{l+1,n}^\top

    :math:`f_{l,n}` are the channels of layer l at place n; of two maps of different sizes the larger is pooled. The
    student's and the teacher's maps may differ in size, but not in channels.

    Args:
        student_features: Two layers or more, in order: maps ``[B, C, H, W]`` or tokens ``[B, T, D]``.
        teacher_features: As many, of the same channels; detached.
        pool: ``"max"``, as in the paper, or ``"avg"``, as in RepDistiller.
        mask: Booleans, True where a sample ``[B]`` or a place (``[B, T]``, ``[B, H, W]``) counts; places need layers of
            one size.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        LimbeckError: Fewer than two layers, other channels, a mask that does not fit, or no such pooling.

    Source: Yim et al., "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer
        Learning", CVPR 2017.

    >>> import torch
    >>> layers = [torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[3.0, 1.0]]]])]
    >>> fsp_loss(layers, [torch.zeros(1, 1, 1, 2)] * 2)
    tensor(6.2500)
    """
    if pool not in ("max", "avg"):
        raise ConfigError("no such pooling", where="pool", found=repr(pool), wanted="'max' or 'avg'")
    check_flow(student_features, teacher_features)
    for name, features in (("student_feature", student_features), ("teacher_feature", teacher_features)):
        for feature in features:
            check_floating(feature, name, least=3)
    own = _matrices([widen(f) for f in student_features], pool, mask)
    others = _matrices([widen(f.detach()) for f in teacher_features], pool, mask)
    values = []
    for s, t in zip(own, others, strict=True):
        check_same_shape(s, t, "the student_feature's matrix", "the teacher_feature's matrix")
        values.append((s - t).square().mean(dim=(1, 2)))
    counts = None if mask is None else mask.reshape(len(mask), -1).any(dim=1)
    return reduce(torch.stack(values).sum(dim=0), counts, reduction)


def _matrices(features: list[Tensor], pool: Pool, mask: Tensor | None) -> list[Tensor]:
    """``[B, C_l, C_l+1]`` of each two layers that follow."""
    found = []
    for first, second in pairwise(features):
        if first.ndim == 4 or second.ndim == 4 or first.shape[1] != second.shape[1]:
            maps = to_map(first, "feature"), to_map(second, "feature")
            size = tuple(min(sides) for sides in zip(maps[0].shape[2:], maps[1].shape[2:], strict=True))
            smaller = F.adaptive_max_pool2d if pool == "max" else F.adaptive_avg_pool2d
            first, second = (m if m.shape[2:] == size else smaller(m, size) for m in maps)  # type: ignore[arg-type]
        a, b = (f.movedim(channel_dim(f), 1) for f in (first, second))
        number: Tensor | int = a[0, 0].numel()
        if mask is not None:
            counts = fit_mask(mask, a[:, 0])
            a, b = (x.masked_fill(~counts.unsqueeze(1), 0.0) for x in (a, b))
            number = counts.flatten(1).sum(dim=1).clamp(min=1).reshape(-1, 1, 1)
        found.append(a.flatten(2) @ b.flatten(2).transpose(1, 2) / number)
    return found


@register(
    Card(
        key="fsp",
        name="FSP",
        title="A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning",
        year=2017,
        knowledge="feature",
        equation=r"\sum_l \frac 1 {C_l C_{l+1}} \| G^S_l - G^T_l \|_F^2, \quad "
        r"G_l = \frac 1 N \sum_n f_{l,n} f_{l+1,n}^\top",
        use="To start a student of the teacher's widths: in a first stage, then the labels. In one, beside the labels.",
        defaults={
            "pool": "max, as in the paper",
            "tap": "the last layer at each resolution, as in the CRD benchmark (which adds the stem)",
        },
        evidence="parity",
        evidence_note="value and gradients, average pooling, of HobbitLong/RepDistiller@b84f547; matrices with maximum "
        "pooling of yoshitomo-matsubara/torchdistill@3e4373c; the authors released no code",
        choices=(
            "The mean over a matrix's entries, as in RepDistiller; the paper sums, with weights it does not state.",
            "Layers of different widths, which the paper excludes: a linear map of the student's is learned beside it.",
            "Matrices between the stages' ends; the paper takes a stage's first and last layer (name them in tap).",
        ),
        with_labels={"cross_entropy": 1.0},
        scheme="hint_then_kd",
    ),
    fsp_loss,
)
class FSP(SameWidth):
    """Flow of solution procedure; see ``limbeck.functional.fsp_loss``. Made for a first stage (``hint_then_kd``).

    Args:
        tap: Where: a plural role, whose layers are paired by resolution, or two layers or more, in order.
        teacher_tap: The teacher's, where they are called otherwise.
        pool: ``"max"`` or ``"avg"``.

    >>> loss = FSP(["relu1", "layer1", "layer2", "layer3"])
    """

    contract = Contract(normalizer="samples", mask=True)

    def __init__(self, tap: Tap = "stages", teacher_tap: Tap | None = None, pool: Pool = "max") -> None:
        super().__init__(tap, teacher_tap)
        self.pool = pool

    def opening(self) -> Objective:
        """All of it belongs into the first stage."""
        return self

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        students, teachers = zip(*self.features(student, teacher), strict=True)
        return fsp_loss(students, teachers, pool=self.pool, mask=batch.mask)

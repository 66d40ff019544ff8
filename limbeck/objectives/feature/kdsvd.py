"""Distillation by singular value decomposition (KD-SVD): how one layer's main direction goes with the next one's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import TensorError
from limbeck.core.layers import SameWidth, Tap, check_flow
from limbeck.core.objective import Contract
from limbeck.core.precision import without_autocast
from limbeck.core.reduction import Reduction, check_floating, check_positive, fit_mask, reduce, widen
from limbeck.core.relations import channel_dim, check_same_batch, unit
from limbeck.core.trace import Trace
from limbeck.objectives.parts.singular import right_vectors


@without_autocast
def kdsvd_loss(
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    *,
    k: int = 1,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared distance between radial basis functions of the main directions of each two layers that follow.

    .. math::
        L &= \sum_l \sum_{ijm} \left( R^S_{l,ijm} - R^T_{l,ijm} \right)^2, \qquad
            R_{l,ijm} = \exp \left( -\frac 1 8 (v_{l,im} - v_{l+1,jm})^2 \right) \\
        v^T_{l,m} &= \hat \sigma^T_{l,m} \bar v^T_{l,m}, \qquad
        v^S_{l,m} = \pm \hat \sigma^T_{l,m} \bar v^S_{l,n(m)}, \quad
            n(m) = \arg\max_{n \le k + 3} \left| \langle \bar v^S_{l,n}, \bar v^T_{l,m} \rangle \right|

    :math:`\bar v_{l,m}` is the m-th right singular vector, over channels, of a sample's layer as a matrix of places by
    channels, :math:`\hat \sigma` the teacher's first k singular values over their norm. The student's vectors are
    ordered and turned as the teacher's; those are turned so that their entries add up to more than 0.

    Args:
        student_features: Two layers or more, in order: maps ``[B, C, *]`` or tokens ``[B, T, D]``.
        teacher_features: As many, of the same channels and any places; detached.
        k: Vectors of each layer, where its places and channels allow; 1 in the authors' code.
        mask: Booleans, True where a sample ``[B]`` or a place (``[B, T]``, ``[B, *]``) counts; places: equal sizes.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        LimbeckError: Fewer than two layers, other channels, ``k`` not above zero, or a mask that does not fit.

    Source: Lee et al., "Self-supervised Knowledge Distillation Using Singular Value Decomposition", arXiv 1807.06819.

    >>> import torch
    >>> lower, upper = torch.tensor([[[[3.0]], [[4.0]]]]), torch.tensor([[[[1.0]], [[0.0]]]])
    >>> kdsvd_loss([lower, upper], [upper, upper])
    tensor(0.0244)
    """
    check_positive(k, "k")
    check_flow(student_features, teacher_features)
    students = [_places(f, "student_feature", mask) for f in student_features]
    teachers = [_places(f.detach(), "teacher_feature", mask) for f in teacher_features]
    k = min(k, *(side for x in (*students, *teachers) for side in x.shape[1:]))
    directions = []
    for x, y in zip(students, teachers, strict=True):
        check_same_batch(x, y, "student_feature", "teacher_feature")
        if x.shape[2] != y.shape[2]:
            raise TensorError("other channels", where="student_feature", found=x.shape[2], wanted=y.shape[2])
        directions.append(_directions(x, y, k))
    values = []
    for lower, upper in pairwise(directions):
        s, t = (torch.exp(-(a.unsqueeze(2) - b.unsqueeze(1)).square() / 8) for a, b in zip(lower, upper, strict=True))
        values.append((s - t).square().sum(dim=(1, 2, 3)))
    counts = None if mask is None else mask.reshape(len(mask), -1).any(dim=1)
    return reduce(torch.stack(values).sum(dim=0), counts, reduction)


def _places(feature: Tensor, name: str, mask: Tensor | None) -> Tensor:
    """``[B, N, C]``, 0 at places that do not count."""
    check_floating(feature, name, least=3)
    places = widen(feature).movedim(channel_dim(feature), -1)
    if mask is not None:
        places = places.masked_fill(~fit_mask(mask, places[..., 0]).unsqueeze(-1), 0.0)
    return places.flatten(1, -2)


def _directions(student: Tensor, teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Weighted vectors ``[B, C, k]`` of both; the student's as the teacher's are ordered and turned."""
    t, sigma = right_vectors(teacher, k)
    t = torch.where(t.sum(dim=1, keepdim=True) < 0, -t, t)
    s, _ = right_vectors(student, k + 3)
    cosine = s.detach().transpose(1, 2) @ t
    best = cosine.abs().argmax(dim=1, keepdim=True)
    s = s.gather(2, best.expand(-1, s.shape[1], -1))
    s = torch.where(cosine.gather(1, best) < 0, -s, s)
    weight = unit(sigma).unsqueeze(1)
    return s * weight, t * weight


@register(
    Card(
        key="kdsvd",
        name="KD-SVD",
        title="Self-supervised Knowledge Distillation Using Singular Value Decomposition",
        year=2018,
        arxiv="1807.06819",
        code="sseung0703/SSKD_SVD",
        knowledge="feature",
        equation=r"\sum_l \sum_{ijm} (R^S_{l,ijm} - R^T_{l,ijm})^2, \; R_{l,ijm} = e^{-(v_{l,im} - v_{l+1,jm})^2 / 8}",
        use="The flow between layers as in FSP, of main directions alone. Decomposes every sample's layers.",
        defaults={"k": "1, as in the authors' code", "tap": "the last layer at each resolution, as in mdistiller"},
        evidence="parity",
        evidence_note="value and gradients of HobbitLong/RepDistiller@b84f547; mdistiller decomposes other matrices",
        choices=(
            "The sum over pairs of channels, averaged over samples, as in RepDistiller; the authors' code adds up the "
            "batch, times sqrt(k)/2, and clips its gradient to the norm of the labels'.",
            "The teacher's directions are turned to a positive sum; the code takes the sign that its library gives.",
            "Layers of different widths, which the paper excludes: a linear map of the student's is learned beside it.",
            "One stage; the paper lets the distillation's share fade out, which a schedule as weight does.",
        ),
        with_labels={"cross_entropy": 1.0},
    ),
    kdsvd_loss,
)
class KDSVD(SameWidth):
    """Distillation by singular value decomposition; see ``limbeck.functional.kdsvd_loss``.

    Args:
        tap: Where: a plural role, whose layers are paired by resolution, or two layers or more, in order.
        teacher_tap: The teacher's, where they are called otherwise.
        k: Vectors of each layer.

    >>> loss = KDSVD(["layer1", "layer2", "layer3"])
    """

    contract = Contract(normalizer="samples", mask=True)

    def __init__(self, tap: Tap = "stages", teacher_tap: Tap | None = None, k: int = 1) -> None:
        super().__init__(tap, teacher_tap)
        check_positive(k, "k")
        self.k = k

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        students, teachers = zip(*self.features(student, teacher), strict=True)
        return kdsvd_loss(students, teachers, k=self.k, mask=batch.mask)

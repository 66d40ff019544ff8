"""Attention transfer (AT): the student looks where the teacher looks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import TensorError
from limbeck.core.layers import LayerObjective
from limbeck.core.layout import aligned
from limbeck.core.objective import Contract
from limbeck.core.reduction import Reduction, check_floating, check_positive, fit_mask, reduce, widen
from limbeck.core.relations import channel_dim, unit
from limbeck.core.trace import Trace


def at_loss(
    student_feature: Tensor | Sequence[Tensor],
    teacher_feature: Tensor | Sequence[Tensor],
    *,
    p: float = 2.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared distance of the student's attention maps from the teacher's, summed over pairs of layers.

    .. math::
        L = \sum_j \frac 1 n \left\| \frac{Q^S_j}{\|Q^S_j\|_2} - \frac{Q^T_j}{\|Q^T_j\|_2} \right\|_2^2, \qquad
        Q_j = \frac 1 C \sum_c |A_{j,c}|^p

    ``n`` is the number of places of the map; the loss is then averaged over samples. The paper writes half the norm,
    not squared; its code, from which its numbers come and for which it states the weight 1000, computes what stands
    here. Layers may differ in width, and maps in size: the larger is pooled to the smaller. Tokens beside a map, or
    beside tokens of another number, are taken as a square map.

    Args:
        student_feature: Maps ``[B, C, *]`` or tokens ``[B, T, D]``, or a list of them, one a layer.
        teacher_feature: As many, of any width; detached.
        p: Power of the activations; 2 in the paper's experiments.
        mask: Booleans, True where a sample ``[B]`` or a place (``[B, T]``, ``[B, *]``) counts; places need maps of
            equal size.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: Lists of different lengths, other numbers of dimensions or tokens, or a mask that does not fit.
        ConfigError: ``p`` not above zero.

    Source:
        Zagoruyko and Komodakis, "Paying More Attention to Attention", 2017, arXiv 1612.03928, equation 2.

    Example:
        >>> import torch
        >>> student = torch.tensor([[[[1.0, 0.0]]]])
        >>> at_loss(student, torch.tensor([[[[0.0, 1.0]], [[0.0, 1.0]]]]))
        tensor(1.)
    """
    check_positive(p, "p")
    students = [student_feature] if isinstance(student_feature, Tensor) else list(student_feature)
    teachers = [teacher_feature] if isinstance(teacher_feature, Tensor) else list(teacher_feature)
    if len(students) != len(teachers) or not students:
        raise TensorError(
            "attention transfer pairs layer with layer",
            where="teacher_feature",
            found=f"{len(teachers)} layers",
            wanted=f"{len(students) or 'at least 1'} as in student_feature",
        )
    total = torch.stack([_layer(s, t, p, mask) for s, t in zip(students, teachers, strict=True)]).sum(dim=0)
    if mask is not None and mask.ndim > 1:
        mask = mask.flatten(1).any(dim=1)
    return reduce(total, mask, reduction)


def _layer(student: Tensor, teacher: Tensor, p: float, mask: Tensor | None) -> Tensor:
    """The mean squared distance of one pair of attention maps, by sample."""
    check_floating(student, "student_feature", least=3)
    check_floating(teacher, "teacher_feature", least=3)
    student, teacher = aligned(widen(student), widen(teacher.detach()))
    s_map, t_map = _energy(student, p), _energy(teacher, p)
    if mask is None or mask.ndim == 1:
        return (unit(s_map.flatten(1)) - unit(t_map.flatten(1))).square().mean(dim=1)
    counts = fit_mask(mask, s_map).flatten(1)
    s_map, t_map = (m.flatten(1).masked_fill(~counts, 0.0) for m in (s_map, t_map))
    return (unit(s_map) - unit(t_map)).square().sum(dim=1) / counts.sum(dim=1).clamp(min=1)


def _energy(feature: Tensor, p: float) -> Tensor:
    """The attention map, ``[B, *]``, up to a factor for each sample, which normalisation takes out again."""
    magnitude = feature.abs()
    largest = magnitude.detach().flatten(1).amax(dim=1).reshape(-1, *[1] * (feature.ndim - 1))
    # With the largest activation scaled to 1, no power over- or underflows.
    return (magnitude / largest.masked_fill(largest == 0, 1.0)).pow(p).mean(dim=channel_dim(feature))


@register(
    Card(
        key="at",
        name="AT",
        title="Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks via "
        "Attention Transfer",
        year=2017,
        arxiv="1612.03928",
        code="szagoruyko/attention-transfer",
        knowledge="feature",
        equation=r"\sum_j \frac 1 n \left\| \frac{Q^S_j}{\|Q^S_j\|_2} - \frac{Q^T_j}{\|Q^T_j\|_2} \right\|_2^2, \quad "
        r"Q_j = \frac 1 C \sum_c |A_{j,c}|^p",
        use="Between convolutional networks of any width: it needs no projector, and nothing but where they look. "
        "Works well together with KD.",
        defaults={"p": "2, as in the paper's experiments", "tap": "the last layer at each resolution, as in the paper"},
        evidence="parity",
        evidence_note="value and gradient of HobbitLong/RepDistiller@b84f547 and megvii-research/mdistiller@a08d46f, "
        "whose function is the authors' own",
        choices=(
            "The mean of squares, as in the authors' code, for which the paper states its weight; the paper's equation "
            "has half the norm instead.",
            "Of maps of different sizes the larger is pooled to the smaller, as in RepDistiller.",
        ),
        with_labels={"cross_entropy": 1.0},
        weight=1000.0,
    ),
    at_loss,
)
class AT(LayerObjective):
    """Attention transfer; see ``limbeck.functional.at_loss``.

    Args:
        tap: Where to look: a plural role, whose layers are paired by resolution, or layers, paired in order.
        teacher_tap: The teacher's, where they are called otherwise.
        p: Power of the activations.

    >>> loss = 1000.0 * AT(["layer1", "layer2"])
    """

    contract = Contract(normalizer="samples", mask=True)

    def __init__(
        self, tap: str | list[str] = "stages", teacher_tap: str | list[str] | None = None, p: float = 2.0
    ) -> None:
        super().__init__(tap, teacher_tap)
        check_positive(p, "p")
        self.p = p

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        students, teachers = zip(*self.pairs(student, teacher), strict=True)
        return at_loss(students, teachers, p=self.p, mask=batch.mask)

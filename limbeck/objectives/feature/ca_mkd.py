"""CA-MKD: of several teachers, sample by sample, those count more that are nearer to the label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import kl_rows, soften
from limbeck.core.ensembling import confidence_weights, stacked
from limbeck.core.errors import TensorError
from limbeck.core.heads import BatchNorm
from limbeck.core.layout import aligned
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.precision import without_autocast
from limbeck.core.projectors import ConvProjector, LinearProjector
from limbeck.core.reduction import (
    Reduction,
    check_inside,
    check_logits,
    check_positive,
    check_same_shape,
    reduce,
    widen,
)
from limbeck.core.relations import channel_dim, pooled
from limbeck.core.trace import Trace


@without_autocast
def ca_mkd_loss(
    student_logits: Tensor,
    teacher_logits: Sequence[Tensor],
    labels: Tensor,
    *,
    student_features: Sequence[Tensor] = (),
    teacher_features: Sequence[Tensor] = (),
    feature_logits: Sequence[Tensor] = (),
    alpha: float = 1.0,
    beta: float = 50.0,
    temperature: float = 4.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Divergences from several teachers, and distances from their features, weighted sample by sample.

    .. math:: L = \alpha\, T^2 \sum_k w_k\, \mathrm{KL}(p_k^T \| p_S^T) + \beta \sum_k v_k\, \frac{1}{|F_k|}
        \left\| F_k - r_k(F_S) \right\|_2^2, \qquad
        w_k = \frac{1}{K - 1} \Big( 1 - \frac{e^{H_k}}{\sum_j e^{H_j}} \Big)

    :math:`H_k` is the teacher's cross-entropy. :math:`v_k` is made in the same way from the cross-entropy of what the
    teacher's classifier says of the student's feature, where teacher k would be understood.

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: One ``[B, *, C]`` for each teacher; detached.
        labels: ``[B, *]`` integers (negative: there all teachers count alike), or ``[B, *, C]`` shares of one.
        student_features: For each teacher, the student's feature as its connector gives it; none: logits alone.
        teacher_features: The teachers', each of its student feature's shape ``[B, *, ...]``; detached.
        feature_logits: What each teacher's classifier makes of the student's feature, ``[B, *, C]``.
        alpha: Weight of the divergences.
        beta: Weight of the features.
        temperature: T.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over places that count, ``"sum"``, or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Shapes that do not fit, or not one feature for each teacher.

    Source: Confidence-Aware Multi-Teacher Knowledge Distillation, arXiv 2201.00007.

    >>> student, right, wrong = torch.zeros(1, 2), torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    >>> options = {"labels": torch.tensor([0]), "temperature": 1.0}
    >>> ca_mkd_loss(student, [right, right], **options), ca_mkd_loss(student, [right, wrong], **options)
    (tensor(0.6031), tensor(0.6031))
    """
    teachers = stacked(teacher_logits).detach()
    check_logits(student_logits, teacher_logits[0])
    check_positive(temperature, "temperature")
    log_q = soften(student_logits, temperature)
    apart = kl_rows(soften(teachers, temperature), log_q.expand_as(teachers))
    values = alpha * temperature**2 * (confidence_weights(teachers, labels) * apart).sum(dim=0)
    if student_features:
        number = (len(student_features), len(teacher_features), len(feature_logits))
        if number != (len(teachers),) * 3:
            found = "{} of the student's, {} of teachers', {} logits".format(*number)
            raise TensorError("not one feature for each teacher", where="student_features", found=found)
        trust = confidence_weights(stacked(feature_logits), labels)
        places = log_q.ndim - 1
        pairs = enumerate(zip(student_features, teacher_features, strict=True))
        far = [_distance(own, other, places, k) for k, (own, other) in pairs]
        values = values + beta * (trust * torch.stack(far)).sum(dim=0)
    return reduce(values, mask, reduction)


def _distance(own: Tensor, other: Tensor, places: int, number: int) -> Tensor:
    """Mean squared distance at each place, whatever dimensions the features have beside."""
    check_same_shape(other, own, f"teacher_features[{number}]", f"student_features[{number}]")
    return (widen(own) - widen(other.detach())).square().mean(dim=list(range(places, own.ndim)))


@register(
    Card(
        key="ca_mkd",
        name="CA-MKD",
        title="Confidence-Aware Multi-Teacher Knowledge Distillation",
        year=2021,
        arxiv="2201.00007",
        code="Rorozhl/CA-MKD",
        knowledge="feature",
        equation=r"\sum_k \frac{1 - \mathrm{softmax}(H)_k}{K - 1} \left( \alpha T^2 \mathrm{KL}(p_k \| p_S) \right) + "
        r"\beta \sum_k \frac{1 - \mathrm{softmax}(H^S)_k}{K - 1} \overline{(F_k - r_k(F_S))^2}",
        use="For several teachers of one task, some of which are wrong on some samples: labels tell whom to trust on "
        "each. With one teacher it is KD and a hint.",
        defaults={
            "alpha": "1, the authors'",
            "beta": "50, the authors'",
            "temperature": "4, the authors'",
            "tap": "the last map before pooling, the authors'",
        },
        evidence="parity",
        evidence_note="value and gradients of Rorozhl/CA-MKD@c2f39a9",
        choices=(
            "Weights sum to one over teachers, as in the paper; the authors' code divides by their number once more, "
            "so that its alpha 1 and beta 50 are 1/K and 50/K here.",
            "The connector is the code's 1x1 convolution, batch normalisation and ReLU, without ReLU where the "
            "teacher's feature can be negative; it normalises by the batch alone.",
            "Each connector reads the student's own map at that teacher's resolution; the code resizes what it had "
            "resized for the teacher before.",
            "The features' weights pass a gradient, as in the code. The code adds features from its second epoch on; "
            "here they count from the start.",
            "Where a sample has no label all teachers count alike.",
        ),
        needs=("labels",),
        tasks=("several teachers",),
        with_labels={"cross_entropy": 1.0},
        cost="Every teacher answers each batch.",
    ),
    ca_mkd_loss,
)
class CAMKD(Objective):
    """Confidence-aware distillation from several teachers; see ``limbeck.functional.ca_mkd_loss``.

    Args:
        alpha: Weight of the divergences.
        beta: Weight of the features; 0 compares logits alone.
        temperature: T.
        tap: Which features.

    >>> CAMKD(beta=0.0).student_taps
    ('logits',)
    """

    contract = Contract(normalizer="positions", at_equal=None, decomposes=False, least_samples=2)

    def __init__(
        self, alpha: float = 1.0, beta: float = 50.0, temperature: float = 4.0, tap: str = "stages:-1"
    ) -> None:
        super().__init__()
        check_positive(temperature, "temperature")
        for name, value in (("alpha", alpha), ("beta", beta)):
            check_inside(value, name, 0.0, float("inf"), closed=True)
        self.alpha, self.beta, self.temperature, self.tap = alpha, beta, temperature, tap
        features = (tap,) if beta else ()
        self.student_taps = ("logits", *features)
        self.teacher_taps = ("logits", *features, *(("logits@weight", "logits@bias") if beta else ()))
        self.connectors: nn.ModuleList | None = None

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        if self.beta:
            goals = [member[self.tap] for member in teacher.members or (teacher,)]
            self.connectors = nn.ModuleList(_connector(student[self.tap], goal) for goal in goals)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        members = teacher.members or (teacher,)
        features: dict[str, Any] = {}
        if self.beta:
            connectors = self.ready("connectors")
            if len(connectors) != len(members):
                found = f"{len(members)}, after {len(connectors)} in the dry run"
                raise TensorError("another number of teachers", where="teacher.members", found=found)
            pairs = [aligned(student[self.tap], member[self.tap], to="teacher") for member in members]
            mapped = [_mapped(connect, own) for connect, (own, _) in zip(connectors, pairs, strict=True)]
            said = [self._answer(h, member, student.logits) for h, member in zip(mapped, members, strict=True)]
            goals = [goal for _, goal in pairs]
            features = {"student_features": mapped, "teacher_features": goals, "feature_logits": said}
        return ca_mkd_loss(
            student.logits,
            [member.logits for member in members],
            batch.require("labels"),
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            mask=batch.mask,
            **features,
        )

    def _answer(self, mapped: Tensor, member: Trace, like: Tensor) -> Tensor:
        """What a teacher's classifier says of the student's feature: of each token where it has an answer for each."""
        rows = mapped if mapped.ndim == like.ndim == 3 else pooled(mapped)[0]
        weight, bias = (member[name].detach().to(rows.dtype) for name in ("logits@weight", "logits@bias"))
        return torch.nn.functional.linear(rows, weight, bias)


def _mapped(connect: nn.Module, feature: Tensor) -> Tensor:
    """A feature through its connector; tokens as rows, which compiled graphs keep in one layout."""
    if feature.ndim != 3:
        return connect(feature)
    return connect(feature.flatten(0, 1)).unflatten(0, feature.shape[:2])


def _connector(feature: Tensor, goal: Tensor) -> nn.Module:
    """A linear map to a teacher's channels, normalised, and not negative where the teacher's feature is not."""
    own, other = aligned(feature, goal, to="teacher")
    width, wanted = own.shape[channel_dim(own)], other.shape[channel_dim(other)]
    first: nn.Module = ConvProjector(width, wanted, 1) if own.ndim == 4 else LinearProjector(width, wanted)
    last = nn.ReLU() if bool((goal >= 0).all()) else nn.Identity()
    return nn.Sequential(first, BatchNorm(wanted), last).to(feature.device)

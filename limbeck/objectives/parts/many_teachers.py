"""A student's feature as each of several teachers would have it: connectors, distances, and what is said of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from limbeck.core.errors import TensorError
from limbeck.core.heads import BatchNorm
from limbeck.core.layout import aligned
from limbeck.core.projectors import ConvProjector, LinearProjector
from limbeck.core.reduction import check_same_shape, widen
from limbeck.core.relations import channel_dim, pooled
from limbeck.core.trace import Trace


def distances(student: Sequence[Tensor], teacher: Sequence[Tensor], places: int) -> Tensor:
    """Mean squared distance of each pair of features at each place, ``[K, B, *]``.

    Args:
        student, teacher: ``[B, *, ...]``, whatever dimensions they have beside; the teachers' are detached.
        places: Dimensions that are places.

    Raises:
        TensorError: A pair's shapes differ, or there are more of one than of the other.

    >>> distances([torch.zeros(2, 3)], [torch.ones(2, 3)], 1)
    tensor([[1., 1.]])
    """
    if len(student) != len(teacher):
        found = f"{len(student)} of the student's, {len(teacher)} of teachers'"
        raise TensorError("not one feature for each teacher", where="student_features", found=found)
    far = []
    for k, (own, other) in enumerate(zip(student, teacher, strict=True)):
        check_same_shape(other, own, f"teacher_features[{k}]", f"student_features[{k}]")
        far.append((widen(own) - widen(other.detach())).square().mean(dim=list(range(places, own.ndim))))
    return torch.stack(far)


class TeacherConnectors(nn.Module):
    """For each teacher a linear map of the student's feature, normalised, and not negative where the teacher's is not.

    Args:
        student: The dry run's.
        members: Each teacher's.
        tap: Which feature.
    """

    def __init__(self, student: Trace, members: Sequence[Trace], tap: str) -> None:
        super().__init__()
        self.tap = tap
        self.each = nn.ModuleList(_connector(student[tap], member[tap]) for member in members)

    def forward(self, student: Trace, members: Sequence[Trace]) -> dict[str, list[Tensor]]:
        """``student_features`` for each teacher, ``teacher_features``, and their classifiers' ``feature_logits``."""
        if len(self.each) != len(members):
            found = f"{len(members)}, after {len(self.each)} in the dry run"
            raise TensorError("another number of teachers", where="teacher.members", found=found)
        pairs = [aligned(student[self.tap], member[self.tap], to="teacher") for member in members]
        mapped = [_mapped(connect, own) for connect, (own, _) in zip(self.each, pairs, strict=True)]
        said = [_answer(feature, member, student.logits) for feature, member in zip(mapped, members, strict=True)]
        goals = [goal for _, goal in pairs]
        return {"student_features": mapped, "teacher_features": goals, "feature_logits": said}


def _answer(feature: Tensor, member: Trace, like: Tensor) -> Tensor:
    """What a teacher's classifier says of a feature: of each token where it has an answer for each."""
    rows = feature if feature.ndim == like.ndim == 3 else pooled(feature)[0]
    weight, bias = (member[name].detach().to(rows.dtype) for name in ("logits@weight", "logits@bias"))
    return nn.functional.linear(rows, weight, bias)


def _mapped(connect: nn.Module, feature: Tensor) -> Tensor:
    """A feature through its connector; tokens as rows, which compiled graphs keep in one layout."""
    if feature.ndim != 3:
        return connect(feature)
    return connect(feature.flatten(0, 1)).unflatten(0, feature.shape[:2])


def _connector(feature: Tensor, goal: Tensor) -> nn.Module:
    own, other = aligned(feature, goal, to="teacher")
    width, wanted = own.shape[channel_dim(own)], other.shape[channel_dim(other)]
    first: nn.Module = ConvProjector(width, wanted, 1) if own.ndim == 4 else LinearProjector(width, wanted)
    last = nn.ReLU() if bool((goal >= 0).all()) else nn.Identity()
    return nn.Sequential(first, BatchNorm(wanted), last).to(feature.device)

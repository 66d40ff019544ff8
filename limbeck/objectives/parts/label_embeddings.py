"""One embedding a class of each sample: where they come from, and how those of a set lie to one another."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import TensorError
from limbeck.core.labels import binary_labels
from limbeck.core.objective import Objective
from limbeck.core.reduction import check_floating, fit_mask, widen
from limbeck.core.relations import scaled_distances
from limbeck.core.trace import Trace


def structure_rows(student: Tensor, teacher: Tensor, present: Tensor) -> Tensor:
    """Each row's part of how the two differ in the distances among the rows present, ``[N, M]``.

    Args:
        student: ``[N, M, D]``, N sets of M rows.
        teacher: ``[N, M, D_t]``.
        present: ``[N, M]``, 1 where a row is of its set, else 0.
    """
    own, other = (scaled_distances(rows, present, exact=False) for rows in (student, teacher))
    gap = F.smooth_l1_loss(own, other, reduction="none")
    return present * (gap * present.unsqueeze(-2)).sum(dim=-1) / present.sum(dim=-1, keepdim=True).clamp(min=1)


def compared(
    student: Tensor, teacher: Tensor, labels: Tensor, mask: Tensor | None, method: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Both embeddings, 0 where a sample has not the label, and ``[B, C]``: 1 where it has.

    Raises:
        TensorError: Shapes or dtypes do not fit.
    """
    check_floating(student, "student_embedding", least=3)
    check_floating(teacher, "teacher_embedding", least=3)
    if student.ndim != 3 or teacher.shape[:-1] != student.shape[:-1]:
        raise TensorError(
            f"{method} compares one embedding a class",
            where="teacher_embedding",
            found=f"{list(teacher.shape)} beside a student's {list(student.shape)}",
            wanted="[B, C, D], of the same samples and classes",
        )
    targets, _ = binary_labels(labels, student[..., 0], method)
    present = targets > 0.5 if mask is None else (targets > 0.5) & fit_mask(mask, targets)
    student, teacher = (widen(e).masked_fill(~present.unsqueeze(-1), 0.0) for e in (student, teacher.detach()))
    return student, teacher.to(student.dtype), present.to(student.dtype)


class LabelEmbeddings(Objective):
    """An objective on one embedding a class.

    Where no tap gives them, the embedding of class c is :math:`w_c \\odot f`, what each part of the feature that enters
    the classifier adds to the logit of c: as with the authors' label queries, the logit is linear in it, and nothing
    has to be learned beside either model.

    Args:
        tap: A place that gives ``[B, C, D]``, such as a label-query decoder; default: made of classifier and feature.
        teacher_tap: The teacher's, where it is called otherwise.
    """

    def __init__(self, tap: str | None = None, teacher_tap: str | None = None) -> None:
        super().__init__()
        self.tap, self.teacher_tap = tap, teacher_tap or tap
        made = ("penultimate", "logits@weight")
        self.student_taps = made if self.tap is None else (self.tap,)
        self.teacher_taps = made if self.teacher_tap is None else (self.teacher_tap,)

    def embeddings(self, student: Trace, teacher: Trace, batch: Batch) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's, ``[B, C, D]``."""
        return _embedding(student, self.tap, batch.mask), _embedding(teacher, self.teacher_tap, batch.mask)


def _embedding(trace: Trace, tap: str | None, mask: Tensor | None) -> Tensor:
    if tap is not None:
        return trace[tap]
    feature, weight = trace["penultimate"], trace["logits@weight"]
    if feature.ndim != 2 or weight.ndim != 2 or feature.shape[1] != weight.shape[1]:
        raise TensorError(
            "no embedding a class can be made of these",
            where="tap",
            found=f"a feature {list(feature.shape)} and a classifier {list(weight.shape)}",
            wanted="[B, D] and [C, D]",
            remedy="name a place that gives [B, C, D]",
        )
    if mask is not None:
        feature = feature.masked_fill(~fit_mask(mask, feature), 0.0)
    return widen(feature).unsqueeze(1) * widen(weight)

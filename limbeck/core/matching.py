"""Match scores between two sides, images and texts: who is whose negative, and which negatives are hard."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.errors import TensorError
from limbeck.core.reduction import check_logits, fit_mask, widen


def match_scores(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Both matrices of scores, the teacher's without gradient, and which entries ``[B, B]`` are negatives.

    Args:
        student: ``[B, B]``: the score of each image (row) with each text (column); the diagonal matches.
        teacher: The same.
        mask: ``[B]`` booleans, True where a pair counts; the others are nobody's negatives.

    Raises:
        TensorError: Scores that are not square, or of different shapes; a mask that does not fit.

    >>> match_scores(torch.zeros(2, 2), torch.zeros(2, 2))[2].tolist()
    [[False, True], [True, False]]
    """
    check_logits(student, teacher)
    if student.ndim != 2 or student.shape[0] != student.shape[1]:
        wanted = "[B, B]: of each with each"
        raise TensorError("no match scores", where="student_logits", found=list(student.shape), wanted=wanted)
    negatives = ~torch.eye(len(student), dtype=torch.bool, device=student.device)
    if mask is not None:
        negatives = negatives & fit_mask(mask, student.diagonal())
    return widen(student), widen(teacher.detach()), negatives


def hardest(scores: Tensor, negatives: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The columns ``[B, K]`` of each row's negatives of highest score, and which of them are negatives at all.

    ``K`` is the number, or one less than there are columns.

    >>> hardest(torch.tensor([[9.0, 1.0, 2.0]]), torch.tensor([[False, True, True]]), 1)
    (tensor([[2]]), tensor([[True]]))
    """
    number = min(number, scores.shape[1] - 1)
    columns = only(scores.detach(), negatives).topk(number, dim=1).indices
    return columns, negatives.gather(1, columns)


def only(scores: Tensor, counts: Tensor) -> Tensor:
    """The scores that count; the others so low that their exponential is 0, yet finite, so that none becomes NaN."""
    return scores.masked_fill(~counts, torch.finfo(scores.dtype).min / 4)

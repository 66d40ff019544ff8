"""How loyal a student is to its teacher: in labels, in probabilities, and in predicted numbers."""

from __future__ import annotations

import math

from torch import Tensor

from limbeck.analysis.fidelity import agreement
from limbeck.core.divergences import jensen_shannon_rows, soften
from limbeck.core.errors import TensorError
from limbeck.core.reduction import check_floating, check_logits, check_same_shape, widen
from limbeck.core.relations import pearson


def label_loyalty(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""Accuracy of the student's classes with the teacher's as labels: :func:`~limbeck.analysis.fidelity.agreement`.

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``.

    Raises:
        TensorError: Shapes or dtypes do not fit.

    Source: Xu et al., Beyond Preserved Accuracy, 2021, arXiv 2109.03228; Avram et al., 2021, arXiv 2112.12650.

    >>> import torch
    >>> label_loyalty(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [3.0, 1.0]]))
    tensor(0.5000)
    """
    return agreement(student_logits, teacher_logits)


def probability_loyalty(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""How near predictions are to the teacher's: 1 where they are the same, 0 where they have no class in common.

    .. math:: \frac 1 n \sum_i 1 - \sqrt{\mathrm{JS}_2(p_{s,i} \,\|\, p_{t,i})}

    with the logarithm to base 2, so that the Jensen-Shannon divergence is never above 1.

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``.

    Raises:
        TensorError: Shapes or dtypes do not fit.

    Source: Xu et al., 2021, arXiv 2109.03228; Avram et al., 2021, arXiv 2112.12650.

    >>> import torch
    >>> probability_loyalty(torch.tensor([[2.0, 0.0]]), torch.tensor([[2.0, 0.0]]))
    tensor(1.)
    """
    check_logits(student_logits, teacher_logits)
    rows = jensen_shannon_rows(soften(teacher_logits), soften(student_logits)) / math.log(2)
    return 1 - rows.clamp(min=0.0, max=1.0).sqrt().mean()


def regression_loyalty(student_scores: Tensor, teacher_scores: Tensor) -> Tensor:
    r"""Pearson's correlation of the student's predicted numbers with the teacher's, from -1 to 1.

    Args:
        student_scores: ``[n]``, or ``[n, P]``, of which the mean over P is told.
        teacher_scores: The same shape.

    Raises:
        TensorError: Shapes or dtypes do not fit, or there are fewer than two samples.

    Source: Avram et al., Distilling the Knowledge of Romanian BERTs Using Multiple Teachers, 2021, arXiv 2112.12650.

    >>> import torch
    >>> regression_loyalty(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 3.0, 4.0]))
    tensor(0.9286)
    """
    check_floating(student_scores, "student_scores")
    check_same_shape(student_scores, teacher_scores, "student_scores", "teacher_scores")
    if len(student_scores) < 2:
        found = list(student_scores.shape)
        raise TensorError("one sample does not correlate", where="student_scores", found=found, wanted="two or more")
    first, second = (widen(x).reshape(len(x), -1).T for x in (student_scores, teacher_scores))
    return pearson(first, second).mean()

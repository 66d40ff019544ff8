"""Why distillation works on a sample: how much a teacher makes it count, and what it says of classes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.divergences import soften
from limbeck.core.labels import class_labels
from limbeck.core.reduction import check_inside, check_logits


def instance_weights(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, weight: float = 0.9) -> Tensor:
    r"""How many times its gradient at the label each sample has by KD, of what it has by labels alone, ``[B]``.

    .. math:: w_i = (1 - \lambda) + \lambda\, \frac{p_y - q_y}{1 - q_y}

    Of :math:`(1 - \lambda) CE(y, q) + \lambda CE(p, q)` at temperature 1: a sample that the teacher is sure of counts
    more. NaN where there is no label.

    Args:
        student_logits: ``[B, C]``, of q.
        teacher_logits: ``[B, C]``, of p.
        labels: ``[B]`` classes, negative where one is not known.
        weight: :math:`\lambda`.

    Raises:
        TensorError: Shapes or labels do not fit.

    Source: Understanding and Improving Knowledge Distillation, arXiv 2002.03532.

    >>> teacher = torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    >>> instance_weights(torch.zeros(2, 2), teacher, torch.tensor([0, 0]), weight=0.5)
    tensor([0.9526, 0.7311])
    """
    check_logits(student_logits, teacher_logits)
    check_inside(weight, "weight", closed=True)
    target, known = class_labels(labels, student_logits.shape[-1], "the weight of a sample", others=True)
    place = target.unsqueeze(-1)
    # What each leaves to the other classes, summed from these: 1 less the label's part has no digits where that is 1.
    left = [soften(z).exp().scatter(-1, place, 0.0).sum(dim=-1) for z in (teacher_logits, student_logits)]
    ratio = 1 - left[0] / left[1].clamp(min=torch.finfo(left[1].dtype).tiny)
    return torch.where(known, 1 - weight + weight * ratio, torch.nan)


def class_cosines(weights: Tensor) -> Tensor:
    """How alike a model's weights for its classes are, ``[C, C]``; it shows groups of classes as blocks.

    Args:
        weights: ``[C, D]`` of its last layer.

    >>> class_cosines(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]))[0]
    tensor([1., 1., 0.])
    """
    rows = F.normalize(weights.float(), dim=1)
    return rows @ rows.T


def teaching_signs(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> dict[str, float]:
    """What shows whether a teacher's knowledge can help on these samples.

    Args:
        student_logits, teacher_logits: ``[B, C]``.
        labels: ``[B]`` classes, negative ones do not count.

    Returns:
        ``weight_spread``, the deviation of :func:`instance_weights` at a weight of 1: near 0 the teacher tells no
        sample from another (too high a temperature, or poor calibration). ``easiness``, the correlation of what teacher
        and student give the label. ``entropy`` of the teacher in nats, and ``tail_entropy``, that of what it says of
        the other classes over its most: near 1 there is nothing in it (a teacher of smoothed labels).

    >>> student, teacher = torch.zeros(2, 3), torch.tensor([[4.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    >>> round(teaching_signs(student, teacher, torch.tensor([0, 0]))["tail_entropy"], 3)
    1.0
    """
    known = labels >= 0
    student_logits, teacher_logits, labels = student_logits[known], teacher_logits[known], labels[known]
    weights = instance_weights(student_logits, teacher_logits, labels, 1.0)
    p, q = soften(teacher_logits).exp(), soften(student_logits).exp()
    place = labels.unsqueeze(-1)
    pair = torch.stack([p.gather(-1, place).squeeze(-1), q.gather(-1, place).squeeze(-1)])
    flat = bool((pair.std(dim=1, correction=0) == 0).any()) or pair.shape[1] < 2
    others = p.scatter(-1, place, 0.0)
    tail = torch.special.entr(others / others.sum(dim=-1, keepdim=True).clamp(min=1e-30)).sum(dim=-1)
    most = torch.tensor(max(2, p.shape[-1] - 1), dtype=tail.dtype).log()
    return {
        "weight_spread": float(weights.std(correction=0)),
        "easiness": 0.0 if flat else float(torch.corrcoef(pair)[0, 1]),
        "entropy": float(torch.special.entr(p).sum(dim=-1).mean()),
        "tail_entropy": float((tail / most).mean()),
    }

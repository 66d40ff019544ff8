"""FitNets: the student's features are regressed on the teacher's (hints)."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.reduction import Reduction, check_floating, check_same_shape, reduce, widen
from limbeck.core.relations import channel_dim


def fitnets_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Half the squared distance of the regressed student feature from the teacher's hint, for each element.

    .. math:: L = \frac 1 2 \cdot \frac 1 n \sum_{i=1}^n \left( r(v_g)_i - u_{h,i} \right)^2

    The student's feature comes already regressed to the teacher's shape. The paper gives the squared norm; its code
    sums over channels and averages over samples and places. Here channels are averaged too, so that the weight need not
    change with the teacher's width; later toolkits do so as well, without the half.

    Args:
        student_feature: ``[B, D]``, tokens ``[B, T, D]`` or maps ``[B, C, *]``: what the regressor gave.
        teacher_feature: The same shape; detached.
        mask: Booleans, True where a place counts: ``[B]``, or ``[B, T]`` for tokens, ``[B, *]`` for maps.
        reduction: ``"mean"`` over places that count, ``"sum"`` over them (of the mean over channels), or ``"none"``:
            ``[B]``, ``[B, T]`` or ``[B, *]``.

    Raises:
        TensorError: Features of different shapes.

    Source:
        Romero et al., "FitNets: Hints for Thin Deep Nets", 2015, arXiv 1412.6550, equation 3.

    Example:
        >>> import torch
        >>> fitnets_loss(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]))
        tensor(1.)
    """
    check_floating(student_feature, "student_feature", least=2)
    check_floating(teacher_feature, "teacher_feature", least=2)
    check_same_shape(teacher_feature, student_feature, "teacher_feature", "student_feature")
    gap = widen(student_feature) - widen(teacher_feature.detach())
    values = 0.5 * gap.square().mean(dim=channel_dim(gap))
    return reduce(values, mask, reduction)

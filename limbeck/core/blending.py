"""How much of the truth and how much of a teacher a target should hold."""

from __future__ import annotations

import torch  # noqa: F401  for the example
from torch import Tensor

from limbeck.core.errors import TensorError


def optimal_weight(labels: Tensor, by_labels: Tensor, by_teacher: Tensor, *, clip: bool = True) -> float:
    r"""The weight of the truth that is best on held-out samples, where predictions are linear in the targets.

    With :math:`u` the prediction of a model fitted to the truth and :math:`w` that of one fitted to the teacher, the
    mixture's is :math:`w + \alpha (u - w)`, and its squared error is least at

    .. math:: \alpha^* = \frac{\langle y - w,\ u - w \rangle}{\lVert u - w \rVert^2}

    For kernel ridge regression this is exact; for a network it is the authors' estimate.

    Args:
        labels: ``[M, ...]`` held-out truth.
        by_labels: :math:`u`, of the same shape.
        by_teacher: :math:`w`, of the same shape.
        clip: Keep it within 0 and 1.

    Raises:
        TensorError: Shapes differ.

    >>> optimal_weight(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.5]), torch.tensor([0.0, 0.5]))
    1.0
    """
    for name, tensor in (("by_labels", by_labels), ("by_teacher", by_teacher)):
        if tensor.shape != labels.shape:
            raise TensorError(
                "predictions do not fit the labels", where=name, found=list(tensor.shape), wanted=list(labels.shape)
            )
    apart = (by_labels - by_teacher).double().flatten()
    size = float(apart @ apart)
    found = float((labels - by_teacher).double().flatten() @ apart) / size if size else 1.0
    return min(max(found, 0.0), 1.0) if clip else found

"""Maps from a student's feature space into the teacher's, sized from one pair of real features."""

from __future__ import annotations

from torch import Tensor, nn

from limbeck.core.errors import TensorError


def projector(student_feature: Tensor, teacher_feature: Tensor, *, bias: bool = True) -> nn.Module:
    """A linear map from the student's channels to the teacher's: 1x1 convolution on maps, linear layer elsewhere.

    Args:
        student_feature: ``[B, C_s, H, W]``, ``[B, N, D_s]`` or ``[B, D_s]``.
        teacher_feature: The same kind of feature, with its own width.
        bias: Add a bias.

    Raises:
        TensorError: The two are not the same kind of feature.

    >>> import torch
    >>> projector(torch.zeros(2, 8, 4, 4), torch.zeros(2, 32, 4, 4))
    Conv2d(8, 32, kernel_size=(1, 1), stride=(1, 1))
    """
    if student_feature.ndim != teacher_feature.ndim or student_feature.ndim not in (2, 3, 4):
        raise TensorError(
            "no projector leads from this feature to that",
            where="student_feature",
            found=f"{list(student_feature.shape)} to {list(teacher_feature.shape)}",
            wanted="two maps [B, C, H, W], two token rows [B, N, D] or two vectors [B, D]",
        )
    if student_feature.ndim == 4:
        return nn.Conv2d(student_feature.shape[1], teacher_feature.shape[1], 1, bias=bias).to(student_feature.device)
    return nn.Linear(student_feature.shape[-1], teacher_feature.shape[-1], bias=bias).to(student_feature.device)

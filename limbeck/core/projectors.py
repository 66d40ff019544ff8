"""Maps from a student's feature space into the teacher's, sized from one pair of real features."""

from __future__ import annotations

from torch import Tensor, nn

from limbeck.core.errors import TensorError
from limbeck.core.reduction import check_floating


class LinearProjector(nn.Linear):
    """A linear layer that takes features of any precision and computes in its own; what does not fit is named."""

    def forward(self, input: Tensor) -> Tensor:
        _check(input, 2, -1, self.in_features)
        return super().forward(input.to(self.weight.dtype))


class ConvProjector(nn.Conv2d):
    """A convolution that takes maps of any precision and computes in its own; what does not fit is named."""

    def forward(self, input: Tensor) -> Tensor:
        _check(input, 4, 1, self.in_channels)
        return super().forward(input.to(self.weight.dtype))


def _check(feature: Tensor, least: int, dim: int, width: int) -> None:
    check_floating(feature, "student_feature", least)
    if feature.shape[dim] != width:
        raise TensorError(
            "another width than in the dry run",
            where="student_feature",
            found=list(feature.shape),
            wanted=f"{width} channels",
        )


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
    ConvProjector(8, 32, kernel_size=(1, 1), stride=(1, 1))
    """
    if student_feature.ndim != teacher_feature.ndim or student_feature.ndim not in (2, 3, 4):
        raise TensorError(
            "no projector leads from this feature to that",
            where="student_feature",
            found=f"{list(student_feature.shape)} to {list(teacher_feature.shape)}",
            wanted="two maps [B, C, H, W], two token rows [B, N, D] or two vectors [B, D]",
        )
    layer: nn.Module
    if student_feature.ndim == 4:
        layer = ConvProjector(student_feature.shape[1], teacher_feature.shape[1], 1, bias=bias)
    else:
        layer = LinearProjector(student_feature.shape[-1], teacher_feature.shape[-1], bias=bias)
    return layer.to(student_feature.device)


def connector(student_feature: Tensor, teacher_feature: Tensor) -> nn.Module:
    """A 1x1 convolution without bias and batch normalisation, from one map's channels to the other's.

    Started as in the code of AB and OFD: normal with variance 2 / (teacher's channels). It serves training alone, so
    the normalisation keeps no running statistics.

    Args:
        student_feature: ``[B, C_s, H, W]``.
        teacher_feature: ``[B, C_t, *]``.

    >>> import torch
    >>> connector(torch.zeros(2, 8, 4, 4), torch.zeros(2, 32, 4, 4))(torch.zeros(2, 8, 4, 4)).shape
    torch.Size([2, 32, 4, 4])
    """
    check_floating(student_feature, "student_feature", least=4)
    width = teacher_feature.shape[1]
    layer = ConvProjector(student_feature.shape[1], width, 1, bias=False)
    nn.init.normal_(layer.weight, std=(2 / width) ** 0.5)
    return nn.Sequential(layer, nn.BatchNorm2d(width, track_running_stats=False)).to(student_feature.device)

"""What FitNets' two stages are made of: the first one's regressor, the second one's falling weight of the teacher."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from limbeck.core.projectors import projector
from limbeck.core.schedules import Schedule


def regressor(student_feature: Tensor, teacher_feature: Tensor, relu: bool = False) -> nn.Module:
    """The map from the student's guided layer to the shape of the hint.

    For maps, a convolution without padding whose kernel takes up the difference in size, so that each hint is told from
    where the student looks, with few weights; where the student's map is the smaller, the hint is pooled instead. For
    tokens and vectors, a linear map. Nothing is learned between equal shapes.

    Args:
        student_feature, teacher_feature: One example of each, ``[B, D]``, ``[B, T, D]`` or ``[B, C, H, W]``.
        relu: End with the nonlinearity of a hint that is not negative.

    >>> import torch
    >>> regressor(torch.zeros(1, 8, 10, 10), torch.zeros(1, 32, 8, 8))
    Conv2d(8, 32, kernel_size=(3, 3), stride=(1, 1))
    >>> regressor(torch.zeros(1, 8, 4, 4), torch.zeros(1, 8, 4, 4))
    Identity()
    """
    if student_feature.shape == teacher_feature.shape:
        return nn.Identity()
    if student_feature.ndim == teacher_feature.ndim == 4:
        sizes = zip(student_feature.shape[2:], teacher_feature.shape[2:], strict=True)
        kernel = tuple(max(s - t, 0) + 1 for s, t in sizes)
        widths = student_feature.shape[1], teacher_feature.shape[1]
        layer: nn.Module = nn.Conv2d(*widths, kernel).to(student_feature.device)  # type: ignore[arg-type]
    else:
        layer = projector(student_feature, teacher_feature)
    return nn.Sequential(layer, nn.ReLU()) if relu else layer


@dataclass(frozen=True)
class TeacherDecay(Schedule):
    r"""The weight of the teacher in FitNets' second stage: ``start``, falling on a straight line to ``end``.

    .. math:: \lambda(e) = \mathrm{start} - (\mathrm{start} - \mathrm{end})
        \frac{e - \mathrm{begin} + 1}{\mathrm{saturate} - \mathrm{begin} + 1}
        \quad \text{for } \mathrm{begin} \le e < \mathrm{saturate}, \qquad e = \mathrm{epochs} \cdot \mathrm{progress}

    Defaults are those of the authors' CIFAR-10 run.

    >>> schedule = TeacherDecay(epochs=500)
    >>> [round(float(schedule(epoch / 500)), 4) for epoch in (0, 4, 5, 202, 400, 500)]
    [4.0, 4.0, 3.9924, 2.5, 1.0, 1.0]
    """

    start: float = 4.0
    end: float = 1.0
    begin: float = 5.0
    saturate: float = 400.0
    epochs: float = 500.0

    def at(self, progress: Tensor) -> Tensor:
        passed = (progress * self.epochs - self.begin + 1) / (self.saturate - self.begin + 1)
        return self.start - (self.start - self.end) * passed.clamp(0.0, 1.0)

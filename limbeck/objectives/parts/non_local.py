"""Non-local blocks: every place of a map sees every other."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.projectors import ConvProjector, LinearProjector


class NonLocal(nn.Module):
    r"""A residual block over all places, its pairwise function a dot product.

    .. math:: y_i = x_i + W \left( \frac 1 N \sum_j (\theta x_i)^\top (\phi x_j) \, g x_j \right)

    W ends with batch normalisation that starts at 0, so that the block starts as the identity. It serves training
    alone, so the normalisation keeps no running statistics.

    Args:
        channels: Of the map.
        reduction: The inner width is the channels over this.
        pool: Keys and values are pooled by this, which saves work on large maps; 1 pools nothing.

    Source: Wang et al., "Non-local Neural Networks", 2018, arXiv 1711.07971.

    >>> import torch
    >>> NonLocal(4)(torch.ones(1, 4, 2, 2)).sum()
    tensor(16., grad_fn=<SumBackward0>)
    """

    def __init__(self, channels: int, reduction: int = 2, pool: int = 1) -> None:
        super().__init__()
        inner, self.pool = max(channels // reduction, 1), pool
        self.theta, self.phi, self.g = (ConvProjector(channels, inner, 1) for _ in range(3))
        for layer in (self.theta, self.phi, self.g):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # it has one
        norm = nn.BatchNorm2d(channels, track_running_stats=False)
        nn.init.zeros_(norm.weight)
        self.out = nn.Sequential(nn.Conv2d(inner, channels, 1, bias=False), norm)

    def forward(self, feature: Tensor) -> Tensor:
        queries, keys, values = self.theta(feature), self.phi(feature), self.g(feature)
        if self.pool > 1:
            step = min(self.pool, *feature.shape[2:])
            keys, values = F.max_pool2d(keys, step), F.max_pool2d(values, step)
        keys, values = keys.flatten(2), values.flatten(2)
        # (q k) v = q (k v): no map of all places against all others is needed, since nothing stands between.
        seen = values @ keys.transpose(1, 2) @ queries.flatten(2) / keys.shape[2]
        return feature.to(queries.dtype) + self.out(seen.reshape(queries.shape))


class RelationHeads(nn.Module):
    """What FBKD learns beside a layer of the student: adaptations to the teacher's width, and two non-local blocks.

    Args:
        student_width, teacher_width: Channels of both layers.
        pool: Of the blocks.
    """

    def __init__(self, student_width: int, teacher_width: int, pool: int = 1) -> None:
        super().__init__()
        self.adapt = ConvProjector(student_width, teacher_width, 1)
        self.channels = LinearProjector(student_width, teacher_width)
        self.places = ConvProjector(1, 1, 3, 1, 1)
        self.student, self.teacher = NonLocal(student_width, pool=pool), NonLocal(teacher_width, pool=pool)
        self.relate = ConvProjector(student_width, teacher_width, 1)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Adapted feature, adapted means over places and over channels, adapted relation; the teacher's relation."""
        channels, places = self.channels(student.mean(dim=(2, 3))), self.places(student.mean(dim=1, keepdim=True))
        return self.adapt(student), channels, places, self.relate(self.student(student)), self.teacher(teacher)

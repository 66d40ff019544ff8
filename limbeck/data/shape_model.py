"""Shapes as a mean and a few directions in which they vary: smoother targets for a teacher of landmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.core.reduction import check_floating, check_inside


@dataclass(frozen=True)
class ShapeModel:
    r"""An active shape model: principal components of shapes ``[N, P]``, each shape a row of coordinates.

    .. math:: \tilde g = m + A\, b, \qquad b = A^\top (g - m), \qquad |b_k| \le 3 \sqrt{\lambda_k}

    A tolerant teacher (``kd_loss_landmark``) is trained on :math:`\tilde g`, the soft landmarks: the fewer components,
    the smoother and the easier to learn.

    Args:
        mean: ``[P]``.
        components: ``[K, P]``, orthonormal rows.
        deviations: ``[K]``, the standard deviation of shapes along each.

    Source:
        Cootes et al., "Active Shape Models", 1995; used for soft landmarks by Fard and Mahoor, 2021, arXiv 2111.07047.

    Example:
        >>> points = torch.tensor([[0.0, 0.0], [1.0, 1.1], [2.0, 1.9], [3.0, 3.0]])
        >>> shapes = ShapeModel.fit(points, variance=0.9)
        >>> shapes.soften(points)[1]
        tensor([1.0454, 1.0537])
    """

    mean: Tensor
    components: Tensor
    deviations: Tensor

    @classmethod
    def fit(cls, landmarks: Tensor, variance: float = 0.9) -> ShapeModel:
        """The components that hold so much of the variance of training shapes; 0.9 to 0.97 in the paper.

        Raises:
            TensorError: No floating ``[N, P]``.
            ConfigError: A share outside 0 to 1.
        """
        check_floating(landmarks, "landmarks", least=2)
        check_inside(variance, "variance")
        rows = landmarks.flatten(1).double()
        mean = rows.mean(dim=0)
        _, spread, components = torch.linalg.svd(rows - mean, full_matrices=False)
        held = (spread.square().cumsum(0) / spread.square().sum().clamp(min=1e-300)).lt(variance).sum() + 1
        deviations = spread / max(len(rows) - 1, 1) ** 0.5
        return cls(*(part.to(landmarks) for part in (mean, components[:held], deviations[:held])))

    def soften(self, landmarks: Tensor, limit: float = 3.0) -> Tensor:
        """Shapes ``[N, P]`` as the model can say them, no further from the mean than so many standard deviations."""
        centred = landmarks.flatten(1) - self.mean
        most = limit * self.deviations
        weights = (centred @ self.components.T).clamp(-most, most)
        return (self.mean + weights @ self.components).view_as(landmarks)

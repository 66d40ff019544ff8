r"""Iterated self-distillation with ground-truth targets, where everything is known: kernel ridge regression.

Step :math:`\tau` fits the targets :math:`\alpha_\tau y + (1 - \alpha_\tau) y^{(\tau-1)}`, a mixture of the truth and of
what the step before predicted on the same samples, and :math:`y^{(0)} = y`. With :math:`K = V D V^T` every step's
prediction is :math:`y^{(\tau)} = V B^{(\tau)} V^T y` with a diagonal :math:`B^{(\tau)}`.

Source: Borup and Andersen, "Even your Teacher Needs Guidance: Ground-Truth Targets Dampen Regularization Imposed by
Self-Distillation", 2021, arXiv 2102.13088; the authors' repository is Kennethborup/self_distillation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from limbeck.core.blending import optimal_weight
from limbeck.core.errors import TensorError
from limbeck.core.reduction import check_inside, check_positive


def shrinkage(eigenvalues: Tensor, ridge: float, weights: Sequence[float]) -> Tensor:
    r"""The diagonals :math:`B^{(1)} \dots B^{(\tau)}`, by how much each direction of the data is kept.

    .. math:: A = \frac{d}{d + \lambda}, \qquad B^{(1)} = A, \qquad
        B^{(\tau)} = A\, (\alpha_\tau + (1 - \alpha_\tau)\, B^{(\tau-1)})

    Args:
        eigenvalues: ``[N]`` of the kernel matrix, not negative.
        ridge: :math:`\lambda > 0`.
        weights: :math:`\alpha_2, \alpha_3, \dots` of the steps after the first.

    Returns:
        ``[1 + len(weights), N]``.

    >>> shrinkage(torch.tensor([3.0, 1.0]), 1.0, [0.0])
    tensor([[0.7500, 0.5000],
            [0.5625, 0.2500]])
    """
    check_positive(ridge, "ridge")
    kept = eigenvalues / (eigenvalues + ridge)
    steps = [kept]
    for weight in weights:
        check_inside(weight, "weights", closed=True)
        steps.append(kept * (weight + (1 - weight) * steps[-1]))
    return torch.stack(steps)


def limit(eigenvalues: Tensor, ridge: float, weight: float) -> Tensor:
    r"""Where endlessly many steps of one weight lead: one plain fit with the ridge :math:`\lambda / \alpha`.

    .. math:: B^{(\infty)} = \frac{d}{d + \lambda / \alpha}

    With a weight of 0 nothing is left.

    >>> limit(torch.tensor([3.0]), 1.0, 0.5)
    tensor([0.6000])
    """
    check_positive(ridge, "ridge")
    check_inside(weight, "weight", closed=True)
    return torch.zeros_like(eigenvalues) if weight == 0 else eigenvalues / (eigenvalues + ridge / weight)


class KernelSelfDistillation:
    r"""Kernel ridge regression, distilled into itself.

    Args:
        kernel: ``[N, N]`` between the training samples.
        labels: ``[N]`` or ``[N, C]``.
        ridge: :math:`\lambda`.

    Raises:
        TensorError: The kernel is not symmetric, or does not fit the labels.

    Example:
        >>> x = torch.linspace(0, 1, 5, dtype=torch.float64)
        >>> model = KernelSelfDistillation(torch.exp(-(x[:, None] - x) ** 2), x.sin(), ridge=0.1)
        >>> model.step(0.5).fitted.shape, len(model.weights)
        (torch.Size([5]), 1)
    """

    def __init__(self, kernel: Tensor, labels: Tensor, ridge: float) -> None:
        check_positive(ridge, "ridge")
        size = len(labels)
        if kernel.shape != (size, size) or not torch.allclose(kernel, kernel.T):
            raise TensorError(
                "not a kernel matrix of these labels",
                where="kernel",
                found=list(kernel.shape),
                wanted=f"[{size}, {size}], symmetric",
            )
        self.kernel, self.labels, self.ridge = kernel, labels, ridge
        self.weights: list[float] = []  # of the steps after the first
        values, self.vectors = torch.linalg.eigh(kernel)
        self.eigenvalues = values.clamp(min=0)
        self.duals = self._solve(labels)

    @property
    def fitted(self) -> Tensor:
        """What the present step predicts on the training samples."""
        return self.kernel @ self.duals

    def _solve(self, targets: Tensor) -> Tensor:
        rotated = self.vectors.T @ targets
        scale = (self.eigenvalues + self.ridge).reshape(-1, *[1] * (targets.ndim - 1))
        return self.vectors @ (rotated / scale)

    def predict(self, cross: Tensor, targets: Tensor | None = None) -> Tensor:
        """Predictions ``[M, ...]`` for samples by their kernel ``[M, N]`` with the training samples.

        Args:
            cross: The kernel.
            targets: Of a plain fit to these; default the present step.
        """
        return cross @ (self.duals if targets is None else self._solve(targets))

    def best_weight(self, cross: Tensor, labels: Tensor, *, clip: bool = True) -> float:
        """The weight with which the next step does best on held-out samples; see ``core.blending.optimal_weight``."""
        by_labels, by_teacher = self.predict(cross, self.labels), self.predict(cross, self.fitted)
        return optimal_weight(labels, by_labels, by_teacher, clip=clip)

    def step(self, weight: float) -> KernelSelfDistillation:
        """One step more: fit a mixture of the truth and of the present prediction."""
        check_inside(weight, "weight", closed=True)
        self.duals = self._solve(weight * self.labels + (1 - weight) * self.fitted)
        self.weights.append(weight)
        return self

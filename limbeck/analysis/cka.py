"""Centred kernel alignment: which layers of two models see the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from limbeck.core.errors import DataError, TensorError
from limbeck.core.reduction import widen


def linear_cka(first: Tensor, second: Tensor) -> Tensor:
    r"""Similarity of two representations of the same samples, unbiased by their number.

    .. math::

        \mathrm{CKA} = \frac{\mathrm{HSIC}_1(K, L)}{\sqrt{\mathrm{HSIC}_1(K, K)\,\mathrm{HSIC}_1(L, L)}},
        \quad K = X X^\top,\ L = Y Y^\top

        \mathrm{HSIC}_1(K, L) = \frac{1}{n (n - 3)} \left[ \mathrm{tr}(\tilde K \tilde L)
        + \frac{1^\top \tilde K 1\, 1^\top \tilde L 1}{(n - 1)(n - 2)}
        - \frac{2}{n - 2} 1^\top \tilde K \tilde L 1 \right]

    with the diagonals of :math:`\tilde K, \tilde L` set to zero. 1 for representations equal up to rotation, one scale
    and a shift; near 0 (it may fall below) for unrelated ones.

    Args:
        first: ``[n, *]``, at least four samples; trailing dimensions are flattened.
        second: ``[n, *]``.

    Returns:
        A number in float64; NaN where one representation is constant.

    Raises:
        TensorError: Different or too few samples.

    Source: Kornblith et al., 2019, arXiv 1905.00414; unbiased as in Nguyen et al., 2020, arXiv 2010.15327.
    >>> features = torch.tensor([[0.0, 1.0], [2.0, 0.0], [3.0, 1.0], [1.0, 5.0], [0.0, 2.0]])
    >>> round(float(linear_cka(features, 3 * features.flip(1) + 1)), 6)
    1.0
    """
    measure = CKA()
    measure.update([first], [second])
    return measure.compute()[0, 0]


class CKA:
    r"""Linear CKA of every pair of layers, over minibatches.

    The three sums :math:`\mathrm{HSIC}_1` are averaged over minibatches (weighted by their samples) before the quotient
    is taken. Each is unbiased, so the result does not depend on the size of a minibatch, and one minibatch's Gram
    matrices are all that is held.

    Source: Nguyen et al., 2020, arXiv 2010.15327.
    Example:
        >>> measure = CKA()
        >>> layers = [torch.randn(8, 3), torch.randn(8, 4, 2, 2)]
        >>> measure.update(layers, layers)
        >>> measure.compute().shape
        torch.Size([2, 2])
    """

    def __init__(self) -> None:
        self.samples = 0
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    def update(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """Add one minibatch: the layers of the one model and those of the other, each ``[n, *]``."""
        sizes = {len(t) for t in (*first, *second)}
        if len(sizes) != 1:
            raise TensorError("layers must show the same samples", where="features", found=f"{sorted(sizes)} samples")
        (n,) = sizes
        if n < 4:
            raise TensorError("HSIC needs at least four samples", where="features", found=n)
        K, L = _Grams(first), _Grams(second)
        parts = (K.hsic(L), K.own_hsic(), L.own_hsic())
        if self._sums is None:
            self._sums = (torch.zeros_like(parts[0]), torch.zeros_like(parts[1]), torch.zeros_like(parts[2]))
        for total, part in zip(self._sums, parts, strict=True):
            total += n * part
        self.samples += n

    def compute(self) -> Tensor:
        """``[layers of the first, layers of the second]`` in float64; NaN where a layer is constant."""
        if self._sums is None:
            raise DataError("no minibatch was added", where="cka")
        cross, first, second = self._sums
        # Roots of each, not of the product: two negative estimates (of layers that are all but constant) give NaN.
        return cross / (first.sqrt()[:, None] * second.sqrt())


class _Grams:
    """Gram matrices of some layers without their diagonals, and the sums HSIC needs of them."""

    def __init__(self, layers: Sequence[Tensor]) -> None:
        grams = torch.stack([_gram(layer) for layer in layers])
        self.n = grams.shape[-1]
        self.flat = grams.flatten(1)
        self.rows = grams.sum(-1)
        self.total = self.rows.sum(-1)

    def hsic(self, other: _Grams) -> Tensor:
        return self._combine(self.flat @ other.flat.T, self.total[:, None] * other.total, self.rows @ other.rows.T)

    def own_hsic(self) -> Tensor:
        return self._combine(self.flat.square().sum(-1), self.total.square(), self.rows.square().sum(-1))

    def _combine(self, trace: Tensor, totals: Tensor, rows: Tensor) -> Tensor:
        n = self.n
        return (trace + totals / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)) / (n * (n - 3))


def _gram(features: Tensor) -> Tensor:
    features = widen(features.detach().flatten(1))
    # HSIC does not see a shift; taking it out keeps the digits of float32. What is left of a constant is rounding.
    rounding = 8 * torch.finfo(features.dtype).eps * features.abs().max()
    centred = features - features.mean(0)
    centred = torch.where(centred.abs().max() > rounding, centred, 0.0)
    return (centred @ centred.T).fill_diagonal_(0).cpu().double()

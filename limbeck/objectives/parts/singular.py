"""Singular vectors that can be learned from."""

from __future__ import annotations

import torch
from torch import Tensor


def right_vectors(x: Tensor, number: int) -> tuple[Tensor, Tensor]:
    r"""The first right singular vectors ``[B, C, n]``, and the values ``[B, n]`` over the largest entry, cut off.

    The gradient of the vectors is that of perturbation theory,

    .. math:: d v_j = \sum_{i \ne j} \frac{v_i^\top \, d(x^\top x) \, v_j}{\sigma_j^2 - \sigma_i^2} v_i,

    built by hand: torch's own is not finite where any two singular values are equal. Here terms of (nearly) equal
    values are left out, and vectors of singular values that are (nearly) 0, which have no direction, are 0.

    Args:
        x: ``[B, N, C]`` matrices.
        number: n; fewer are given where there are fewer.

    >>> v, sigma = right_vectors(torch.tensor([[[3.0, 0.0], [0.0, 1.0]]]), 1)
    >>> v.abs(), sigma
    (tensor([[[1.],
             [0.]]]), tensor([[1.]]))
    """
    largest = x.detach().abs().amax(dim=(1, 2), keepdim=True)
    x = x / torch.where(largest == 0, 1.0, largest)  # the directions do not depend on it, the digits of the squares do
    with torch.no_grad():
        squares, every = _eigen(x)
        first, own, least = every[..., :number], squares[:, :number], torch.finfo(x.dtype).eps * squares[:, :1]
        gap = own.unsqueeze(1) - squares.unsqueeze(2)
        within = torch.where(gap.abs() > 1e3 * least.unsqueeze(1), 1 / gap, 0.0)
        outside = torch.where(own > 1e3 * least, 1 / own, 0.0).unsqueeze(1)
    pulled = x.transpose(1, 2) @ (x @ first)
    shares = every.transpose(1, 2) @ pulled
    change = every @ (within * shares) + (pulled - every @ shares) * outside
    found = (first + (change - change.detach())) * (own > least).unsqueeze(1)
    return found, own.sqrt()


def _eigen(x: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values ``[B, n]``, falling, and right singular vectors ``[B, C, n]``, n the shorter side.

    From the Gram matrix of the shorter side in double precision: two to five times as fast as the decomposition.
    """
    x64 = x.double()
    wide = x.shape[1] < x.shape[2]
    squares, basis = torch.linalg.eigh(x64 @ x64.transpose(1, 2) if wide else x64.transpose(1, 2) @ x64)
    squares, basis = squares.flip(1).clamp(min=0), basis.flip(2)
    if wide:  # left vectors: the right ones are their images, or 0 where there are none
        length = squares.sqrt().unsqueeze(1)
        basis = x64.transpose(1, 2) @ basis / length.masked_fill(length == 0, 1.0)
    return squares.to(x.dtype), basis.to(x.dtype)

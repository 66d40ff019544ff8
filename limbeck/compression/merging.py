"""Two models of one shape as one: along the arc between their weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from limbeck.core.errors import TensorError
from limbeck.core.reduction import check_inside, check_same_shape

_FLAT = 1e-6  # a sine below which the arc is a line


def slerp(first: Tensor, second: Tensor, t: float = 0.5) -> Tensor:
    r"""Spherical interpolation of two tensors, taken as vectors.

    .. math:: \omega = \arccos \frac{\langle a, b \rangle}{\|a\| \|b\|}, \qquad
        \frac{\sin((1 - t) \omega)}{\sin \omega} a + \frac{\sin(t \omega)}{\sin \omega} b

    Linear where the two are nearly parallel or opposite, or one is zero.

    Args:
        first, second: Of one shape.
        t: 0 gives the first, 1 the second.

    Source: Shoemake, Animating Rotation with Quaternion Curves, 1985; per tensor as in merges of language models.

    >>> slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    tensor([0.7071, 0.7071])
    """
    check_same_shape(first, second, "first", "second")
    check_inside(t, "t", closed=True)
    a, b = first.detach().double().flatten(), second.detach().double().flatten()
    lengths = a.norm() * b.norm()
    cosine = (a @ b / lengths.clamp(min=torch.finfo(torch.double).tiny)).clamp(-1, 1)
    angle = cosine.acos()
    sine = angle.sin()
    if float(sine) < _FLAT or not float(lengths):
        found = (1 - t) * a + t * b
    else:
        found = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / sine
    return found.view_as(first).to(first.dtype)


def slerp_merge(first: Mapping[str, Tensor], second: Mapping[str, Tensor], t: float = 0.5) -> dict[str, Tensor]:
    """Two state dicts as one, by :func:`slerp` of each pair of tensors; whole numbers are the first's.

    Args:
        first, second: Of models of one shape, such as two that were tuned on different texts.
        t: See :func:`slerp`.

    Raises:
        TensorError: Names or shapes differ.

    Source: Self-Data Distillation for Recovering Quality in Pruned Large Language Models, arXiv 2410.09982.

    >>> a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    >>> torch.equal(slerp_merge(a.state_dict(), b.state_dict(), 0.0)["bias"], a.bias)
    True
    """
    other = sorted(first.keys() ^ second.keys())
    if other:
        found = "only in the first" if other[0] in first else "only in the second"
        raise TensorError("the two models have other tensors", where=other[0], found=found, wanted="one shape")
    return {
        name: slerp(tensor, second[name], t) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in first.items()
    }

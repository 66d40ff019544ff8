r"""Distances below a row's largest log-probability in a few bits each, by levels that lie where errors count.

A row's values are :math:`g_i = \max_j l_j - l_i`, from 0 to the widest, w, which is stored in half precision. Levels
are equally far apart in

.. math:: y = e^{-a g}, \qquad a = \frac{1}{3 T}

between :math:`e^{-a w}` and 1, both included, and each value goes to the nearest.

Why: an error :math:`e_i` of a log-probability costs about :math:`\frac{1}{2} \sum_i p_i e_i^2` nats of divergence, and
the best density of levels is the cube root of what a value's error costs times how dense the values lie (Panter and
Dite, 1951). Were the values spread evenly, that is :math:`p^{1/3}`; read at a temperature T the cost goes as
:math:`p^{1/T}`, and the density as :math:`p^{1/3T}`. The tail of a language model's prediction is denser the less
probable it is (in a Zipf law exactly so that all values' shares are equal), which asks for a smaller exponent too.
``benchmarks/cache_codecs.py`` compares them. A value comes back as its level; the mean of what goes to a level instead,
told from the same logits, took off 1 to 4 % of the divergence on language models' and up to 11 % on images': not worth
a table.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_FARTHEST = torch.finfo(torch.float16).max


def as_half(values: Tensor) -> Tensor:
    """Half precision; what is finite stays finite.

    >>> as_half(torch.tensor([1e6, -math.inf]))
    tensor([65504.,   -inf], dtype=torch.float16)
    """
    return torch.where(values.isfinite(), values.clamp(-_FARTHEST, _FARTHEST), values).half()


def to_levels(gaps: Tensor, bits: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Numbers of levels ``[P, k]`` below ``2**bits``, and the widest gap ``[P]`` of each row in half precision.

    An infinite gap (a probability of zero) takes level 0 in its row; the other levels are then spread over the finite
    gaps, and a minus before the widest gap says so.

    Args:
        gaps: ``[P, k]`` from 0 upwards, at least one finite in each row.
        bits: Of a level.
        temperature: :math:`T`.
    """
    ruled_out = gaps == math.inf
    some = ruled_out.any(dim=1, keepdim=True)
    widest = as_half(gaps.masked_fill(ruled_out, 0.0).amax(dim=1, keepdim=True))
    bottom = torch.expm1(widest.to(gaps.dtype) / (-3 * temperature))
    bottom = bottom.masked_fill(bottom == 0, -1.0)  # all values are equal, whatever their levels
    height = 1 - torch.expm1(gaps / (-3 * temperature)) / bottom  # 0 at the widest gap, 1 at none
    steps = (1 << bits) - 1 - some.int()
    level = (height.clamp(min=0) * steps).round().int() + some
    return level.masked_fill(ruled_out, 0), torch.where(some, -widest, widest).squeeze(1)


def from_levels(levels: Tensor, widest: Tensor, bits: int, temperature: float) -> Tensor:
    """Minus the gaps, ``[P, k]`` float32: 0 where a row is largest, minus infinity for what it rules out.

    >>> levels, widest = to_levels(torch.tensor([[0.0, 2.0, 5.0, math.inf]]), bits=6, temperature=1.0)
    >>> from_levels(levels, widest, bits=6, temperature=1.0)
    tensor([[-0.0000, -1.9853, -5.0000,    -inf]])
    """
    widest = widest.unsqueeze(1)
    some = torch.signbit(widest)
    level = levels - some.int()
    depth = 1 - level / ((1 << bits) - 1 - some.int())
    widest = widest.float().abs()
    value = torch.log1p(torch.expm1(widest / (-3 * temperature)) * depth) * (3 * temperature)
    value = torch.where(level == 0, -widest, value)  # there the logarithm would have no digits left
    return value.masked_fill(level < 0, -math.inf)

"""Random numbers by counting: every draw is a hash of what it is for.

A draw is a pure function of its counters, such as (seed, epoch, sample, transform, draw), and of nothing else. No
generator has a state, so no draw depends on batch composition, order, ranks, workers or what was drawn before.

The hash is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014): a Weyl
sequence through a 64-bit finaliser. All of it is wrap-around int64 arithmetic, exact on every device, and the floats
made from it have 24 bits, which float32 holds exactly: CPU and CUDA give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


_GAMMA_S, _FIRST_S, _SECOND_S = _signed(_GAMMA), _signed(_FIRST), _signed(_SECOND)


def key(*counters: int) -> int:
    """Hash any number of integers into one 64-bit key; their order counts.

    >>> key(0, 1) != key(1, 0)
    True
    """
    state = 0
    for counter in counters:
        state = (state ^ (counter & _MASK)) + _GAMMA & _MASK
        state = (state ^ state >> 30) * _FIRST & _MASK
        state = (state ^ state >> 27) * _SECOND & _MASK
        state ^= state >> 31
    return state


def key_tensor(keys: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Keys as :func:`draw_bits` takes them."""
    return torch.tensor([_signed(k) for k in keys], dtype=torch.long, device=device)


def draw_bits(keys: Tensor, index: Tensor) -> Tensor:
    """64 random bits for each sample and key: samples count along a Weyl sequence, which each key starts elsewhere.

    Args:
        keys: ``[D]`` from :func:`key_tensor`, one for each draw.
        index: ``[*]`` integers, the samples.

    Returns:
        ``[*, D]`` int64, all 64 bits random.
    """
    state = index.long().unsqueeze(-1) * _GAMMA_S + keys
    state = (state ^ _shift(state, 30)) * _FIRST_S
    state = (state ^ _shift(state, 27)) * _SECOND_S
    return state ^ _shift(state, 31)


def uniform(bits: Tensor) -> Tensor:
    """Random bits as float32 in [0, 1), with 24 bits."""
    return _shift(bits, 40).float() * 2.0**-24


def below(bits: Tensor, limit: int | Tensor) -> Tensor:
    """Random bits as integers in ``0 .. limit - 1``, each as likely as the others but for ``limit / 2**32``."""
    return _shift(bits, 32) * limit >> 32


def _shift(bits: Tensor, count: int) -> Tensor:
    """Shift right, zeros moving in: torch's own shift of int64 keeps the sign."""
    return bits >> count & (1 << 64 - count) - 1

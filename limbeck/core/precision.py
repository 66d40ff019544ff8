"""The precision a loss or measure is computed in: float32 at least, also under autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def upcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in one floating dtype: the widest among them, and float32 at least.

    >>> [t.dtype for t in upcast(torch.ones(1, dtype=torch.half), torch.ones(1, dtype=torch.bfloat16))]
    [torch.float32, torch.float32]
    """
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
    return tuple(t.to(dtype) for t in tensors)


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Run a loss that multiplies matrices outside autocast, which would round its factors to half precision."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next((a.device.type for a in args if isinstance(a, Tensor)), "cpu")
        if not torch.amp.is_autocast_available(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run

"""What a model costs: parameters, floating-point operations, time."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from limbeck.core.errors import ModelError
from limbeck.core.survey import call_model, dry


def parameters(model: nn.Module, *, trainable: bool = False) -> int:
    """Number of parameters, shared ones counted once.

    Args:
        model: Which model.
        trainable: Count only those that ask for a gradient.

    Example:
        >>> parameters(nn.Linear(4, 3))
        15
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def flops(model: nn.Module, inputs: Any) -> int:
    """Floating-point operations of one forward in evaluation mode: two for each multiply-add of matrix products,
    convolutions and attention; what is done element by element is not counted.

    Args:
        model: Which model; its modes are as before afterwards.
        inputs: What it takes: a tensor, a tuple of arguments or a dict of keywords. The usual
            figure is that of a batch of one.

    Example:
        >>> flops(nn.Linear(4, 3), torch.zeros(1, 4))
        24
    """
    with dry(model), FlopCounterMode(display=False) as counter:
        call_model(model, inputs)
    return counter.get_total_flops()


def latency(model: nn.Module, inputs: Any, repeats: int = 20, warmup: int = 3) -> float:
    """Median time of one forward in evaluation mode, in milliseconds, on the device where model and inputs are.

    Args:
        model: Which model; its modes are as before afterwards.
        inputs: What it takes: a tensor, a tuple of arguments or a dict of keywords.
        repeats: Timed calls.
        warmup: Calls before them.

    Raises:
        ModelError: No timed call asked for.

    Example:
        >>> latency(nn.Linear(4, 3), torch.zeros(1, 4), repeats=3) > 0
        True
    """
    if repeats < 1:
        raise ModelError("at least one call must be timed", where="repeats", found=repeats)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    times = []
    with dry(model):
        for i in range(warmup + repeats):
            _wait(device)
            start = time.perf_counter()
            call_model(model, inputs)
            _wait(device)
            if i >= warmup:
                times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def _wait(device: torch.device) -> None:
    """Accelerators answer before they are done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)

"""Running a module without training it: gradient flows through its weights to what it is given, never into them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from limbeck.core.survey import elements


def run_frozen(module: nn.Module, feature: Tensor, **given: Any) -> Tensor:
    """What a module makes of a feature, in the feature's precision; its parameters collect no gradient.

    Args:
        module: Any module; the first value it returns counts.
        feature: Its first argument.
        given: Its other arguments.

    >>> import torch
    >>> layer, x = nn.Linear(2, 1), torch.ones(1, 2, requires_grad=True)
    >>> run_frozen(layer, x).sum().backward()
    >>> layer.weight.grad is None, torch.equal(x.grad, layer.weight)
    (True, True)
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    held = {name: (t.to(feature.dtype) if t.is_floating_point() else t).detach() for name, t in tensors}
    return elements(functional_call(module, held, (feature,), given))[0]

"""Running a module without training it: gradient flows through its weights to what it is given, never into them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from limbeck.core.errors import ConfigError
from limbeck.core.layout import to_map
from limbeck.core.survey import elements


def run_frozen(module: nn.Module, feature: Tensor, **given: Any) -> Tensor:
    """What a module makes of a feature, in the feature's precision; its parameters collect no gradient.

    Args:
        module: Any module; the first value it returns counts.
        feature: Its first argument.
        given: Its other arguments.

    >>> layer, x = nn.Linear(2, 1), torch.ones(1, 2, requires_grad=True)
    >>> run_frozen(layer, x).sum().backward()
    >>> layer.weight.grad is None, torch.equal(x.grad, layer.weight)
    (True, True)
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    held = {name: (t.to(feature.dtype) if t.is_floating_point() else t).detach() for name, t in tensors}
    return elements(functional_call(module, held, (feature,), given))[0]


def arguments_beside(module: Any, feature: Tensor, where: str) -> dict[str, Any]:
    """What a module wants beside a feature before it can be run again; it is tried once.

    An argument called ``input_dimensions`` is the feature's height and width (Swin); all others are ``None``.

    Args:
        module: The module.
        feature: A map, or tokens, as it is going to be given.
        where: Who asks, for the error.

    Raises:
        ConfigError: It is no single module, or does not go on from one tensor.

    >>> arguments_beside(nn.Linear(2, 1), torch.ones(1, 4, 2), "part")
    {}
    """
    if not isinstance(module, nn.Module):
        raise ConfigError("one module is wanted", where=where, found=f"{len(module)} of them", remedy="choose one: :-1")
    grid = tuple(to_map(feature).shape[2:])
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    later = list(inspect.signature(module.forward).parameters.values())[1:]
    names = [p.name for p in later if p.default is p.empty and p.kind in kinds]
    given = {name: grid if name == "input_dimensions" else None for name in names}
    try:
        with torch.no_grad():
            run_frozen(module, feature, **given)
    except Exception as error:  # whatever a stranger's module raises when it lacks something
        first = (str(error).strip().splitlines() or [""])[0][:160]
        raise ConfigError(
            f"this part of the teacher does not go on from one tensor: {type(error).__name__}: {first}",
            where=where,
            found=type(module).__name__,
            remedy="name another part, or none",
        ) from error
    return given

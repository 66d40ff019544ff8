"""Another layer in the place of a model's last linear one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from limbeck.core.errors import ModelError
from limbeck.models.heads.plan import set_module


def with_last(body: str, make: Callable[[int], nn.Module], **sizes: Any) -> nn.Module:
    """A model whose last linear layer, the last that is registered, is another.

    Args:
        body: As :func:`limbeck.models.load_model` takes it.
        make: The layer, from the width of what it reads.
        sizes: As ``load_model`` takes them, and options of the body.

    Raises:
        ModelError: The body has no linear layer beside others.

    >>> with_last("mlp_8", lambda width: nn.Linear(width, 3), in_features=6).linear
    Linear(in_features=8, out_features=3, bias=True)
    """
    from limbeck.models.load import load_model

    model = load_model(body, **sizes)
    names = [name for name, module in model.named_modules() if name and isinstance(module, nn.Linear)]
    if not names:
        raise ModelError("it has no linear layer that could be another", where="body", found=body)
    last = model.get_submodule(names[-1])
    assert isinstance(last, nn.Linear)
    set_module(model, names[-1], make(last.in_features))
    return model

"""A model run from the middle: the output of one of its places is replaced, and that of a later one is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from limbeck.core.errors import TapError
from limbeck.core.roles import Spot, resolve
from limbeck.core.survey import elements, survey


class _Read(BaseException):
    """Raised where the later place has been read: what comes after it is of no use."""


class SplitForward:
    """Runs what lies between two places of a frozen model, on a state of one's own.

    The model runs on its usual inputs, so that masks, positions and whatever else goes around its blocks are there; at
    the lower place its own state makes room for the given one. Gradients reach that state, and no parameter.

    Args:
        model: Any module; it is not changed.
        lower, upper: Taps of outputs; the upper one comes later.
        inputs: An example.

    Raises:
        TapError: A tap is no module's output, or they come in the other order.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> run, state = SplitForward(model, "0", "2", torch.ones(1, 2)), torch.ones(1, 3, requires_grad=True)
    >>> bool((run(torch.ones(1, 2), state) == model[2](model[1](state))).all())
    True
    """

    def __init__(self, model: nn.Module, lower: str, upper: str, inputs: Any) -> None:
        places = survey(model, inputs)
        self.model = model
        self.spots = [_output(tap, resolve(tap, places)) for tap in (lower, upper)]
        if places[self.spots[0].module].order >= places[self.spots[1].module].order:
            raise TapError(
                "the upper place does not come after the lower one",
                where=upper,
                found=f"{self.spots[1].module!r} after {self.spots[0].module!r}",
                remedy="name a lower place nearer to the inputs, or an upper one nearer to the logits",
            )

    @torch.compiler.disable
    def __call__(self, inputs: Any, state: Tensor) -> Tensor:
        """What the upper place says where the lower one says ``state``."""
        calls, found = [0, 0], list[Tensor]()

        def turn(number: int) -> bool:
            calls[number] += 1
            return calls[number] == self.spots[number].call + 1

        def put(_: nn.Module, args: Any, output: Any) -> Any:
            return _with(output, state) if turn(0) else output

        def read(_: nn.Module, args: Any, output: Any) -> None:
            if turn(1):
                found.append(next(v for v in elements(output) if isinstance(v, Tensor)))
                raise _Read

        modules = [self.model.get_submodule(spot.module) for spot in self.spots]
        handles = [m.register_forward_hook(hook) for m, hook in zip(modules, (put, read), strict=True)]
        held = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        try:
            if isinstance(inputs, Mapping):
                functional_call(self.model, held, (), dict(inputs))
            else:
                plain = isinstance(inputs, tuple) and not hasattr(inputs, "_fields")
                functional_call(self.model, held, inputs if plain else (inputs,))
        except _Read:
            return found[0]
        finally:
            for handle in handles:
                handle.remove()
        raise TapError("this place did not run", where=self.spots[1].module)


def _output(tap: str, spot: Spot | list[Spot]) -> Spot:
    if isinstance(spot, list) or spot.side != "out" or spot.element is not None or spot.module == ".":
        remedy = "name a module inside the model, or a role with a number, such as blocks:0"
        raise TapError("this is not the output of one module", where=tap, remedy=remedy)
    return spot


def _with(output: Any, state: Tensor) -> Any:
    """What a module gives, with another tensor in the place of its first."""
    if isinstance(output, Tensor):
        return state.to(output.dtype)
    at = next(i for i, value in enumerate(elements(output)) if isinstance(value, Tensor))
    if isinstance(output, Mapping):
        name = list(output)[at]
        return type(output)({**output, name: state.to(output[name].dtype)})  # type: ignore[call-arg]
    values = list(output)
    values[at] = state.to(values[at].dtype)
    return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)

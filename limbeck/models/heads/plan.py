"""What a head is, and how it comes into a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from limbeck.core.batch import map_tensors
from limbeck.core.survey import Place, dry
from limbeck.core.taps import Listener
from limbeck.core.trace import Trace


class Head(nn.Module):
    """What a head's module has: ``plan``, by which it can be made again; ``None`` where it was made by hand."""

    is_head = True
    plan: Plan | None = None


@dataclass(frozen=True)
class Site:
    """Where a head goes: the model, the layer it replaces, and what there is to look at."""

    model: nn.Module
    layer: str
    linear: nn.Linear
    places: dict[str, Place] | None
    inputs: Any
    teacher: nn.Module | None
    teacher_inputs: Any


@dataclass(frozen=True)
class Plan:
    """A head as it is written.

    Args:
        layer: The linear layer in whose place it stands; default the last that runs.
    """

    name: ClassVar[str]
    layer: str | None = None

    def put(self, site: Site) -> None:
        """Put it on the model."""
        raise TypeError(f"{type(self).__name__} does not say how it is put on a model")  # pragma: no cover

    def written(self) -> dict[str, Any]:
        """Its form in a recipe, with everything that was settled."""
        return {self.name: {k: v for k, v in asdict(self).items() if v is not None}}


def exchange(model: nn.Module, name: str, module: nn.Module, *, like: nn.Linear) -> None:
    """Put a module in the place of another, where and as the layer is that it makes do for."""
    new = [child for child_name, child in module.named_children() if child_name != "body"] or [module]
    for part in new:
        part.train(like.training).to(like.weight.device, like.weight.dtype)
    module.training = like.training
    set_module(model, name, module.to(like.weight.device))


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Let a dotted name mean another module."""
    owner, _, child = name.rpartition(".")
    setattr(model.get_submodule(owner), child, module)


def beside(model: nn.Module, inputs: Any) -> Any:
    """Inputs where the model is."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return map_tensors(inputs, lambda t: t.to(device))


def looked(model: nn.Module, inputs: Any, taps: tuple[str, ...]) -> Trace:
    """What a model says of an example in evaluation mode."""
    inputs = beside(model, inputs)
    listener = Listener(model, taps, inputs)
    try:
        with dry(model):
            return listener(inputs)
    finally:
        listener.close()

"""One dry run of a model that notes every place one can listen to: names, shapes, order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import ModelError
from limbeck.core.trace import logits_of


@dataclass
class Place:
    """One module as a dry run met it.

    Args:
        name: Dotted name; ``"."`` is the model itself.
        module: Its class name.
        order: When it finished, counted from 0, at its last call.
        calls: How often it ran in one forward.
        parameters: How many parameters it holds, those of its children included.
        inputs: Shape of the first tensor it was given, or ``None``.
        outputs: Shapes of the tensors it returned, ``None`` for what is no tensor.
        plain: It returned a tensor, not a structure that holds one.
        leaf: It has no children.
        linear: It is a linear layer.
        logits: What it returns is what the model gives for its logits, unchanged. Told of the last linear layer.
        head: It is a head that was put on the model, whose parts go by ``head.NAME`` (see ``limbeck.models.put_head``).
        probabilities: Which of its outputs are attention maps: ``[B, heads, T, T']``, rows summing to one.
    """

    name: str
    module: str
    order: int = -1
    calls: int = 0
    parameters: int = 0
    inputs: tuple[int, ...] | None = None
    outputs: list[tuple[int, ...] | None] = field(default_factory=list)
    plain: bool = True
    leaf: bool = True
    linear: bool = False
    logits: bool = False
    head: bool = False
    probabilities: list[int] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of the first tensor returned."""
        return next((s for s in self.outputs if s is not None), None)


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call a model with a batch's inputs: keywords for a dict, positions for a tuple, else one argument."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple) and not hasattr(inputs, "_fields"):
        return model(*inputs)
    return model(inputs)


@contextmanager
def dry(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients, with every module's mode and the random state put back afterwards."""
    modes = {m: m.training for m in model.modules()}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes.items():
                module.training = training


def survey(model: nn.Module, inputs: Any, logits: str | None = None) -> dict[str, Place]:
    """Run a model once, changing nothing in it, and list every place that ran, in the order in which they finished.

    Args:
        model: Any module.
        inputs: An example of its inputs.
        logits: Where logits stand in its output (see ``logits_of``).
    """
    places: dict[str, Place] = {}
    finished = 0
    last: tuple[Place, Any, int] | None = None  # the last linear layer, what it gave, and in which version

    def note(name: str, module: nn.Module) -> Any:
        place = Place(
            name,
            type(module).__name__,
            leaf=next(module.children(), None) is None,
            linear=isinstance(module, nn.Linear),
            head=bool(getattr(module, "is_head", False)),
            parameters=sum(p.numel() for p in module.parameters()),
        )

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            nonlocal finished, last
            values = elements(output)
            place.order, place.calls = finished, place.calls + 1
            given = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            place.inputs = tuple(given.shape) if given is not None else None
            place.outputs = [tuple(v.shape) if isinstance(v, Tensor) else None for v in values]
            place.plain = isinstance(output, Tensor)
            place.probabilities = [i for i, v in enumerate(values) if _is_attention(v)]
            last = (place, output, _version(output)) if place.linear else last
            finished += 1
            places.pop(name, None)
            places[name] = place

        return module.register_forward_hook(hook, with_kwargs=True)

    handles = [note(name or ".", module) for name, module in model.named_modules()]
    try:
        with dry(model):
            output = call_model(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    if last is not None:
        place, value, version = last
        place.logits = version == _version(value) and _is_logits(value, output, logits)
    return places


def _is_logits(value: Any, output: Any, where: str | None) -> bool:
    try:
        found = logits_of(output, where)
    except ModelError:
        return False
    same = isinstance(value, Tensor) and value.shape == found.shape
    return found is value or (same and torch.equal(found, value.to(found.dtype)))


def _version(value: Any) -> int:
    """How often a tensor was written over."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def elements(output: Any) -> list[Any]:
    """A module's output as a list: of a tuple its entries, of a mapping its values, else the one value."""
    if isinstance(output, Mapping):
        return list(output.values())
    if isinstance(output, (tuple, list)):
        return list(output)
    return [output]


def _is_attention(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.ndim != 4 or not value.is_floating_point() or value.shape[-1] < 2:
        return False
    rows = value.float().sum(-1)
    return bool((value >= 0).all()) and torch.allclose(rows, torch.ones_like(rows), atol=1e-2)

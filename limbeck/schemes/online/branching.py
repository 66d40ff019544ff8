"""A model cut at one place: what comes after it, as a module of its own that goes on from a given feature."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import batch_size_of
from limbeck.core.errors import ConfigError
from limbeck.core.roles import Spot, resolve
from limbeck.core.survey import Place, call_model, dry, survey
from limbeck.core.trace import logits_of


class Given(nn.Module):
    """Stands at the cut and hands out what it was given."""

    feature: Tensor | None = None

    def forward(self, *_: Any, **__: Any) -> Tensor:
        assert self.feature is not None
        return self.feature


class Skipped(nn.Module):
    """Stands before the cut, for a module that need not run: zeros of the shape that it would give.

    Args:
        shape: Of one sample's output.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.size = 0

    def forward(self, input: Any = None, *_: Any, **__: Any) -> Tensor:
        like = input if isinstance(input, Tensor) else torch.zeros(())
        kind = like.dtype if like.is_floating_point() else torch.get_default_dtype()
        return torch.zeros(self.size, *self.shape, dtype=kind, device=like.device)


class Tail(nn.Module):
    """What of a model comes after a place; of what comes before nothing is left.

    The model's own forward is run, so any code of its own between its modules does what it always does.

    Args:
        model: It is changed: use a model of its own.
        cut: Where, as :func:`place_of` found it.
        places: The survey of a model of this kind.
        size: Samples of that survey.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> places = survey(net, torch.ones(2, 4))
    >>> tail = Tail(copy.deepcopy(net), "1", places, 2)
    >>> [tuple(p.shape) for p in tail.parameters()]
    [(3, 8), (3,)]
    >>> inputs = torch.randn(5, 4)
    >>> bool((tail(inputs, net[:2](inputs)) == net(inputs)).all())
    True
    """

    def __init__(self, model: nn.Module, cut: str, places: dict[str, Place], size: int) -> None:
        super().__init__()
        self.model = model
        self.given = Given()
        self.skipped: list[Skipped] = []
        for name in _before(cut, places):
            shape = places[name].shape
            if shape is None or not places[name].plain or shape[0] != size:
                raise ConfigError(
                    "what runs before the cut gives no plain tensor of samples",
                    where="scheme.tap",
                    found=f"{name!r}, a {places[name].module}",
                    remedy="cut at another place; limbeck taps lists them",
                )
            self.skipped.append(Skipped(shape[1:]))
            model.set_submodule(name, self.skipped[-1])
        model.set_submodule(cut, self.given)

    def forward(self, inputs: Any, feature: Tensor) -> Any:
        """The model's output, from the feature on; of ``inputs`` nothing but the form is used."""
        for module in self.skipped:
            module.size = feature.shape[0]
        self.given.feature = feature
        try:
            return call_model(self.model, inputs)
        finally:
            self.given.feature = None


def place_of(tap: str, places: dict[str, Place], where: str = "scheme.tap") -> str:
    """The module whose output a tap is.

    Raises:
        ConfigError: It is another value, or several.
    """
    spot = resolve(tap, places)
    if not isinstance(spot, Spot) or spot.side != "out" or spot.element is not None or places[spot.module].calls > 1:
        raise ConfigError(
            "a model is cut where one module that runs once gives its output",
            where=where,
            found=tap,
            remedy="name one place, such as stages:-2; limbeck taps lists them",
        )
    return spot.module


def cuttable(model: nn.Module, tap: str, inputs: Any, logits: str | None = None) -> tuple[str, dict[str, Place]]:
    """Where a tap cuts a model and the model's survey, proved by a copy that goes on from the cut as the model does.

    Raises:
        ConfigError: It does not: something besides this feature leads on from before the cut.
    """
    places = survey(model, inputs, logits)
    cut = place_of(tap, places)
    size, feature = batch_size_of(inputs), list[Tensor]()
    tail = Tail(copy.deepcopy(model), cut, places, size)
    handle = model.get_submodule(cut).register_forward_hook(lambda _, __, output: feature.append(output))
    try:
        with dry(model), dry(tail):
            wanted = logits_of(call_model(model, inputs), logits)
            try:
                same = torch.equal(logits_of(tail(inputs, feature[0]), logits), wanted)
            except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
                same = False
    finally:
        handle.remove()
    if not same:
        raise ConfigError(
            "the model does not go on from this place alone",
            where="scheme.tap",
            found=f"{tap} ({cut})",
            remedy="cut it at another place, past which nothing from before is used; limbeck taps lists them",
        )
    return cut, places


def _before(cut: str, places: dict[str, Place]) -> list[str]:
    """The outermost modules that are done when the one at the cut is."""
    end = places[cut].order
    done = [
        name
        for name, place in places.items()
        if place.order < end and name != "." and not name.startswith(cut + ".") and not cut.startswith(name + ".")
    ]
    return [name for name in done if not any(name.startswith(other + ".") for other in done)]

"""Listening to a model without changing it: hooks that hand values over to a trace.

The hooks are registered once, before any compilation, and do nothing unless a listener is running its model, so a
tapped model behaves and costs as before for everybody else. Inside ``torch.compile`` the captured values become
outputs of the one graph. Recomputation under gradient checkpointing happens outside a listening forward and is ignored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import TapError
from limbeck.core.roles import Spot, resolve
from limbeck.core.survey import Place, call_model, dry, elements, survey
from limbeck.core.trace import Trace, logits_of


class _Stop(BaseException):
    """Raised inside a forward whose last owed tap has fired; no ``except Exception`` of a model swallows it."""


class Listener:
    """Runs a model and returns a trace with the taps asked for.

    Args:
        model: Any module; it is not changed, wrapped or copied.
        taps: Names of taps (see ``limbeck.core.roles``).
        inputs: An example of its inputs, for the dry run that resolves roles. Not needed where ``taps`` holds nothing
            but ``"logits"``.
        logits: Where logits stand in the output (see ``logits_of``).
        places: A survey made before, where there is one.

    Raises:
        TapError: A tap names no place, or its place does not return a tensor.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Iterable[str] = (),
        inputs: Any = None,
        *,
        logits: str | None = None,
        places: dict[str, Place] | None = None,
    ) -> None:
        self.model, self.where = model, logits
        self.to_end = False  # a forward runs to its end, whatever is owed
        wanted = list(dict.fromkeys(taps))
        self.wants_logits = "logits" in wanted
        named = [t for t in wanted if t != "logits"]
        if named and places is None:
            places = survey(model, inputs, logits)
        self.spots: dict[str, Spot | list[Spot]] = {tap: resolve(tap, places or {}) for tap in named}
        flat = {
            s for spots in self.spots.values() for s in (spots if isinstance(spots, list) else [spots]) if not s.held
        }
        self._calls = {s.module: (places or {})[s.module].calls for s in flat}
        self._values: dict[Spot, Tensor] | None = None
        self._versions: dict[Spot, int] | None = None
        self._seen: dict[str, int] = {}
        self._owed = len(flat)
        self._fragile: set[Spot] = set()
        self._handles = [self._listen(spot) for spot in sorted(flat, key=repr)]
        if flat and inputs is not None:
            self._find_fragile(inputs)

    def _find_fragile(self, inputs: Any) -> None:
        """By one whole dry run, find the values that the model changes in place later on; they are kept as copies."""
        owed, self._owed = self._owed, -1  # no stop
        self._values, self._seen = {}, {}
        versions: dict[Spot, int] = {}
        self._versions = versions
        try:
            with dry(self.model):
                call_model(self.model, inputs)
            values = self._values
        finally:
            self._values, self._versions, self._owed = None, None, owed
        self._fragile = {s for s, v in values.items() if s in versions and v._version != versions[s]}

    def _listen(self, spot: Spot) -> Any:
        module = self._module(spot)
        if spot.side == "in":

            def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if self._values is not None and self._turn(spot, ("in",)):
                    self._keep(spot, [*args, *kwargs.values()])

            return module.register_forward_pre_hook(before, with_kwargs=True)

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._values is not None and self._turn(spot, ("out",)):
                self._keep(spot, elements(output))

        return module.register_forward_hook(after)

    def _module(self, spot: Spot) -> nn.Module:
        return self.model if spot.module == "." else self.model.get_submodule(spot.module)

    def _turn(self, spot: Spot, side: tuple[str, ...]) -> bool:
        """Whether this call of the module is the one asked for."""
        if self._calls[spot.module] == 1:
            return True
        key = repr((spot, side))
        seen = self._seen.get(key, 0)
        self._seen[key] = seen + 1
        return seen == spot.call

    def _keep(self, spot: Spot, values: list[Any]) -> None:
        assert self._values is not None
        chosen = values[spot.element : spot.element + 1] if spot.element is not None else values
        value = next((v for v in chosen if isinstance(v, Tensor)), None)
        if value is None:
            raise TapError("no tensor passes there", where=spot.module, found=[type(v).__name__ for v in values])
        if self._versions is not None and not value.is_inference():
            self._versions[spot] = value._version
        self._values[spot] = value.clone() if spot in self._fragile else value
        # A compiler drops what nobody needs by itself, and cannot trace an exception out of a forward.
        ends = self.wants_logits or self.to_end or torch.compiler.is_compiling()
        if len(self._values) == self._owed and not ends:
            raise _Stop

    def __call__(self, inputs: Any) -> Trace:
        """Run the model. Stops after the last owed tap where nobody asked for logits."""
        if not self.spots:
            output = call_model(self.model, inputs)
            taps: dict[str, Any] = {"logits": logits_of(output, self.where)} if self.wants_logits else {}
            return Trace(output, taps, self.where)
        self._values, self._seen, output = {}, {}, None
        try:
            if self.wants_logits or not self._owed or torch.compiler.is_compiling():
                output = call_model(self.model, inputs)
            else:
                with contextlib.suppress(_Stop):
                    output = call_model(self.model, inputs)
            values = self._values
        finally:
            self._values = None
        self._check_gradients(values)
        taps = {}
        for tap, spots in self.spots.items():
            several = spots if isinstance(spots, list) else [spots]
            if several[0].held:
                held = [self._held(spot) for spot in several]
                taps[tap] = held if isinstance(spots, list) else held[0]
                continue
            for spot in several:
                if spot not in values:
                    raise TapError(
                        "this tap never fired in the forward",
                        where=tap,
                        found=f"{spot.module!r} did not run",
                        remedy="the model took another path than in the dry run; tap a place that always runs",
                    )
            taps[tap] = [values[s] for s in several] if isinstance(spots, list) else values[several[0]]
        if self.wants_logits:
            taps["logits"] = logits_of(output, self.where)
        return Trace(output, taps, self.where)

    def _held(self, spot: Spot) -> Tensor | nn.Module:
        """A module, or a parameter of it; where the model only answers, cut off from training."""
        module = self._module(spot)
        if spot.side == "module":
            return module
        value, weight = getattr(module, spot.side, None), getattr(module, "weight", None)
        if value is None and spot.side == "bias" and isinstance(weight, Tensor):
            value = weight.new_zeros(len(weight))
        if not isinstance(value, Tensor):
            raise TapError(f"this module has no {spot.side}", where=spot.module, found=type(module).__name__)
        return value if torch.is_grad_enabled() else value.detach()

    def _check_gradients(self, values: dict[Spot, Tensor]) -> None:
        """Refuse values cut off from the weights that made them. Told from outside: within, gradients are off."""
        for spot, value in values.items() if torch.is_grad_enabled() else ():
            if value.requires_grad or spot.side == "in" or not value.is_floating_point():
                continue
            if any(p.requires_grad for p in self._module(spot).parameters()):
                raise TapError(
                    "the captured value carries no gradient though its module is trained",
                    where=spot.module,
                    remedy="with gradient checkpointing use use_reentrant=False",
                )

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def listen(model: nn.Module, inputs: Any, taps: Iterable[str]) -> Trace:
    """One forward with taps, in the model's present mode; the hooks are gone afterwards.

    >>> from torch import nn
    >>> trace = listen(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.ones(1, 4), ["penultimate"])
    >>> trace["penultimate"].shape
    torch.Size([1, 8])
    """
    listener = Listener(model, [*taps, "logits"], inputs)
    try:
        return listener(inputs)
    finally:
        listener.close()

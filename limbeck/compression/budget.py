"""The largest student within a budget of parameters or of time, along one stated path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from limbeck.compression.anatomy import Anatomy
from limbeck.compression.calibration import Inputs
from limbeck.compression.layers import LayerChooser
from limbeck.compression.plan import Plan
from limbeck.compression.skeletons import fresh
from limbeck.core.errors import ConfigError, LimbeckError
from limbeck.models.describe import latency

_STEPS = 16  # widths fall by sixteenths
_LEAST = 4  # to four of them


@dataclass(frozen=True)
class Budget:
    """A budget and what became of it.

    Args:
        of: ``"parameters"`` or ``"latency"`` (milliseconds).
        asked: As it was asked for: a number, or a share of the teacher's.
        limit: The same as a number.
        met: What the student has.
    """

    of: str
    asked: float
    limit: float
    met: float

    def written(self) -> dict[str, Any]:
        """As plain values."""
        return {"of": self.of, "asked": self.asked, "limit": self.limit, "met": self.met}


class Search:
    """Walks one path from the teacher's size downwards and stops at the first student within the budget.

    The path, of what the caller has left open: (1) depth, to half; (2) feed-forward units and heads by the same share,
    to a quarter, in sixteenths; (3) the same for hidden units; (4) depth, to one layer. Units come in multiples of 64
    (of 8 below 512 units), heads in whole groups. What is left of a budget of parameters goes to feed-forward units.

    Args:
        anatomy: The teacher's.
        start: What is fixed, and all else as the teacher's.
        free: What may change: of ``"layers"``, ``"ffn"``, ``"heads"``, ``"hidden"``.
        chooser: Chooses layers.
    """

    def __init__(self, anatomy: Anatomy, start: Plan, free: Sequence[str], chooser: LayerChooser) -> None:
        self._anatomy, self._start, self._chooser = anatomy, start, chooser
        self._free = [name for name in free if self._possible(name)]
        self._path = list(self._points())

    def within_parameters(self, limit: int) -> Plan:
        """The first plan on the path with at most so many parameters.

        Raises:
            ConfigError: There is none; the message tells the smallest.
        """
        counts: dict[int, int] = {}

        def count(place: int) -> int:
            if place not in counts:
                counts[place] = self._path[place].parameters(self._anatomy)
            return counts[place]

        last = len(self._path) - 1
        if count(last) > limit:
            raise ConfigError(
                "no student on the path is that small",
                where="parameters",
                found=f"{count(last)} parameters at the least",
                wanted=f"{limit}",
                remedy="cut the vocabulary, give layers, hidden or ffn yourself, or leave more of them open",
            )
        place = _first(0, last, lambda i: count(i) <= limit)
        self._path = self._path[place:]
        self._path[0] = self._filled(self._path[0], limit)
        return self._path[0]

    def within_latency(self, limit: float, inputs: Inputs) -> Plan:
        """The first plan on (what is left of) the path whose forward takes at most so many milliseconds.

        Raises:
            ConfigError: There is none; the message tells the fastest.
        """
        times: dict[int, float] = {}

        def measure(place: int) -> float:
            if place not in times:
                model = fresh(self._anatomy.teacher, self._path[place].config(self._anatomy))
                with torch.no_grad():
                    for parameter in model.parameters():  # what memory held may be slow to compute with
                        parameter.fill_(0.01)
                words = self._start.words
                times[place] = latency(model, inputs if words is None else words.inputs(inputs))
            return times[place]

        last = len(self._path) - 1
        place = _first(0, last, lambda i: measure(i) <= limit)
        while place < last and measure(place) > limit:
            place += 1
        if measure(place) > limit:
            raise ConfigError(
                "no student on the path is that fast here",
                where="latency",
                found=f"{min(times.values()):.3g} ms at the fastest, of those tried",
                wanted=f"{limit:g} ms",
                remedy="ask for more time, give smaller example inputs, or cut further yourself",
            )
        return self._path[place]

    def _possible(self, axis: str) -> bool:
        if axis == "layers":
            return True
        if axis == "heads" and self._anatomy.coupled:
            return False  # they follow hidden units
        try:
            self._anatomy.layouts([axis])
        except LimbeckError:
            return False
        return True

    def _points(self) -> Iterator[Plan]:
        plan = self._start
        yield plan
        half = [-(-stack.depth // 2) for stack in self._anatomy.stacks]
        deepest = max(len(stay) for stay in plan.layers.values())
        for depth in range(deepest - 1, max(half) - 1, -1) if "layers" in self._free else ():
            plan = self._shallower(plan, depth)
            yield plan
        base = plan
        for step in range(_STEPS - 1, _LEAST - 1, -1) if {"ffn", "heads"} & set(self._free) else ():
            found = self._narrower(base, step / _STEPS)
            if found is not None and found.sizes != plan.sizes:
                plan = found
                yield plan
        base = plan
        for step in range(_STEPS - 1, _LEAST - 1, -1) if "hidden" in self._free else ():
            found = self._thinner(base, step / _STEPS)
            if found is not None and found.sizes != plan.sizes:
                plan = found
                yield plan
        for depth in range(max(half) - 1, 0, -1) if "layers" in self._free else ():
            plan = self._shallower(plan, depth)
            yield plan

    def _shallower(self, plan: Plan, depth: int) -> Plan:
        """The deepest stack at most so deep, the others in proportion."""
        deepest = max(stack.depth for stack in self._anatomy.stacks)
        counts = {s.field: max(1, round(depth * s.depth / deepest)) for s in self._anatomy.stacks}
        return replace(plan, layers={s.field: self._chooser(s, counts[s.field]) for s in self._anatomy.stacks})

    def _narrower(self, plan: Plan, share: float) -> Plan | None:
        sizes: dict[str, int] = {}
        if "ffn" in self._free:
            sizes["ffn"] = _multiple(self._anatomy.size("ffn"), share)
        if "heads" not in self._free:
            return self._valid(plan.with_sizes(**sizes))
        groups = self._anatomy.size("kv_heads") if self._anatomy.field("kv_heads") is not None else None
        heads = self._anatomy.size("heads")
        if groups in (None, 1):
            options = [
                {"heads": n} | ({} if groups is None else {"kv_heads": 1}) for n in range(_share(heads, share), 0, -1)
            ]
        else:
            options = [{"heads": n * (heads // groups), "kv_heads": n} for n in range(_share(groups, share), 0, -1)]
        found = (self._valid(plan.with_sizes(**sizes, **option)) for option in options)
        return next((one for one in found if one is not None), None)

    def _thinner(self, plan: Plan, share: float) -> Plan | None:
        hidden, width = self._anatomy.size("hidden"), self._anatomy.head_dim
        if self._anatomy.coupled:
            heads = _share(self._anatomy.size("heads"), share)
            return self._valid(plan.with_sizes(hidden=heads * width, heads=heads))
        step = _step(hidden)
        options = range(_multiple(hidden, share), 0, -step)
        found = (self._valid(plan.with_sizes(hidden=units)) for units in options)
        return next((one for one in found if one is not None), None)

    def _valid(self, plan: Plan) -> Plan | None:
        """The plan, unless the family refuses its numbers."""
        try:
            plan.config(self._anatomy)
        except LimbeckError:
            return None
        return plan

    def _filled(self, plan: Plan, limit: int) -> Plan:
        """The same with as many feed-forward units as the budget leaves room for."""
        if "ffn" not in self._free or "ffn" not in plan.sizes:
            return plan
        units, whole = plan.sizes["ffn"], self._anatomy.size("ffn")
        step = _step(whole)
        options = [*range(units, whole, step), whole]
        plans = [plan.with_sizes(ffn=option) for option in options]
        over = _first(0, len(plans), lambda i: i == len(plans) or plans[i].parameters(self._anatomy) > limit)
        return plans[max(over - 1, 0)]


def _first(low: int, high: int, good: Callable[[int], bool]) -> int:
    """The first number from low to high that is good, where all after a good one are; high if there is none."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle + 1, high)
    return low


def _step(units: int) -> int:
    return 64 if units >= 512 else 8 if units >= 64 else 1


def _multiple(units: int, share: float) -> int:
    step = _step(units)
    return max(step, int(units * share) // step * step)


def _share(units: int, share: float) -> int:
    return max(1, int(units * share))

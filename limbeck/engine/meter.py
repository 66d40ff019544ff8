"""What the steps came to: sums for the log, and a watch for numbers that went bad.

Values stay on the device and are fetched once every few steps, so that an accelerator never waits. Every step has its
own row, so the message still names the very step and term.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from limbeck.core.errors import TrainingError

_TOTAL, _NORM, _TERM = "total", "grad_norm", "terms/"


@dataclass
class _Row:
    step: int
    turn: str
    names: tuple[str, ...]
    values: Tensor


@dataclass
class Meter:
    """Sums over the steps since the last line of the log.

    Args:
        every: Steps between fetches; 1 where the device is the host.
        overflow_is_usual: Gradients may overflow now and then (fp16 with loss scaling).
        explain: Says more about a gradient that went bad, while it is still at hand.
    """

    every: int
    overflow_is_usual: bool = False
    explain: Callable[[], str | None] = lambda: None
    steps: int = 0
    samples: int = 0
    sums: dict[str, dict[str, float]] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)
    rows: list[_Row] = field(default_factory=list)

    def add(self, step: int, turn: str, values: dict[str, Tensor]) -> None:
        """Note one turn of a step: ``total``, the terms, and what else is summed.

        Raises:
            TrainingError: A number of this step, or of one since the last fetch, is not finite.
        """
        self.rows.append(_Row(step, turn, tuple(values), torch.stack(list(values.values()))))
        if len(self.rows) >= self.every:
            self.fetch()

    def fetch(self) -> None:
        """Bring what is on the device over, look at it and add it up.

        Raises:
            TrainingError: A number is not finite.
        """
        if not self.rows:
            return
        rows, self.rows = self.rows, []
        numbers = (rows[0].values if len(rows) == 1 else torch.cat([r.values for r in rows])).tolist()
        for row in rows:
            mine, numbers = dict(zip(row.names, numbers, strict=False)), numbers[len(row.names) :]
            self._check(row, mine)
            sums = self.sums.setdefault(row.turn, {})
            for name, value in [("rows", 1.0), *mine.items()]:
                sums[name] = sums.get(name, 0.0) + value

    def _check(self, row: _Row, values: dict[str, float]) -> None:
        terms = {k.removeprefix(_TERM): v for k, v in values.items() if k.startswith(_TERM)}
        if not math.isfinite(values[_TOTAL]):
            bad = [name for name, value in terms.items() if not math.isfinite(value)]
            problem = (
                f"the loss is not finite: {', '.join(bad)}" if bad else "the loss is not finite, though its terms are"
            )
        elif not math.isfinite(values.get(_NORM, 0.0)) and not self.overflow_is_usual:
            problem = f"the gradient of {' + '.join(terms)} is not finite, though the loss is"
            if more := self.explain():
                problem += f"; first in {more}"
        else:
            return
        found = ", ".join(f"{name} = {value:g}" for name, value in terms.items())
        raise TrainingError(problem, where=f"step {row.step}", found=found, remedy="lower lr, set clip, or use fp32")

    def line(self, mean: Callable[[list[float]], list[float]]) -> dict[str, Any]:
        """What the log says about the steps since the last line, which begins anew.

        Args:
            mean: Averages numbers over the ranks.
        """
        self.fetch()
        keys = [(turn, name) for turn, sums in sorted(self.sums.items()) for name in sorted(sums)]
        means = mean([self.sums[turn][name] for turn, name in keys])
        values = dict(zip(keys, means, strict=True))
        line: dict[str, Any] = {"total": 0.0, "terms": {}}
        correct = labelled = 0.0
        for (turn, name), value in values.items():
            prefix, each = f"{turn}/" if turn else "", value / values[turn, "rows"]
            if name == _TOTAL:
                line["total"] += each
            elif name == _NORM:
                line[prefix + name] = each
            elif name.startswith(_TERM):
                line["terms"][prefix + name.removeprefix(_TERM)] = each
            correct += value if name == "correct" else 0.0
            labelled += value if name == "labelled" else 0.0
        line["weights"] = {k: float(v) for k, v in self.weights.items()}
        line["accuracy"] = correct / labelled if labelled else None
        self.steps = self.samples = 0
        self.sums = {}
        return line

    def pack(self) -> dict[str, Any]:
        """The open sums, so that a resumed run's next line is the same."""
        self.fetch()
        return {"steps": self.steps, "sums": self.sums, "weights": {k: float(v) for k, v in self.weights.items()}}

    def unpack(self, state: dict[str, Any]) -> None:
        """Put back what ``pack`` took."""
        self.steps, self.weights = state["steps"], dict(state["weights"])
        self.sums = {turn: dict(sums) for turn, sums in state["sums"].items()}

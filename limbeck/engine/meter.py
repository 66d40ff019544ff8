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

_NORM, _TOTAL = "grad_norm", "total"


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
    sums: dict[str, float] = field(default_factory=dict)
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
            for name, value in mine.items():
                key = f"{row.turn}/{name}" if row.turn else name
                self.sums[key] = self.sums.get(key, 0.0) + value

    def _check(self, row: _Row, values: dict[str, float]) -> None:
        where = f"step {row.step}"
        if not math.isfinite(values[_TOTAL]):
            terms = {k: v for k, v in values.items() if k.startswith("terms/")}
            bad = [k.removeprefix("terms/") for k, v in terms.items() if not math.isfinite(v)]
            found = ", ".join(f"{k.removeprefix('terms/')} = {v:g}" for k, v in terms.items())
            message = (
                f"the loss is not finite: {', '.join(bad)}" if bad else "the loss is not finite though its terms are"
            )
            raise TrainingError(message, where=where, found=found, remedy=_REMEDY)
        if not math.isfinite(values.get(_NORM, 0.0)) and not self.overflow_is_usual:
            terms = {k.removeprefix("terms/"): v for k, v in values.items() if k.startswith("terms/")}
            found = ", ".join(f"{k} = {v:g}" for k, v in terms.items())
            message = f"the gradient of {' + '.join(terms)} is not finite though the loss is"
            if more := self.explain():
                message += f", first in {more}"
            raise TrainingError(message, where=where, found=found, remedy=_REMEDY)

    def line(self, mean: Callable[[list[float]], list[float]]) -> dict[str, Any]:
        """What the log says about the steps since the last line, which begins anew.

        Args:
            mean: Averages numbers over the ranks.
        """
        self.fetch()
        keys = sorted(self.sums)
        sums = dict(zip(keys, mean([self.sums[k] for k in keys]), strict=True))
        steps = max(self.steps, 1)
        line: dict[str, Any] = {"total": 0.0, "terms": {}}
        for key, value in sums.items():
            turn, _, name = key.rpartition("terms/")
            if key.endswith(_TOTAL):
                line["total"] += value / steps
            elif "terms/" in key:
                line["terms"][turn + name] = value / steps
            elif key.endswith(_NORM):
                line[key] = value / steps
        labelled = sum(v for k, v in sums.items() if k.endswith("labelled"))
        line["weights"] = {k: float(v) for k, v in self.weights.items()}
        line["accuracy"] = sum(v for k, v in sums.items() if k.endswith("correct")) / labelled if labelled else None
        self.steps = self.samples = 0
        self.sums = {}
        return line

    def pack(self) -> dict[str, Any]:
        """The open sums, so that a resumed run's next line is the same."""
        self.fetch()
        return {"steps": self.steps, "sums": self.sums, "weights": {k: float(v) for k, v in self.weights.items()}}

    def unpack(self, state: dict[str, Any]) -> None:
        """Put back what ``pack`` took."""
        self.steps, self.sums, self.weights = state["steps"], dict(state["sums"]), dict(state["weights"])


_REMEDY = "lower lr, set clip, or use fp32"

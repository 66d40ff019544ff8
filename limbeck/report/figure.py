"""The figure that runs are judged by: what people call it, which way is better, and how its values are written."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from limbeck.report.words import digits_for, number, percent, signed


@dataclass(frozen=True)
class Figure:
    """One figure.

    Args:
        key: In facts.
        name: What people call it.
        share: It is a share, told in percent; else a plain number.
        lower: Less of it is better.
        digits: Decimals that the data bear.

    >>> Figure("accuracy", "accuracy").said(0.9234), Figure("perplexity", "perplexity", False, True, 2).said(12.345)
    ('92.3', '12.35')
    """

    key: str
    name: str
    share: bool = True
    lower: bool = False
    digits: int = 1

    @property
    def head(self) -> str:
        """At the top of a column: ``"accuracy %"``."""
        return f"{self.name} %" if self.share else self.name

    def rank(self, value: float) -> float:
        """More is better."""
        return -value if self.lower else value

    def said(self, value: float | None, more: int = 0) -> str:
        """A value, with so many more decimals."""
        return (percent if self.share else number)(value, self.digits + more)

    def change(self, value: float | None) -> str:
        """A difference, with its sign."""
        return signed(value, self.digits, 100 if self.share else 1)

    def interval(self, facts: dict[str, Any] | None, sign: bool = False) -> str:
        """Of values (shares are cut at 0 and 100) or of differences: ``"91.2 to 93.0"``; empty where there is none."""
        if not facts or not facts.get("interval"):
            return ""
        low, high = facts["interval"]
        if sign:
            return f"{self.change(low)} to {self.change(high)}"
        return f"{self.said(max(low, 0.0))} to {self.said(min(high, 1.0 if self.share else math.inf))}"

    def plus_minus(self, facts: dict[str, Any] | None) -> str:
        """A mean with half its interval: ``"92.1 ± 0.9"``."""
        if not facts:
            return "–"
        mean = self.said(facts["mean"])
        if not facts.get("interval"):
            return mean
        return f"{mean} ± {self.said((facts['interval'][1] - facts['interval'][0]) / 2)}"

    def difference(self, gain: dict[str, Any] | None) -> str:
        """``"+1.2 (+0.4 to +2.0)"``."""
        if gain is None:
            return ""
        span = self.interval(gain, sign=True)
        return self.change(gain["mean"]) + (f" ({span})" if span else "")


#: The first that a run's facts have is what it is judged by.
_FIGURES = (
    Figure("perplexity", "perplexity", share=False, lower=True, digits=2),
    Figure("map_macro", "mAP"),
    Figure("accuracy", "accuracy"),
    Figure("mse", "mean squared error", share=False, lower=True, digits=4),
)

BITS = Figure("bits_per_byte", "cost of a byte in bits", share=False, lower=True, digits=3)


def figure_of(comparison: dict[str, Any]) -> Figure:
    """What a comparison compares by.

    >>> figure_of({"metric": "map_macro", "data": {"samples": 10_000}})
    Figure(key='map_macro', name='mAP', share=True, lower=False, digits=2)
    """
    key = comparison.get("metric", "accuracy")
    return _of(next((f for f in _FIGURES if f.key == key), Figure(key, key)), comparison["data"]["samples"])


def headline_of(facts: dict[str, Any]) -> Figure | None:
    """What a run is judged by, as far as its facts tell."""
    found = next((f for f in _FIGURES if facts.get(f.key) is not None), None)
    return None if found is None else _of(found, facts.get("samples", 0))


def _of(figure: Figure, samples: int) -> Figure:
    return replace(figure, digits=digits_for(samples)) if figure.share else figure

"""Curves over training: one line a series, with a band from the lowest to the highest seed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from limbeck.report.charts.svg import Canvas, Scale, axes, ticks

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One line.

    Args:
        name: In the legend.
        cls: Its class of colour.
        seeds: The points of each seed: step and value.
    """

    name: str
    cls: str
    seeds: Sequence[Points]

    def middle(self) -> list[tuple[float, float, float, float]]:
        """Step, mean, lowest and highest over seeds, at steps that all seeds have."""
        tables = [dict(points) for points in self.seeds if points]
        if not tables:
            return []
        common = sorted(set.intersection(*(set(t) for t in tables)))
        values = [(step, [t[step] for t in tables]) for step in common]
        return [(step, statistics.fmean(v), min(v), max(v)) for step, v in values]


def curves(
    series: Sequence[Series], label: str, form: Callable[[float], str], *, least: float | None = None
) -> Markup | None:
    """The picture; ``None`` where there is nothing to draw.

    Args:
        series: The lines.
        label: What the height is.
        form: How a value is written on the axis.
        least: Where the axis begins, where that is given.
    """
    drawn = [(s, middle) for s in series if len(middle := s.middle()) > 1]
    if not drawn:
        return None
    lows = [low for _, middle in drawn for _, _, low, _ in middle]
    highs = [high for _, middle in drawn for _, _, _, high in middle]
    last = max(middle[-1][0] for _, middle in drawn)
    low = min(lows) if least is None else least
    canvas = Canvas(420, 250, f"{label} over training steps: {', '.join(s.name for s, _ in drawn)}")
    pad = 0.04 * (max(highs) - low) or 0.5
    x, y = Scale(0, last, 44, 408), Scale(low - (pad if least is None else 0), max(highs) + pad, 216, 12)
    thousands = last >= 10_000
    x_ticks = {v: f"{v / 1000:g}k" if thousands and v else f"{v:g}" for v in ticks(0, last, 5)}
    axes(canvas, x, y, x_ticks, {v: form(v) for v in ticks(y.low, y.high, 5)})
    canvas.text(408, 246, "training step", anchor="end")
    for line, middle in drawn:
        if len(line.seeds) > 1:
            edge = [(x(s), y(high)) for s, _, _, high in middle] + [(x(s), y(low)) for s, _, low, _ in reversed(middle)]
            canvas.add("polygon", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in edge), cls=f"band {line.cls}")
    for line, middle in drawn:
        points = [(x(step), y(mean)) for step, mean, _, _ in middle]
        canvas.path(points, f"curve {line.cls}", title=f"{line.name}: {form(middle[-1][1])} at the end")
    return canvas.markup()

"""The small picture in a line of the table: mean, interval and seeds on an axis that all lines share."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from limbeck.report.charts.svg import Canvas, Scale, ticks
from limbeck.report.words import percent

_WIDTH, _HEIGHT = 220, 26


def scale_for(values: Sequence[float]) -> Scale:
    """An axis that holds all of some shares, but for those far below the rest, which would press them together."""
    ordered = sorted(values)
    cuts = [
        i
        for i in range(1, len(ordered) // 2 + 1)
        if len(ordered) - i > 2 and ordered[i] - ordered[i - 1] > 2 * (ordered[-1] - ordered[i]) > 0
    ]
    low, high = ordered[cuts[-1] if cuts else 0], ordered[-1]
    pad = 0.06 * (high - low) or 0.01
    return Scale(low - pad, high + pad, 8, _WIDTH - 8)


def span(
    name: str,
    mean: float,
    ends: Sequence[float] | None,
    seeds: Sequence[float],
    scale: Scale,
    marks: Sequence[float],
    cls: str,
) -> Markup:
    """One line's picture.

    Args:
        name: Of the line.
        mean: Its mean.
        ends: Of its interval; cut where they leave the axis.
        seeds: The single results.
        scale: The shared axis; what lies left of it is told by an arrow.
        marks: Values to mark in every line: the best control's mean, say.
        cls: Class of colour.
    """
    canvas = Canvas(_WIDTH, _HEIGHT, f"{name}: {percent(mean)}%")
    middle = _HEIGHT / 2
    for value in ticks(scale.low, scale.high, 4):
        canvas.line(scale(value), 0, scale(value), _HEIGHT, "grid")
    for value in marks:
        canvas.line(scale(value), 0, scale(value), _HEIGHT, "mark")
    if scale(mean) < 1:
        middle_left = f"10,{middle - 5} 2,{middle} 10,{middle + 5}"
        canvas.add(
            "polygon", points=middle_left, cls=f"arrow {cls}", title=f"{name}: {percent(mean, 2)}%, off the axis"
        )
        return canvas.markup()
    if ends is not None:
        low, high = (min(max(scale(e), 1), _WIDTH - 1) for e in ends)
        canvas.line(low, middle, high, middle, f"whisker {cls}")
    for value in seeds:
        canvas.add("circle", cx=scale(value), cy=middle, r=2.6, cls=f"seed {cls}", title=f"{percent(value, 2)}%")
    canvas.add("circle", cx=scale(mean), cy=middle, r=4.6, cls=f"dot {cls}", title=f"{name}: mean {percent(mean, 2)}%")
    return canvas.markup()


def axis(scale: Scale, called: str = "accuracy") -> Markup:
    """The numbers below the last line."""
    canvas = Canvas(_WIDTH, 18, f"{called} in percent")
    for value in ticks(scale.low, scale.high, 4):
        canvas.text(scale(value), 12, f"{100 * value:g}", anchor="middle")
    return canvas.markup()

"""The small picture in a line of the table: mean, interval and seeds on an axis that all lines share."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from limbeck.report.charts.svg import Canvas, Scale, ticks
from limbeck.report.figure import Figure

_WIDTH, _HEIGHT = 220, 26


def scale_for(values: Sequence[float], lower: bool = False) -> Scale:
    """An axis that holds all of some values, but for those far worse than the rest, which would press them together.

    Args:
        values: To show.
        lower: Less is better.
    """
    if lower:
        turned = scale_for([-value for value in values])
        return Scale(-turned.high, -turned.low, 8, _WIDTH - 8)
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
    figure: Figure,
) -> Markup:
    """One line's picture.

    Args:
        name: Of the line.
        mean: Its mean.
        ends: Of its interval; cut where they leave the axis.
        seeds: The single results.
        scale: The shared axis; what lies beside it is told by an arrow.
        marks: Values to mark in every line: the best control's mean, say.
        cls: Class of colour.
        figure: What is shown.
    """

    def said(value: float) -> str:
        return figure.said(value, more=1) + ("%" if figure.share else "")

    canvas = Canvas(_WIDTH, _HEIGHT, f"{name}: {said(mean)}")
    middle = _HEIGHT / 2
    for value in ticks(scale.low, scale.high, 4):
        canvas.line(scale(value), 0, scale(value), _HEIGHT, "grid")
    for value in marks:
        canvas.line(scale(value), 0, scale(value), _HEIGHT, "mark")
    if not 1 <= scale(mean) <= _WIDTH - 1:
        tip, foot = (2, 10) if scale(mean) < 1 else (_WIDTH - 2, _WIDTH - 10)
        corners = f"{foot},{middle - 5} {tip},{middle} {foot},{middle + 5}"
        canvas.add("polygon", points=corners, cls=f"arrow {cls}", title=f"{name}: {said(mean)}, off the axis")
        return canvas.markup()
    if ends is not None:
        low, high = (min(max(scale(e), 1), _WIDTH - 1) for e in ends)
        canvas.line(low, middle, high, middle, f"whisker {cls}")
    for value in seeds:
        canvas.add("circle", cx=scale(value), cy=middle, r=2.6, cls=f"seed {cls}", title=said(value))
    canvas.add("circle", cx=scale(mean), cy=middle, r=4.6, cls=f"dot {cls}", title=f"{name}: mean {said(mean)}")
    return canvas.markup()


def axis(scale: Scale, figure: Figure) -> Markup:
    """The numbers below the last line."""
    canvas = Canvas(_WIDTH, 18, f"{figure.name}{' in percent' if figure.share else ''}")
    for value in ticks(scale.low, scale.high, 4):
        canvas.text(scale(value), 12, f"{100 * value:g}" if figure.share else f"{value:g}", anchor="middle")
    return canvas.markup()

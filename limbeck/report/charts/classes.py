"""Accuracy by class: a row a class, a dot a model."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from limbeck.report.charts.svg import Canvas, Scale, ticks
from limbeck.report.words import percent

MOST = 30  # classes shown


def by_class(names: Sequence[str], models: Sequence[tuple[str, str, Sequence[float | None]]]) -> Markup:
    """Dots on one line for each class; the line spans from the worst model to the best.

    Args:
        names: Of the classes.
        models: Name, class of colour, and accuracy by class.
    """
    order = sorted(range(len(names)), key=lambda c: -_spread([values[c] for _, _, values in models]))[:MOST]
    order.sort()
    known = [v for _, _, values in models for c in order if (v := values[c]) is not None]
    low = min(known, default=0.0)
    low = max(0.0, (int(low * 20) - 1) / 20)  # down to a step of five percent
    left = 14 + 6.3 * max(len(_short(names[c])) for c in order)
    height = 22.0 * len(order) + 34
    canvas = Canvas(420, height, f"Accuracy by class: {', '.join(name for name, _, _ in models)}")
    x = Scale(low, 1.0, left, 408)
    for value in ticks(low, 1.0, 5):
        canvas.line(x(value), 8, x(value), height - 26, "grid")
        canvas.text(x(value), height - 12, f"{100 * value:.0f}", anchor="middle")
    canvas.text(0, height - 12, "accuracy %")
    for row, c in enumerate(order):
        y = 18 + 22.0 * row
        canvas.text(left - 8, y + 4, _short(names[c]), anchor="end")
        values = [v for _, _, vs in models if (v := vs[c]) is not None]
        if values:
            canvas.line(x(min(values)), y, x(max(values)), y, "range")
        for name, cls, vs in models:
            share = vs[c]
            if share is not None:
                says = f"{name}, {names[c]}: {percent(share)}%"
                canvas.add("circle", cx=x(share), cy=y, r=4.5, cls=f"dot {cls}", title=says)
    return canvas.markup()


def _spread(values: Sequence[float | None]) -> float:
    known = [v for v in values if v is not None]
    return max(known) - min(known) if known else 0.0


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"

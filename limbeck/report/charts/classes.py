"""Accuracy by class: a row a class, a dot a model."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from limbeck.report.charts.svg import Canvas, Scale, ticks
from limbeck.report.words import heading, percent

MOST = 30  # classes shown


def by_class(
    names: Sequence[str], models: Sequence[tuple[str, str, Sequence[float | None]]], called: str = "accuracy"
) -> list[Markup]:
    """Dots on one line for each class; the line spans from the worst model to the best. Many classes fill two pictures.

    Args:
        names: Of the classes.
        models: Name, class of colour, and accuracy by class.
        called: What is shown, where that is not accuracy.
    """
    order = sorted(range(len(names)), key=lambda c: -_spread([values[c] for _, _, values in models]))[:MOST]
    order.sort()
    known = [v for _, _, values in models for c in order if (v := values[c]) is not None]
    low = max(0.0, (int(min(known, default=0.0) * 20) - 1) / 20)  # down to a step of five percent
    half = (len(order) + 1) // 2 if len(order) > 5 else len(order)
    left = 16 + 6.3 * max(len(_short(names[c])) for c in order)
    return [_picture(part, low, left, names, models, called) for part in (order[:half], order[half:]) if part]


def _picture(
    order: Sequence[int],
    low: float,
    left: float,
    names: Sequence[str],
    models: Sequence[tuple[str, str, Sequence[float | None]]],
    called: str,
) -> Markup:
    height = 24.0 * len(order) + 44
    canvas = Canvas(420, height, f"{heading(called)} by class: {', '.join(name for name, _, _ in models)}")
    x = Scale(low, 1.0, left, 408)
    for value in ticks(low, 1.0, 5):
        canvas.line(x(value), 6, x(value), height - 36, "grid")
        canvas.text(x(value), height - 21, f"{100 * value:.0f}", anchor="middle")
    canvas.text(408, height - 4, f"{called} %", anchor="end")
    for row, c in enumerate(order):
        y = 18 + 24.0 * row
        canvas.text(left - 10, y + 4, _short(names[c]), anchor="end")
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

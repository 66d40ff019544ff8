"""Reliability diagrams: how often a model is right, by how sure it says it is."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from limbeck.report.charts.svg import Canvas, Scale, axes
from limbeck.report.words import percent


def reliability(name: str, bins: dict[str, Any], cls: str) -> Markup:
    """Bars of accuracy by confidence, the diagonal of a calibrated model, and below it where the confidences lie."""
    canvas = Canvas(300, 316, f"Reliability of {name}: accuracy by confidence")
    x, y = Scale(0, 1, 38, 290), Scale(0, 1, 232, 22)
    shares = {v: f"{100 * v:.0f}" for v in (0, 0.25, 0.5, 0.75, 1)}
    axes(canvas, x, y, {}, shares)
    edges, counts, total = bins["edges"], bins["count"], sum(bins["count"]) or 1
    for low, high, n, right, sure in zip(edges, edges[1:], counts, bins["accuracy"], bins["confidence"], strict=False):
        if not n:
            continue
        left, wide = x(low) + 0.75, x(high) - x(low) - 1.5
        says = f"{n} samples {percent(sure)}% sure, {percent(right)}% right"
        canvas.add("rect", x=left, y=y(right), width=wide, height=y(0) - y(right), cls=f"bar {cls}", title=says)
        top, tall = min(y(right), y(sure)), abs(y(right) - y(sure))
        canvas.add("rect", x=left, y=top, width=wide, height=tall, cls="gap", title=says)
        share = n / total
        canvas.add("rect", x=left, y=262.0, width=wide, height=max(30 * share, 0.6), cls=f"bar {cls}", title=says)
    canvas.line(x(0), y(0), x(1), y(1), "diagonal")
    for value, text in shares.items():
        canvas.text(x(value), 249, text, anchor="middle")
    canvas.line(38, 262, 290, 262, "axis")
    canvas.text(38, 312, "share of samples")
    canvas.text(290, 312, "confidence %", anchor="end")
    canvas.text(0, 11, "accuracy %")
    return canvas.markup()

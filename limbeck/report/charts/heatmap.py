"""A heat map of layer pairs."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from limbeck.report.charts.svg import Canvas

_NUMBERS = 9  # above so many columns a cell has no room for its number


def heatmap(name: str, cka: dict[str, Any]) -> Markup:
    """The student's layers from top to bottom, the teacher's from left to right; the darker, the more alike."""
    rows, columns = cka["student"], cka["teacher"]
    longest = max((len(_short(r)) for r in rows), default=0)
    left = 22 + 6.3 * longest
    cell = (412 - left) / max(len(columns), 1)
    tall = min(cell, 40.0)
    depth = 10 + 4.0 * max((len(_short(c)) for c in columns), default=0)
    canvas = Canvas(420, 30 + tall * len(rows) + depth, f"CKA of {name} and its teacher by layer")
    canvas.text(left, 12, "teacher →", cls="tick")
    canvas.text(0, 12, "student ↓", cls="tick")
    for i, row in enumerate(rows):
        top = 18 + i * tall
        canvas.text(left - 6, top + tall / 2 + 4, _short(row), anchor="end")
        for j, column in enumerate(columns):
            value = cka["matrix"][i][j]
            x = left + j * cell
            says = f"{row} and {column}: {'not defined' if value is None else f'{value:.2f}'}"
            strength = 0.0 if value is None else min(max(value, 0.0), 1.0) ** 2  # most pairs lie high: spread those
            canvas.add("rect", x=x, y=top, width=cell, height=tall, cls="cell-back")
            canvas.add("rect", x=x, y=top, width=cell, height=tall, cls="cell", fill_opacity=strength, title=says)
            if len(columns) <= _NUMBERS:
                text = "–" if value is None else f"{value:.2f}".replace("-", "\u2212")
                tone = "cell-text strong" if strength > 0.5 else "cell-text"
                canvas.text(x + cell / 2, top + tall / 2 + 4, text, cls=tone, anchor="middle")
    under = 18 + len(rows) * tall + 12
    for j, column in enumerate(columns):
        x = left + (j + 0.5) * cell + 3
        turn = f"rotate(-40 {x:.1f} {under:.1f})"
        canvas.text(x, under, _short(column), anchor="end", turn=turn)
    return canvas.markup()


def _short(name: str) -> str:
    return name if len(name) <= 16 else f"…{name[-15:]}"

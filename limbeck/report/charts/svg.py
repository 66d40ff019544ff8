"""What all charts are drawn with: a canvas, scales, ticks. Texts are escaped; colours are classes of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from markupsafe import Markup


@dataclass
class Canvas:
    """An SVG picture of fixed proportions that fills the width it is given.

    Args:
        width, height: In units of the picture; one is about a pixel on a phone.
        label: What it shows, for those who cannot see it.
    """

    width: float
    height: float
    label: str
    parts: list[str] = field(default_factory=list)

    def add(self, tag: str, text: str | None = None, title: str | None = None, **attributes: object) -> None:
        """An element; ``cls`` is its class, ``_`` in names stands for ``-``."""
        names = {"cls": "class"}
        said = "".join(
            f' {names.get(k, k.replace("_", "-"))}="{escape(_short(v))}"'
            for k, v in attributes.items()
            if v is not None
        )
        inside = (f"<title>{escape(title)}</title>" if title else "") + (escape(text) if text is not None else "")
        self.parts.append(f"<{tag}{said}>{inside}</{tag}>" if inside else f"<{tag}{said}/>")

    def text(
        self, x: float, y: float, text: str, cls: str = "tick", anchor: str = "start", turn: str | None = None
    ) -> None:
        """A text; ``turn`` is its transform."""
        self.add("text", text, x=x, y=y, cls=cls, text_anchor=anchor, transform=turn)

    def line(self, x1: float, y1: float, x2: float, y2: float, cls: str) -> None:
        """A straight line."""
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, cls=cls)

    def path(self, points: Sequence[tuple[float, float]], cls: str, title: str | None = None) -> None:
        """A line through points."""
        steps = " ".join(f"{_short(x)},{_short(y)}" for x, y in points)
        self.add("polyline", points=steps, cls=cls, title=title)

    def markup(self) -> Markup:
        """The whole picture."""
        size = f"{_short(self.width)} {_short(self.height)}"
        head = f'<svg viewBox="0 0 {size}" role="img" aria-label="{escape(self.label)}">'
        return Markup(head + "".join(self.parts) + "</svg>")


@dataclass(frozen=True)
class Scale:
    """From values to places along one side."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        share = (value - self.low) / span if span else 0.5
        return self.start + share * (self.end - self.start)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from low to high.

    >>> ticks(0.0, 1.0, 5)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if not high > low:
        return [low]
    raw = (high - low) / max(wanted, 1)
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * m for m in (1, 2, 2.5, 5, 10) if base * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def axes(canvas: Canvas, x: Scale, y: Scale, x_ticks: dict[float, str], y_ticks: dict[float, str]) -> None:
    """Grid lines and their numbers."""
    for value, text in y_ticks.items():
        canvas.line(x.start, y(value), x.end, y(value), "grid")
        canvas.text(x.start - 6, y(value) + 3.5, text, anchor="end")
    for value, text in x_ticks.items():
        canvas.text(x(value), y.start + 15, text, anchor="middle")
    canvas.line(x.start, y.start, x.end, y.start, "axis")


def _short(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)

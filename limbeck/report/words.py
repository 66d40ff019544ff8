"""Numbers and findings as people read them."""

from __future__ import annotations

import math
from typing import Any

MINUS = "\u2212"


def heading(name: str) -> str:
    """A name at the beginning of a line.

    >>> heading("average precision"), heading("mAP")
    ('Average precision', 'mAP')
    """
    return name[0].upper() + name[1:] if name[:2].islower() else name


def number(value: float | None, digits: int = 2) -> str:
    """A number with so many decimals; a dash where there is none.

    >>> number(-0.5), number(None)
    ('−0.50', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", MINUS)  # + 0.0: there is no minus nought


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage, without the sign.

    >>> percent(0.9234)
    '92.3'
    """
    return number(None if value is None else 100 * value, digits)


def signed(value: float | None, digits: int = 1, times: float = 100) -> str:
    """A difference with its sign: of shares in points, of other numbers (``times`` 1) as it is.

    >>> signed(0.0123), signed(-0.0123), signed(-0.25, 2, 1)
    ('+1.2', '−1.2', '−0.25')
    """
    text = number(None if value is None else times * value, digits)
    return text if value is None or text.startswith(MINUS) or float(text) == 0 else f"+{text}"


def count(value: float | None) -> str:
    """A count of things to three digits.

    >>> count(1634), count(853018), count(23_500_000), count(12)
    ('1.63 k', '853 k', '23.5 M', '12')
    """
    if value is None:
        return "–"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size * 0.9995:
            return f"{value / size:.{max(0, 2 - math.floor(math.log10(value / size * 1.0005)))}f} {unit}"
    return f"{value:.0f}"


def times(value: float) -> str:
    """How many times as much.

    >>> times(18.42), times(1289.7)
    ('18.4', '1290')
    """
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def who_learns(recipe: dict[str, Any], own: float | None, other: float | None) -> str:
    """Student and teacher by the names of their models, told apart by their sizes where the names are the same.

    >>> who_learns({"student": {"model": "resnet8"}, "teacher": {"model": "resnet56"}}, 78_000, 850_000)
    'resnet8 learns from resnet56'
    """
    student, teacher = ((recipe.get(role) or {}).get("model") for role in ("student", "teacher"))
    if not student or not teacher:
        return str(student or "A run of limbeck")
    if student == teacher and own and other and own != other:
        return f"{student} ({count(own)}) learns from {teacher} ({count(other)})"
    return f"{student} learns from {teacher}"


def duration(seconds: float | None) -> str:
    """A time span.

    >>> duration(0.42), duration(75), duration(7300)
    ('0.4 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def digits_for(samples: int) -> int:
    """Decimals of a percentage that so many samples bear."""
    return 1 if samples < 5000 else 2

"""Numbers and findings as people read them."""

from __future__ import annotations

import math
from typing import Any

MINUS = "\u2212"

#: Headline metrics as people say them.
METRICS = {"accuracy": "accuracy", "map_macro": "mAP"}


def metric_of(comparison: dict[str, Any]) -> tuple[str, str]:
    """What a comparison compares by: its key, and what people call it.

    >>> metric_of({"metric": "map_macro"})
    ('map_macro', 'mAP')
    """
    key = comparison.get("metric", "accuracy")
    return key, METRICS.get(key, key)


def heading(name: str) -> str:
    """A name at the beginning of a line.

    >>> heading("average precision"), heading("mAP")
    ('Average precision', 'mAP')
    """
    return name[0].upper() + name[1:] if name[:2].islower() else name


def headline_of(facts: dict[str, Any]) -> str | None:
    """The headline metric that a run's facts have, if any."""
    return next((key for key in METRICS if facts.get(key) is not None), None)


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


def signed(value: float | None, digits: int = 1) -> str:
    """A difference of shares in points, with its sign.

    >>> signed(0.0123), signed(-0.0123)
    ('+1.2', '−1.2')
    """
    text = percent(value, digits)
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


def interval(facts: dict[str, Any] | None, digits: int, sign: bool = False) -> str:
    """An interval of shares (cut at 0 and 100) or of differences: ``"91.2 to 93.0"``; empty where there is none."""
    if not facts or not facts.get("interval"):
        return ""
    low, high = facts["interval"]
    if sign:
        return f"{signed(low, digits)} to {signed(high, digits)}"
    return f"{percent(max(low, 0.0), digits)} to {percent(min(high, 1.0), digits)}"


def plus_minus(facts: dict[str, Any] | None, digits: int) -> str:
    """A mean with half its interval: ``"92.1 ± 0.9"``."""
    if not facts:
        return "–"
    mean = percent(facts["mean"], digits)
    if not facts.get("interval"):
        return mean
    return f"{mean} ± {percent((facts['interval'][1] - facts['interval'][0]) / 2, digits)}"


def named(comparison: dict[str, Any], entry: str | None) -> str:
    """What people call a line of a comparison."""
    return next((row["name"] for row in comparison["methods"] if row["entry"] == entry), str(entry))


def verdict(gain: dict[str, Any] | None) -> str:
    """A difference in one or two words."""
    if gain is None:
        return ""
    if gain["verdict"] == "unclear":
        return "within noise" if gain.get("interval") else "one seed"
    return str(gain["verdict"])


def findings(comparison: dict[str, Any]) -> list[str]:
    """What a comparison says, in sentences: first what is above or below the best control, then what is not told."""
    digits, seeds = digits_for(comparison["data"]["samples"]), len(comparison["seeds"])
    methods = [row for row in comparison["methods"] if row["role"] == "method"]
    best = comparison.get("best_control")
    if best is None:
        return ["There are no controls in this comparison, so nothing here can be called a gain."]
    control = named(comparison, best)
    if all(row["gain"] is None or row["gain"]["interval"] is None for row in methods):
        return ["One seed tells nothing of how results vary, so no difference here is called a gain."]
    said = []
    for kind, words in (("gain", "gains {} points over"), ("loss", "loses {} points to")):
        for row in sorted(methods, key=lambda r: -abs(r["gain"]["mean"]) if r["gain"] else 0):
            if row["gain"] and row["gain"]["verdict"] == kind:
                size = percent(abs(row["gain"]["mean"]), digits)
                span = interval(row["gain"], digits, sign=True)
                said.append(f"{row['name']} {words.format(size)} the best control, {control} (95% interval {span}).")
    unclear = [row for row in methods if row["gain"] and row["gain"]["verdict"] == "unclear"]
    if unclear:
        spans = "; ".join(
            f"{row['name']} {signed(row['gain']['mean'], digits)} ({interval(row['gain'], digits, sign=True)})"
            for row in unclear
        )
        said.append(f"Within noise of the best control, {control}, over {seeds} seeds: {spans}.")
    return said


def cautions(comparison: dict[str, Any]) -> list[str]:
    """How to read the intervals, and what they do not cover."""
    methods = sum(row["role"] == "method" for row in comparison["methods"])
    seeds = len(comparison["seeds"])
    said = [
        f"Intervals are 95%, Student's t over {seeds} seeds; differences are paired by seed. They speak of other seeds "
        "of this training on these data, not of other data, schedules or models.",
        "A difference is called a gain or a loss only where its interval excludes zero. Intervals of results are "
        "shown cut at 0 and 100.",
    ]
    if methods > 1:
        said.append(
            f"Each of the {methods} methods is judged by itself: of twenty that do nothing, one would be expected "
            "outside its interval by chance."
        )
    for name, reason in comparison.get("left_out", {}).items():
        said.append(f"The control {name} was left out: {reason}.")
    if seeds < 5:
        said.append(f"With {seeds} seeds intervals are wide; real differences of a point or less can hide in them.")
    if comparison["data"]["split"] != "test":
        said.append(f"Measured on the {comparison['data']['split']} split: there is no test split in this source.")
    return said

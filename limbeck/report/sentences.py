"""What a comparison says, in sentences."""

from __future__ import annotations

from typing import Any

from limbeck.report.figure import figure_of


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
    figure, seeds = figure_of(comparison), len(comparison["seeds"])
    methods = [row for row in comparison["methods"] if row["role"] == "method"]
    best = comparison.get("best_control")
    if best is None:
        return ["There are no controls in this comparison, so nothing here can be called a gain.", *losses(comparison)]
    control = named(comparison, best)
    if all(row["gain"] is None or row["gain"]["interval"] is None for row in methods):
        told = "One seed tells nothing of how results vary, so no difference here is called a gain."
        return [told, *losses(comparison)]
    said = []
    for kind, words in (("gain", "gains {} points over"), ("loss", "loses {} points to")):
        for row in sorted(methods, key=lambda r: -abs(r["gain"]["mean"]) if r["gain"] else 0):
            if row["gain"] and row["gain"]["verdict"] == kind:
                size, span = figure.said(abs(row["gain"]["mean"])), figure.interval(row["gain"], sign=True)
                told = f"{row['name']} {words.format(size)} the best control"
                if not figure.share:
                    side = "below" if row["gain"]["mean"] < 0 else "above"
                    told = f"A {kind}: the {figure.name} of {row['name']} is {size} {side} that of the best control"
                said.append(f"{told}, {control} (95% interval {span}).")
    unclear = [row for row in methods if row["gain"] and row["gain"]["verdict"] == "unclear"]
    if unclear:
        spans = "; ".join(
            f"{row['name']} {figure.change(row['gain']['mean'])} ({figure.interval(row['gain'], sign=True)})"
            for row in unclear
        )
        said.append(f"Within noise of the best control, {control}, over {seeds} seeds: {spans}.")
    return [*said, *losses(comparison)]


def losses(comparison: dict[str, Any]) -> list[str]:
    """Which methods came to no end, a sentence each."""
    failed = comparison.get("failed", [])
    names = dict.fromkeys(run["name"] for run in failed)
    said = []
    for name in names:
        runs = [run for run in failed if run["name"] == name]
        seeds = ", ".join(str(run["seed"]) for run in runs)
        said.append(f"{name} failed with seed{'s' if len(runs) > 1 else ''} {seeds}: {runs[0]['error'].rstrip('.')}.")
    return said


def cautions(comparison: dict[str, Any]) -> list[str]:
    """How to read the intervals, and what they do not cover."""
    methods = sum(row["role"] == "method" for row in comparison["methods"])
    seeds = len(comparison["seeds"])
    said = [
        f"Intervals are 95%, Student's t over {seeds} seeds; differences are paired by seed. They speak of other seeds "
        "of this training on these data, not of other data, schedules or models.",
        "A difference is called a gain or a loss only where its interval excludes zero."
        + (" Intervals of results are shown cut at 0 and 100." if figure_of(comparison).share else ""),
    ]
    if methods > 1:
        said.append(
            f"Each of the {methods} methods is judged by itself: of twenty that do nothing, one would be expected "
            "outside its interval by chance."
        )
    for name, reason in comparison.get("left_out", {}).items():
        said.append(f"The control {name} was left out: {reason}.")
    if seeds < 5:
        said.append(f"With {seeds} seeds intervals are wide; small differences that are real can hide in them.")
    if comparison["data"]["split"] != "test":
        said.append(f"Measured on the {comparison['data']['split']} split: there is no test split in this source.")
    return said

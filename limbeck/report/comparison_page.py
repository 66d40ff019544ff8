"""What the report of a comparison shows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from limbeck.report.charts.curves import Series, curves
from limbeck.report.charts.span import axis, scale_for, span
from limbeck.report.figure import Figure, figure_of
from limbeck.report.parts import (
    Model,
    by_class_key,
    classes_section,
    environment_lines,
    layers_section,
    reliability_section,
)
from limbeck.report.read import RunFacts, runs_of
from limbeck.report.sentences import cautions, findings, verdict
from limbeck.report.table import caption, has_operations, operations
from limbeck.report.words import count, duration, number, percent, times, who_learns

_COLORS = 8


def comparison_page(comparison: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The page's content by name."""
    runs = runs_of(comparison, folder)
    colors = _colors(comparison)
    recipe = comparison["recipe"]
    return {
        "title": _title(comparison),
        "subtitle": _subtitle(comparison),
        "warning": _warning(comparison),
        "said": findings(comparison),
        "tiles": _tiles(comparison),
        "table": _table(comparison, colors),
        "parts": [s for s in _sections(comparison, runs, colors) if s],
        "command": comparison["command"],
        "environment": environment_lines(comparison["environment"], _about(comparison)),
        "recipe": yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100),
        "footer": "Made by limbeck. Every number in this page is in compare.json beside the command that made it.",
    }


def _title(comparison: dict[str, Any]) -> str:
    recipe, first, teacher = comparison["recipe"], comparison["methods"][0], comparison.get("teacher") or {}
    return who_learns(recipe, first["parameters"], teacher.get("parameters"))


def _subtitle(comparison: dict[str, Any]) -> str:
    seeds, methods = len(comparison["seeds"]), comparison["methods"]
    count_of = {role: sum(row["role"] == role for row in methods) for role in ("method", "control")}
    parts = [f"{n} {role}{'s' if n != 1 else ''}" for role, n in count_of.items()]
    data = comparison["recipe"]["data"]["source"]
    return " · ".join([comparison["name"], f"data {data}", *parts, f"{seeds} seed{'s' if seeds != 1 else ''}"])


def _warning(comparison: dict[str, Any]) -> str | None:
    if comparison["status"] == "finished":
        return None
    done = sum(len(row["runs"]) for row in comparison["methods"])
    return f"This comparison is not finished: {done} runs are in. Start the same command again to go on."


def _colors(comparison: dict[str, Any]) -> dict[str, str]:
    """A class of colour for every line: greys for controls, colours for methods."""
    found: dict[str, str] = {}
    numbers = {"control": 0, "method": 0}
    for row in comparison["methods"]:
        n = numbers[row["role"]]
        numbers[row["role"]] += 1
        found[row["entry"]] = f"k{n % 4} control" if row["role"] == "control" else f"m{n % _COLORS}"
    return found


def _tiles(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    first, teacher = comparison["methods"][0], comparison.get("teacher") or {}
    tiles = [("student", count(first["parameters"]), "parameters")]
    if teacher.get("parameters"):
        share = number(100 * first["parameters"] / teacher["parameters"], 1)
        tiles.append(("teacher", count(teacher["parameters"]), f"parameters; the student has {share} % of them"))
    if first.get("latency_ms") and teacher.get("latency_ms"):
        longer = times(teacher["latency_ms"] / first["latency_ms"])
        note = f"the teacher takes {number(teacher['latency_ms'])} ms, {longer} times as long"
        tiles.append(("latency of one sample", f"{number(first['latency_ms'])} ms", note))
    if first.get("flops") and teacher.get("flops"):
        note = f"the teacher takes {times(teacher['flops'] / first['flops'])} times as many"
        tiles.append(("operations of one sample", count(first["flops"]), note))
    return [{"name": name, "value": value, "note": note} for name, value, note in tiles]


def _table(comparison: dict[str, Any], colors: dict[str, str]) -> dict[str, Any]:
    teacher, rows, figure = comparison.get("teacher"), comparison["methods"], figure_of(comparison)
    means = {row["entry"]: row[figure.key]["mean"] for row in rows}
    values = [run[figure.key] for row in rows for run in row["runs"]]
    scale = scale_for([*values, *means.values()], figure.lower)
    best = comparison["best_control"]
    marks = [means[best]] if best is not None else []
    lines = [_teacher_line(teacher, figure)] if teacher else []
    for row in sorted(rows, key=lambda r: (r["role"], -figure.rank(r[figure.key]["mean"]))):
        lines.append(_line(row, figure, scale, marks, colors[row["entry"]], row["entry"] == best))
    names = (figure.head, "", "vs best control", "", "agree %", "ECE %", "latency ms", "steps", "operations", "s / run")
    columns = [{"name": n, "picture": i == 1} for i, n in enumerate(names)]
    if not has_operations(comparison):
        place = names.index("operations")
        columns.pop(place)
        for line in lines:
            line["cells"].pop(place)
    return {
        "title": "Methods and controls",
        "caption": caption(comparison),
        "columns": columns,
        "rows": lines,
        "axis": axis(scale, figure),
        "notes": cautions(comparison),
    }


def _cell(text: str, name: str = "", cls: str = "", **more: Any) -> dict[str, Any]:
    return {"text": text, "name": name, "cls": cls, "picture": None, "chip": None, "small": None, **more}


def _teacher_line(teacher: dict[str, Any], figure: Figure) -> dict[str, Any]:
    cells = [
        _cell(figure.said(teacher.get(figure.key)), figure.head),
        *(_cell("") for _ in range(4)),
        _cell(number(100 * teacher["ece"], 1) if "ece" in teacher else "", "ECE %"),
        _cell(number(teacher.get("latency_ms")), "latency ms"),
        *(_cell("") for _ in range(3)),
    ]
    return {"name": "Teacher", "about": None, "cls": "teacher", "cells": cells}


def _line(
    row: dict[str, Any],
    figure: Figure,
    scale: Any,
    marks: Sequence[float],
    cls: str,
    best: bool,
) -> dict[str, Any]:
    facts, gain = row[figure.key], row["gain"]
    seeds = [run[figure.key] for run in row["runs"]]
    picture = span(row["name"], facts["mean"], facts["interval"], seeds, scale, marks, cls, figure)
    word = verdict(gain)
    chip = gain["verdict"] if gain and gain["verdict"] != "unclear" else "unclear"
    mark = {"gain": "▲ ", "loss": "▼ "}.get(chip, "")
    judged = (
        _cell(f"{mark}{word}", "", "wide", chip=chip) if word else _cell("best control" if best else "", "", "wide")
    )
    cells = [
        _cell(figure.said(facts["mean"]), figure.head, "first", small=figure.interval(facts) or None),
        _cell("", "", "picture", picture=picture),
        _cell(figure.difference(gain), "over best control", "wide"),
        judged,
        _cell(percent(row["agreement"]["mean"]) if row.get("agreement") else "", "agreement %"),
        _cell(number(100 * row["ece"]["mean"], 1) if row.get("ece") else "", "ECE %"),
        _cell(number(row["latency_ms"]), "latency ms"),
        _cell(str(row["steps"]), "steps"),
        _cell(operations(row), "operations", small=_teachers_part(row)),
        _cell(number(row["seconds"]["mean"], 1), "s / run"),
    ]
    return {"name": row["name"], "about": row.get("about") or None, "cls": row["role"], "cells": cells}


def _teachers_part(row: dict[str, Any]) -> str | None:
    """How much of a line's operations its teacher took."""
    took = row.get("operations") or {}
    return f"teacher {percent(took['teacher'] / took['total'], 0)} %" if took.get("total") else None


def _sections(
    comparison: dict[str, Any], runs: dict[str, list[RunFacts]], colors: dict[str, str]
) -> list[dict[str, Any] | None]:
    if not runs:
        return []
    chosen = _chosen(comparison, runs)
    names = {row["entry"]: row["name"] for row in comparison["methods"]}
    first = {entry: runs[entry][0].result for entry in chosen}
    means = {entry: _mean_classes(runs[entry]) for entry in chosen}
    teacher = next((f["teacher"] for e, f in first.items() if e != "random_teacher" and f.get("teacher")), None)
    models: list[Model] = [("Teacher", "teacher", teacher)] if teacher else []
    pairs = [(names[e], colors[e], first[e]) for e in chosen]
    seed = next((facts["seed"] for facts in first.values()), 0)
    classes = [(names[e], colors[e], means[e]) for e in chosen]
    return [
        _curves(comparison, runs, colors),
        reliability_section([*models, *pairs], f" Seed {seed} is shown."),
        classes_section([*models, *classes], " Means over seeds."),
        layers_section(
            [p for e, p in zip(chosen, pairs, strict=True) if e != "random_teacher"], f" Seed {seed} is shown."
        ),
    ]


def _chosen(comparison: dict[str, Any], runs: dict[str, list[RunFacts]]) -> list[str]:
    """The best control and the two best methods: what the pictures show."""
    methods = [r for r in comparison["methods"] if r["role"] == "method" and r["entry"] in runs]
    figure = figure_of(comparison)
    methods.sort(key=lambda r: -figure.rank(r[figure.key]["mean"]))
    best = comparison["best_control"]
    return [e for e in (best, *(r["entry"] for r in methods[:2])) if e in runs]


def _mean_classes(runs: Sequence[RunFacts]) -> dict[str, Any]:
    """What each class came to over seeds, as ``assess`` gives it for one."""
    tables = [r.result["per_class"] for r in runs if r.result.get("per_class")]
    if not tables:
        return {}
    key = by_class_key(tables[0])
    columns = zip(*(t[key] for t in tables), strict=True)
    known = [[v for v in column if v is not None] for column in columns]
    return {"per_class": {**tables[0], key: [statistics.fmean(c) if c else None for c in known]}}


def _curves(
    comparison: dict[str, Any], runs: dict[str, list[RunFacts]], colors: dict[str, str]
) -> dict[str, Any] | None:
    figures, legend = [], []
    rows = [row for row in comparison["methods"] if row["entry"] in runs]
    figure = figure_of(comparison)
    for key, title, form in (
        (figure.key, f"Validation {figure.head}", lambda v: f"{100 * v if figure.share else v:g}"),
        ("nll", "Validation NLL, nats", lambda v: f"{v:.3g}"),
    ):
        series = [Series(r["name"], colors[r["entry"]], [_points(run, key) for run in runs[r["entry"]]]) for r in rows]
        picture = curves(series, title, form)
        if picture is not None:
            figures.append({"title": title, "picture": picture})
            legend = [{"name": s.name, "cls": s.cls} for s in series]
    if not figures:
        return None
    note = "Mean over seeds; bands from the lowest to the highest seed. Controls are dashed."
    return {"title": "Training", "note": note, "figures": figures, "legend": legend}


def _points(run: RunFacts, key: str) -> list[tuple[float, float]]:
    lines = (line for line in run.history if line.get("split") == "validation")
    return [(line["step"], line[key]) for line in lines if isinstance(line.get(key), (int, float))]


def _about(comparison: dict[str, Any]) -> list[tuple[str, str]]:
    began = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(comparison["started"]))
    return [
        ("begun", began),
        ("took", duration(comparison["seconds"])),
        ("seeds", ", ".join(map(str, comparison["seeds"]))),
    ]

"""What the report of one run shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from limbeck.report.charts.curves import Series, curves
from limbeck.report.figure import BITS, Figure, headline_of
from limbeck.report.parts import (
    Model,
    classes_section,
    environment_lines,
    layers_section,
    reliability_section,
    texts_section,
)
from limbeck.report.read import RunFacts
from limbeck.report.words import count, digits_for, duration, heading, number, percent, who_learns


def run_page(run: RunFacts) -> dict[str, Any]:
    """The page's content by name."""
    result, status = run.result, run.status
    teacher = result.get("teacher") or {}
    models: list[Model] = [("Student", "m0", result)] + ([("Teacher", "teacher", teacher)] if teacher else [])
    layers = layers_section([("Student and teacher", "m0", result)])
    texts = texts_section(result.get("texts"))
    sections = [_curves(run.history), texts, reliability_section(models), classes_section(models[::-1]), layers]
    return {
        "title": who_learns(run.settings, result.get("parameters"), teacher.get("parameters")),
        "subtitle": _subtitle(run),
        "warning": _warning(run),
        "tiles": _tiles(result, teacher),
        "said": _said(result, teacher),
        "parts": [section for section in sections if section],
        "command": "limbeck run recipe.yaml" if run.recipe else None,
        "environment": environment_lines(status.get("environment", {}), _about(run)),
        "recipe": run.recipe,
        "footer": "One run with one seed. Whether it differs from a control by more than noise is for limbeck compare "
        "to say: the same recipe without a teacher, with label smoothing and with a random teacher, over seeds.",
    }


def _subtitle(run: RunFacts) -> str:
    result = run.result
    data = (result.get("data") or {}).get("name") or (result.get("data") or {}).get("source")
    parts = [
        str(result.get("name") or run.name),
        f"data {data}" if data else None,
        f"seed {result['seed']}" if "seed" in result else None,
        f"measured on {result['samples']} {result.get('split', 'held-out')} samples" if "samples" in result else None,
    ]
    return " · ".join(p for p in parts if p)


def _warning(run: RunFacts) -> str | None:
    if run.result.get("split") == "train":
        return (
            "Measured on what it was trained on: there are no held-out data. These figures say little about new data."
        )
    if not run.result:
        state = run.status.get("status", "unknown")
        return (
            f"This run is not finished (status: {state}), so there is nothing to report but how training went so far."
        )
    return None


def _tiles(result: dict[str, Any], teacher: dict[str, Any]) -> list[dict[str, Any]]:
    if not result:
        return []
    digits = digits_for(result.get("samples", 0))
    tiles: list[tuple[str, str, str]] = []

    def versus(key: str, form: Any) -> str:
        return f"teacher {form(teacher[key])}" if teacher.get(key) is not None else ""

    figure = headline_of(result)
    if figure is not None:
        told = lambda v: figure.said(v) + (" %" if figure.share else "")  # noqa: E731
        share = lambda v: f"{percent(v, digits)} %"  # noqa: E731
        tiles.append((figure.name, told(result[figure.key]), versus(figure.key, told)))
        if "ece" in result:
            tiles.append(("calibration error (ECE)", share(result["ece"]), versus("ece", share)))
    if "agreement" in result:
        tiles.append(
            ("agreement with teacher", f"{percent(result['agreement'])} %", f"KL {number(result['kl'], 3)} nats")
        )
    tiles.append(("parameters", count(result["parameters"]), versus("parameters", count)))
    for key, name, form in _WRITING:
        if result.get(key) is not None:
            tiles.append((name, form(result[key]), versus(key, form)))
    if result.get("latency_ms") is not None:
        latency = lambda v: f"{number(v)} ms"  # noqa: E731
        tiles.append(("latency of one sample", latency(result["latency_ms"]), versus("latency_ms", latency)))
    if result.get("flops") is not None:
        tiles.append(("operations of one sample", count(result["flops"]), versus("flops", count)))
    return [{"name": name, "value": value, "note": note} for name, value, note in tiles]


#: Of language models; some of those that went on with held-out prompts.
_WRITING: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("bits_per_byte", "bits per byte", lambda v: number(v, 3)),
    ("rouge_l", "ROUGE-L", lambda v: number(v, 3)),
    ("exact_match", "exact answers", lambda v: f"{percent(v)} %"),
    ("acceptance", "drafts the teacher would accept", lambda v: f"{percent(v)} %"),
    ("tokens_per_second", "tokens a second, written together", lambda v: number(v, 0)),
)


def _said(result: dict[str, Any], teacher: dict[str, Any]) -> list[str]:
    figure = headline_of(result)
    if figure is None:
        return []
    if "agreement" not in result and teacher.get("bits_per_byte") and "bits_per_byte" in result:
        figure = BITS  # of tokens that differ, perplexities do not compare
    sign = " %" if figure.share else ""
    said = f"The student is right on {figure.said(result[figure.key])} % of held-out samples"
    if figure.key != "accuracy":
        said = f"On held-out samples the student's {figure.name} is {figure.said(result[figure.key])}{sign}"
    if teacher.get(figure.key) is not None:
        gap = result[figure.key] - teacher[figure.key]
        points = " points" if figure.share else ""
        side = f"{figure.said(abs(gap))}{points} {'above' if gap > 0 else 'below'}" if gap else "the same as"
        said += f", {side} its teacher's {figure.said(teacher[figure.key])}{sign}"
    if teacher.get("parameters"):
        said += f", with {number(100 * result['parameters'] / teacher['parameters'], 1)} % of its parameters"
    return [f"{said}."]


def _curves(history: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    train = [line for line in history if line.get("split") == "train"]
    checks = [line for line in history if line.get("split") == "validation"]
    figure = next((f for line in checks if (f := headline_of(line)) is not None), Figure("accuracy", "accuracy"))
    reached = [
        Series("validation", "m0", [_points(checks, figure.key)]),
        Series("training batches as seen", "k0 control", [_points(train, figure.key)]),
    ]
    terms = list(dict.fromkeys(name for line in train for name in line.get("terms", {})))[:8]
    losses = [
        Series(name, f"m{i}", [[(line["step"], line["terms"][name]) for line in train if _known(line, name)]])
        for i, name in enumerate(terms)
    ]
    rates = [Series("learning rate", "k0", [_points(train, "lr")])]
    figures = []
    for title, series, form in (
        (heading(figure.head), reached, lambda v: f"{100 * v if figure.share else v:g}"),
        ("Loss by term, before weights", losses, lambda v: f"{v:.3g}"),
        ("Learning rate", rates, lambda v: f"{v:.2g}"),
    ):
        picture = curves(series, title, form)
        if picture is not None:
            legend = [{"name": s.name, "cls": s.cls} for s in series] if len(series) > 1 else None
            figures.append({"title": title, "picture": picture, "legend": legend})
    if not figures:
        return None
    return {"title": "Training", "note": "From metrics.jsonl, by optimizer step.", "figures": figures}


def _known(line: dict[str, Any], name: str) -> bool:
    return isinstance(line.get("terms", {}).get(name), (int, float))


def _points(lines: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(line["step"], line[name]) for line in lines if isinstance(line.get(name), (int, float))]


def _about(run: RunFacts) -> list[tuple[str, str]]:
    training = run.result.get("training", {})
    steps = training.get("steps", run.status.get("steps"))
    seconds = training.get("seconds", run.status.get("seconds"))
    pairs = (
        ("status", run.status.get("status")),
        ("steps", steps),
        ("training time", duration(seconds) if seconds is not None else None),
        ("precision", run.status.get("precision")),
        ("processes", run.status.get("ranks")),
    )
    return [(name, str(value)) for name, value in pairs if value is not None]

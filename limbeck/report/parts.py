"""Sections that the pages of runs and of comparisons share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from limbeck.report.charts.classes import MOST, by_class
from limbeck.report.charts.heatmap import heatmap
from limbeck.report.charts.reliability import reliability
from limbeck.report.words import heading, number

Section = dict[str, Any]
Model = tuple[str, str, dict[str, Any]]  # name, class of colour, facts as analysis.assess gives them


def reliability_section(models: Sequence[Model], which: str = "") -> Section | None:
    """How sure and how right some models are; ``which`` says of which seed."""
    known = [(name, cls, facts) for name, cls, facts in models if facts.get("reliability")]
    if not known:
        return None
    figures = [
        {
            "title": name,
            "square": True,
            "picture": reliability(name, facts["reliability"], cls.split()[0]),
            "note": f"calibration error (ECE) {number(100 * facts['ece'], 1)} points, NLL {number(facts['nll'], 3)}",
        }
        for name, cls, facts in known
    ]
    note = (
        "Samples by the confidence of the class named first. A calibrated model's bars end on the diagonal; red marks "
        f"what is missing or too much.{which}"
    )
    return {"title": "Calibration", "note": note, "figures": figures}


def by_class_key(table: dict[str, Any]) -> str:
    """What a table by class tells: accuracy, or average precision where a sample may have several labels."""
    return "accuracy" if "accuracy" in table else "average_precision"


def classes_section(models: Sequence[Model], which: str = "") -> Section | None:
    """Accuracy or average precision by class of some models; ``which`` says over which seeds."""
    known = [m for m in models if m[2].get("per_class")]
    key = by_class_key(known[0][2]["per_class"]) if known else ""
    if not known or len(known[-1][2]["per_class"][key]) < 2:
        return None
    size, called = len(known[0][2]["per_class"][key]), key.replace("_", " ")
    known = [m for m in known if len(m[2]["per_class"][key]) == size]
    names = known[0][2]["per_class"].get("names") or [str(c) for c in range(size)]
    pictures = by_class(names, [(name, cls, facts["per_class"][key]) for name, cls, facts in known], called)
    few = f" The {MOST} classes on which the models differ most are shown, of {size}." if size > MOST else ""
    return {
        "title": f"{heading(called)} by class",
        "note": f"Where the models differ, and where all of them fail.{few}{which}",
        "figures": [{"picture": picture} for picture in pictures],
        "legend": [{"name": name, "cls": cls} for name, cls, _ in known],
    }


def layers_section(models: Sequence[Model], which: str = "") -> Section | None:
    """CKA of some students with the teacher; ``which`` says of which seed."""
    known = [(name, facts["cka"]) for name, _, facts in models if facts.get("cka")]
    if not known:
        return None
    samples = max(cka["samples"] for _, cka in known)
    return {
        "title": "Which layers see the same",
        "note": f"Linear CKA, unbiased minibatch estimate over {samples} held-out samples: 1 for representations equal "
        f"up to rotation and scale, 0 for unrelated ones. It compares representations, not skill.{which}",
        "figures": [{"title": name, "picture": heatmap(name, cka)} for name, cka in known],
    }


_SHOWN = 6  # texts, and at most so many characters of each
_LONGEST = 600


def texts_section(texts: Sequence[dict[str, str]] | None) -> Section | None:
    """What student and teacher write after held-out prompts, side by side."""
    if not texts:
        return None
    columns = [name for name in ("prompt", "reference", "student", "teacher") if name in texts[0]]
    rows = [[text[name][:_LONGEST] for name in columns] for text in texts[:_SHOWN]]
    note = "Held-out prompts, gone on with by the likeliest token every time. The reference is what the data say."
    return {"title": "What they write", "note": note, "figures": [], "texts": {"columns": columns, "rows": rows}}


def environment_lines(environment: dict[str, Any], more: Sequence[tuple[str, str]] = ()) -> list[tuple[str, str]]:
    """Versions and machine in pairs."""
    return [*more, *((name, str(value)) for name, value in environment.items() if value not in (None, ""))]

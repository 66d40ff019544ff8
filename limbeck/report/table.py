"""A comparison as a table: for the terminal, and as Markdown for pages made from committed results."""

from __future__ import annotations

from typing import Any

from limbeck.report.figure import figure_of
from limbeck.report.sentences import losses, verdict
from limbeck.report.words import count, heading, number, percent


def columns(comparison: dict[str, Any]) -> tuple[str, ...]:
    """The table's head; operations stand there where they were counted."""
    counted = ("operations",) if has_operations(comparison) else ()
    rest = ("vs best control", "", "agreement %", "parameters", "latency ms", "steps", *counted, "s / run")
    return ("", figure_of(comparison).head, *rest)


def has_operations(comparison: dict[str, Any]) -> bool:
    """Whether the operations of its runs were counted."""
    return any((row.get("operations") or {}).get("total") for row in comparison["methods"])


def rows(comparison: dict[str, Any]) -> list[tuple[str, ...]]:
    """The teacher, the controls, the methods; one cell for each of ``columns``."""
    figure, counted = figure_of(comparison), has_operations(comparison)
    found: list[tuple[str, ...]] = []
    teacher = comparison.get("teacher")
    if teacher:
        cost = (count(teacher.get("parameters")), number(teacher.get("latency_ms")))
        rest = ("",) * (len(columns(comparison)) - 7)
        found.append(("teacher", figure.said(teacher.get(figure.key)), "", "", "", *cost, *rest))
    for row in sorted(comparison["methods"], key=lambda r: r["role"]):
        found.append(
            (
                row["name"],
                figure.plus_minus(row[figure.key]),
                figure.difference(row["gain"]),
                verdict(row["gain"]) or ("best control" if row["entry"] == comparison["best_control"] else "control"),
                percent(row["agreement"]["mean"]) if row.get("agreement") else "–",
                count(row["parameters"]),
                number(row["latency_ms"]),
                str(row["steps"]),
                *([operations(row)] if counted else []),
                number(row["seconds"]["mean"], 1),
            )
        )
    return found


def operations(row: dict[str, Any]) -> str:
    """Floating-point operations of a line's training, the teacher's answers included; a dash where nobody counted."""
    total = (row.get("operations") or {}).get("total")
    return count(total) if total else "–"


def caption(comparison: dict[str, Any]) -> str:
    """What the numbers are."""
    seeds, figure, data = len(comparison["seeds"]), figure_of(comparison), comparison["data"]
    spread = f"mean and 95% interval (Student's t) over {seeds} seeds" if seeds > 1 else "one seed, so no intervals"
    return (
        f"{heading(figure.name)} on {data['samples']} {data['split']} samples, {spread}; "
        f"differences{' in points' if figure.share else ''}, paired by seed. "
        f"A gain is a difference{' below zero' if figure.lower else ''} whose interval excludes zero."
    )


def markdown_table(comparison: dict[str, Any]) -> str:
    """The table as Markdown, with what its numbers are and the command that made it.

    Args:
        comparison: The content of a ``compare.json``.

    Returns:
        Text for a page; made again from the same file it is the same text.
    """
    names = [name or " " for name in columns(comparison)]
    lines = [_line(names), _line(["---"] + ["---:"] * 2 + ["---"] + ["---:"] * (len(names) - 4))]
    lines += [_line(row) for row in rows(comparison)]
    environment = comparison["environment"]
    made = f"`{comparison['command']}` with torch {environment['torch']}, {environment['threads']} threads"
    told = " ".join([caption(comparison), *losses(comparison), f"Made by {made}."])
    return "\n".join([*lines, "", told, ""])


def _line(cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

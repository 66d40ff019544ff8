"""The pages about methods: one each, an overview with a table and a way to choose, and their lines in comparisons."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.core.catalogue import Card, Method
from limbeck.core.objective import Objective
from limbeck.recipes.document import dump
from limbeck.recipes.schema import usual
from limbeck.report.figure import figure_of
from limbeck.report.sentences import verdict

ROOT = Path(__file__).resolve().parent.parent
COSTS = ROOT / "benchmarks" / "results" / "method_cost.json"
#: Methods that want one kind of network, as tests/objectives/test_cross_architecture.py finds.
ONE_KIND = ("cakd", "cat_kd", "minilm", "simkd")
SPECIAL = ("multilabel", "regression", "retrieval", "aspects")


@dataclass(frozen=True)
class Facts:
    """A method with what pages ask of it."""

    method: Method
    objective: Objective

    @property
    def taps(self) -> set[str]:
        """Every place it listens to, in either model."""
        return {*self.objective.student_taps, *self.objective.teacher_taps}

    @property
    def teacherless(self) -> bool:
        return not self.objective.teacher_taps

    @property
    def answers_only(self) -> bool:
        """Logits are all it asks of the teacher."""
        return set(self.objective.teacher_taps) == {"logits"}

    @property
    def labels(self) -> bool:
        return "labels" in self.method.card.needs

    @property
    def plain(self) -> bool:
        """It is for classification with one class a sample."""
        return bool(set(self.method.card.tasks) - set(SPECIAL)) and self.method.card.knowledge != "control"

    @property
    def free_classes(self) -> bool:
        """Teacher and student may have different classes: no answer of the one is compared with the other's."""
        taps = self.objective.teacher_taps
        return not self.teacherless and not any(tap.startswith("logits") for tap in taps)


#: What one has, and which methods then apply; told from cards and classes, so that it cannot go stale.
QUESTIONS: tuple[tuple[str, str, Callable[[Facts], bool]], ...] = (
    (
        "Only the teacher's logits (an API, a cache, a model that cannot be opened)",
        "Response methods. Start with `kd`; where the teacher is much stronger than the student try those that do not "
        "ask for exact probabilities.",
        lambda f: f.plain and f.answers_only and set(f.objective.student_taps) <= {"logits", "penultimate", "stages"},
    ),
    (
        "No labels",
        "Methods that work on unlabelled inputs; drop `cross_entropy` from their usual sum.",
        lambda f: f.plain and not f.labels and not f.teacherless,
    ),
    (
        "Teacher and student with different classes (or a teacher without a classifier)",
        "Methods that compare features or relations and never the two models' answers.",
        lambda f: f.plain and f.free_classes,
    ),
    (
        "Different architectures (convolutional and transformer)",
        "Responses cross by themselves. Of features and relations these train both ways, maps turned into tokens and "
        "back; in a plain ViT, which has one resolution, name `blocks` where a method asks for stages.",
        lambda f: f.plain and f.method.card.knowledge != "response" and f.method.card.key not in ONE_KIND,
    ),
    (
        "Few classes (two or three)",
        "With two classes a teacher's answer holds little; these take more from it.",
        lambda f: f.method.card.key in ("lelp", "dhkd", "logit_mse") or "few classes" in f.method.card.tasks,
    ),
    (
        "Many labels a sample",
        "Each class is a yes or no of its own.",
        lambda f: "multilabel" in f.method.card.tasks,
    ),
    ("Numbers to predict (coordinates, landmarks)", "Regression.", lambda f: "regression" in f.method.card.tasks),
    ("Pairs to match (images and texts)", "Retrieval.", lambda f: "retrieval" in f.method.card.tasks),
    (
        "Answers to questions about each sample (from a language model)",
        "They are learned beside the labels.",
        lambda f: "aspects" in f.method.card.tasks,
    ),
    ("No teacher", "Self-distillation and virtual teachers.", lambda f: f.plain and f.teacherless),
    (
        "Dense predictions (detection, segmentation)",
        "They compare every place of a map.",
        lambda f: bool({"detection", "segmentation"} & set(f.method.card.tasks)),
    ),
    (
        "Small batches, gradient accumulation or several ranks",
        "The loss of a batch is the mean over its parts, so cutting it changes nothing.",
        lambda f: f.plain and f.objective.contract.decomposes and not f.teacherless,
    ),
    (
        "Token sequences with padding",
        "They honour a mask over positions.",
        lambda f: f.plain and f.objective.contract.mask and f.objective.contract.normalizer != "samples",
    ),
)


def comparisons() -> dict[str, dict[str, Any]]:
    """Every committed comparison, by its name."""
    found = {}
    for path in sorted((ROOT / "results").glob("*.json")):
        facts = json.loads(path.read_text())
        if facts.get("kind") == "comparison":
            found[path.stem] = facts
    return found


def method_page(method: Method) -> str:
    """One method's page, from its card, its contract, its docstrings and what was measured."""
    card, contract, objective = method.card, method.cls.contract, method.build()
    lines = [
        *_head(card),
        card.use,
        "",
        f"For {', '.join(card.tasks)}; transfers {card.knowledge}s; scheme `{card.scheme}`.",
        "",
    ]
    lines += ["## Equation", "", f"$${card.equation}$$", ""]
    lines += _options(method)
    lines += ["", "## What it promises", "", f"- The mean runs over {contract.normalizer}."]
    if contract.at_equal is not None:
        lines.append(f"- Where student and teacher agree it is {contract.at_equal:g}.")
    lines.append(f"- It {'honours' if contract.mask else 'has no use for'} `batch.mask`.")
    parts = "the weighted mean over its parts" if contract.decomposes else "not the mean over its parts"
    lines.append(f"- The value over a batch is {parts}.")
    if contract.temperature:
        scale = "keeps its size" if contract.temperature == "squared" else "falls as 1/T²"
        lines.append(f"- When the temperature T rises, the gradient {scale}.")
    lines.append(f"- It needs: {', '.join([*_places(objective), *card.needs]) or 'nothing but inputs'}.")
    lines += ["", *_evidence(card)]
    lines += ["", *_cost(card.key, card.cost), *_results(card.key)]
    lines += ["## Use", "", "```yaml", dump({"loss": usual(card.key)}).rstrip(), "```", ""]
    if method.function is not None:
        name, signature = method.function.__name__, inspect.signature(method.function)
        given = [p.name for p in signature.parameters.values() if p.default is p.empty or p.name in card.needs]
        call = f"loss = limbeck.functional.{name}({', '.join(given)})"
        if len(call) > 120:  # as the formatter would have it
            call = f"loss = limbeck.functional.{name}(\n    {', '.join(given)}\n)"
        lines += ["```python", call, "```", ""]
    return "\n".join(lines)


def scheme_page(method: Method) -> str:
    """One scheme's page, from its card and its signature."""
    card = method.card
    shown = {n: p.default for n, p in inspect.signature(method.cls).parameters.items()}
    recipe = dump({"loss": "kd", "scheme": {card.key: shown} if shown else card.key})
    lines = [*_head(card), card.use, "", f"For {', '.join(card.tasks)}; a scheme, with any loss.", ""]
    lines += ["## Equation", "", f"$${card.equation}$$", "", *_options(method), "", *_evidence(card)]
    return "\n".join([*lines, "", "## Use", "", "```yaml", recipe.rstrip(), "```", ""])


def _head(card: Card) -> list[str]:
    paper = f"[arXiv {card.arxiv}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else "no arXiv number"
    code = f", code [{card.code}](https://github.com/{card.code})" if card.code else ""
    return [f"# {card.name} (`{card.key}`)", "", f"*{card.title}*, {card.year}, {paper}{code}.", ""]


def _evidence(card: Card) -> list[str]:
    note = card.evidence_note.rstrip(".")
    lines = ["## Evidence", "", f"**{card.evidence}**: {note}." if note else f"**{card.evidence}**."]
    if card.choices:
        lines += ["", "Choices made where the paper leaves room:", ""]
        lines += [f"- {choice.rstrip('.')}." for choice in card.choices]
    return lines


def _options(method: Method) -> list[str]:
    parameters = inspect.signature(method.cls).parameters
    if not parameters:
        return ["## Options", "", "None."]
    lines = ["## Options", "", "| option | default | where it comes from |", "|---|---|---|"]
    for name, parameter in parameters.items():
        default = method.preset.get(name, parameter.default)
        lines.append(f"| `{name}` | `{default!r}` | {method.card.defaults.get(name, '')} |")
    return lines


def _places(objective: Objective) -> list[str]:
    sides = (("student", objective.student_taps), ("teacher", objective.teacher_taps))
    return sorted({f"the {who}'s {tap}" for who, taps in sides for tap in taps})


def _cost(key: str, reason: str) -> list[str]:
    if not COSTS.is_file():
        return []
    facts = json.loads(COSTS.read_text())
    row = facts["methods"].get(key)
    if row is None:
        return []
    told = f"A step takes {row['time']:.2f} times the time and {row['memory']:.2f} times the memory of one of plain KD"
    return ["## Cost", "", f"{told} ({row['pair']}, batch {facts['batch']}, {facts['device']}). {reason}".rstrip(), ""]


def _results(key: str) -> list[str]:
    rows = []
    for name, facts in comparisons().items():
        figure = figure_of(facts)
        for row in facts["methods"]:
            if row["key"] != key or row["role"] != "method":
                continue
            gain = row["gain"]
            best = next((r["name"] for r in facts["methods"] if r["entry"] == facts["best_control"]), "")
            reached, over = figure.plus_minus(row[figure.key]), figure.difference(gain)
            cells = (name, figure.head, reached, over, best, verdict(gain) or "")
            rows.append(f"| {' | '.join(cells)} |")
    if not rows:
        return []
    head = ["| comparison | figure | reached | over the best control | which is | |", "|---|---|---:|---:|---|---|"]
    return ["## Measured", "", *head, *rows, "", "All of them: [leaderboards](../leaderboards.md).", ""]


def overview(methods: dict[str, Method], schemes: dict[str, Method]) -> str:
    """How to choose, and the tables of all methods and schemes."""
    known = {key: Facts(method, method.build()) for key, method in methods.items()}
    found = Counter(method.card.evidence for method in methods.values())
    counts = ", ".join(f"{found[kind]} {kind}" for kind in ("parity", "formula", "reading") if found[kind])
    lines = ["# Methods", "", f"{len(methods)} methods. Evidence: {counts}.", ""]
    lines += ["- **parity**: values and gradients equal those of the authors' code, or of a known re-implementation."]
    lines += ["- **formula**: equal to the paper's equations, written independently with plain loops."]
    lines += ["- **reading**: the text leaves details open; the method's page says which were chosen and why.", ""]
    lines += ["## What do you have?", "", "First run `kd` with a tuned temperature: it is what others have to beat."]
    for question, advice, applies in QUESTIONS:
        keys = [f"[`{key}`]({key}.md)" for key, facts in known.items() if applies(facts)]
        if keys:
            lines += ["", f"### {question}", "", f"{advice} {', '.join(keys)}."]
    for knowledge, title in (
        ("response", "Responses: what the teacher answers"),
        ("feature", "Features: what it computes on the way"),
        ("relation", "Relations: how samples, places and layers stand to each other"),
        ("control", "Controls"),
    ):
        lines += ["", f"## {title}", "", "| method | paper | evidence | time | memory | when |"]
        lines += ["|---|---|---|---:|---:|---|"]
        lines += [_line(key, m) for key, m in methods.items() if m.card.knowledge == knowledge]
    lines += ["", "Time and memory are those of a training step over a step of plain KD on the same pair:"]
    lines += ["`benchmarks/method_cost.py`.", ""]
    lines += ["## Schemes: who learns from whom", "", "Each goes with any of the methods above.", ""]
    lines += ["| scheme | paper | evidence | when |", "|---|---|---|---|"]
    for key, scheme in schemes.items():
        card = scheme.card
        lines.append(f"| [`{key}`]({key}.md) | {card.title}, {card.year} | {card.evidence} | {card.use} |")
    return "\n".join([*lines, ""])


def summary(methods: dict[str, Method], schemes: dict[str, Method]) -> str:
    """All methods in a few lines, for the README."""
    found = Counter(method.card.evidence for method in methods.values())
    counts = ", ".join(f"{found[kind]} {kind}" for kind in ("parity", "formula", "reading") if found[kind])
    lines = [f"{len(methods)} methods; evidence: {counts}.", ""]
    for knowledge in ("response", "feature", "relation", "control"):
        keys = [f"[{key}](docs/methods/{key}.md)" for key, m in methods.items() if m.card.knowledge == knowledge]
        lines.append(f"- **{knowledge}** ({len(keys)}): {', '.join(keys)}")
    told = [f"[{key}](docs/methods/{key}.md)" for key in schemes]
    lines += ["", f"Schemes, with any of them: {', '.join(told)}."]
    return "\n".join(lines)


def _line(key: str, method: Method) -> str:
    card = method.card
    row = json.loads(COSTS.read_text())["methods"].get(key) if COSTS.is_file() else None
    time, memory = (f"{row['time']:.2f}", f"{row['memory']:.2f}") if row else ("", "")
    return f"| [`{key}`]({key}.md) | {card.title}, {card.year} | {card.evidence} | {time} | {memory} | {card.use} |"

"""Write what is generated: a page a method, the recipe schema, and the tables of the README.

``python docs/build.py`` writes; ``python docs/build.py --check`` says which files are stale and writes nothing.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path

import limbeck.objectives  # noqa: F401  registers the methods
from limbeck.core import catalogue
from limbeck.core.catalogue import Method
from limbeck.recipes.document import dump
from limbeck.recipes.json_schema import json_schema
from limbeck.recipes.schema import usual
from limbeck.report import markdown_table

ROOT = Path(__file__).resolve().parent.parent


def method_page(method: Method) -> str:
    """One method's page, from its card, its contract and its docstrings."""
    card, contract = method.card, method.cls.contract
    paper = f"[arXiv {card.arxiv}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else "no arXiv number"
    code = f", code [{card.code}](https://github.com/{card.code})" if card.code else ""
    lines = [f"# {card.name} (`{card.key}`)", "", f"*{card.title}*, {card.year}, {paper}{code}.", ""]
    lines += [card.use, "", "## Equation", "", f"$${card.equation}$$", ""]
    lines += ["## Options", "", "| option | default | where it comes from |", "|---|---|---|"]
    for name, parameter in inspect.signature(method.cls).parameters.items():
        default = method.preset.get(name, parameter.default)
        lines.append(f"| `{name}` | `{default!r}` | {card.defaults.get(name, '')} |")
    lines += ["", "## What it promises", ""]
    lines.append(f"- The mean runs over {contract.normalizer}.")
    if contract.at_equal is not None:
        lines.append(f"- Where student and teacher agree it is {contract.at_equal:g}.")
    lines.append(f"- It {'honours' if contract.mask else 'has no use for'} `batch.mask`.")
    parts = "the weighted mean over its parts" if contract.decomposes else "not the mean over its parts"
    lines.append(f"- The value over a batch is {parts}.")
    if contract.temperature:
        scale = "keeps its size" if contract.temperature == "squared" else "falls as 1/T²"
        lines.append(f"- When the temperature T rises, the gradient {scale}.")
    lines.append(f"- It needs: {', '.join([*sorted(_models(method)), *card.needs]) or 'nothing but inputs'}.")
    note = card.evidence_note.rstrip(".")
    lines += ["", "## Evidence", "", f"**{card.evidence}**: {note}." if note else f"**{card.evidence}**."]
    if card.choices:
        lines += ["", "Choices made where the paper leaves room:", ""]
        lines += [f"- {choice.rstrip('.')}." for choice in card.choices]
    lines += ["", "## Use", "", "```yaml", dump({"loss": usual(card.key)}).rstrip(), "```", ""]
    if method.function is not None:
        name, signature = method.function.__name__, inspect.signature(method.function)
        given = [p.name for p in signature.parameters.values() if p.default is p.empty or p.name in card.needs]
        lines += ["```python", f"loss = limbeck.functional.{name}({', '.join(given)})", "```", ""]
    return "\n".join(lines)


def _models(method: Method) -> set[str]:
    objective = method.build()
    return {
        f"the {who}'s {tap}"
        for who, taps in (("student", objective.student_taps), ("teacher", objective.teacher_taps))
        for tap in taps
    }


def index_page(methods: dict[str, Method]) -> str:
    """The table of all methods."""
    lines = ["# Methods", "", "| method | knowledge | paper | evidence | when |", "|---|---|---|---|---|"]
    for key, method in methods.items():
        card = method.card
        paper = f"{card.title}, {card.year}"
        lines.append(f"| [`{key}`]({key}.md) | {card.knowledge} | {paper} | {card.evidence} | {card.use} |")
    return "\n".join(lines) + "\n"


def readme(text: str) -> str:
    """The README with each table between its markers made anew from the committed results."""

    def table(match: re.Match[str]) -> str:
        results = json.loads((ROOT / match["file"]).read_text())
        return f"<!-- results: {match['file']} -->\n{markdown_table(results)}\n<!-- end -->"

    return re.sub(r"<!-- results: (?P<file>\S+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def files() -> dict[Path, str]:
    """Everything generated, by path."""
    methods = {k: m for k, m in catalogue.methods().items() if m.cls.__module__.startswith("limbeck.")}
    pages = {ROOT / "docs" / "methods" / f"{key}.md": method_page(method) for key, method in methods.items()}
    pages[ROOT / "docs" / "methods" / "README.md"] = index_page(methods)
    pages[ROOT / "docs" / "recipe.schema.json"] = json.dumps(json_schema(), indent=1, sort_keys=True) + "\n"
    pages[ROOT / "README.md"] = readme((ROOT / "README.md").read_text())
    return pages


def main() -> int:
    """Write the files, or with ``--check`` name the stale ones and return 1."""
    wanted = files()
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text() != text]
    left = set((ROOT / "docs" / "methods").glob("*.md")) - set(wanted)
    if "--check" in sys.argv[1:]:
        for path in [*stale, *left]:
            print(f"stale: {path.relative_to(ROOT)}; run make docs")
        return 1 if stale or left else 0
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[path])
    for path in left:
        path.unlink()
    print(f"{len(wanted)} files, {len(stale)} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())

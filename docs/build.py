"""Write what is generated: pages of methods, the recipe schema, and the tables of README and leaderboards.

``python docs/build.py`` writes; ``python docs/build.py --check`` says which files are stale and writes nothing.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from pages import ROOT, method_page, overview, scheme_page, summary

import limbeck.objectives  # noqa: F401  registers the methods
from limbeck.core import catalogue
from limbeck.core.catalogue import Method
from limbeck.recipes.json_schema import json_schema
from limbeck.report import markdown_table
from limbeck.schemes import carded


def filled(text: str, methods: dict[str, Method]) -> str:
    """A page with what stands between its markers made anew: tables from committed results, the list of methods."""

    def table(match: re.Match[str]) -> str:
        results = json.loads((ROOT / match["file"]).read_text())
        return f"<!-- results: {match['file']} -->\n{markdown_table(results)}\n<!-- end -->"

    listed = f"<!-- methods -->\n{summary(methods, carded())}\n<!-- end -->"
    text = re.sub(r"<!-- methods -->.*?<!-- end -->", lambda _: listed, text, flags=re.DOTALL)
    return re.sub(r"<!-- results: (?P<file>\S+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def files() -> dict[Path, str]:
    """Everything generated, by path."""
    methods = {k: m for k, m in catalogue.methods().items() if m.cls.__module__.startswith("limbeck.")}
    pages = {ROOT / "docs" / "methods" / f"{key}.md": method_page(method) for key, method in methods.items()}
    pages |= {ROOT / "docs" / "methods" / f"{key}.md": scheme_page(scheme) for key, scheme in carded().items()}
    pages[ROOT / "docs" / "methods" / "README.md"] = overview(methods, carded())
    pages[ROOT / "docs" / "recipe.schema.json"] = json.dumps(json_schema(), indent=1, sort_keys=True) + "\n"
    for page in (ROOT / "README.md", ROOT / "docs" / "leaderboards.md"):
        pages[page] = filled(page.read_text(), methods)
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

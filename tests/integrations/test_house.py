"""Integrations stand on the top floor, and nobody pays for a library that is not asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2] / "limbeck"


def imported(file: Path) -> set[str]:
    """Modules of limbeck that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        found.update(name for name in names if name.startswith("limbeck."))
    return found


def test_nothing_below_imports_them() -> None:
    below = [file for file in ROOT.rglob("*.py") if file.parent.name not in ("integrations", "cli")]
    assert len(below) > 100
    assert [f for f in below if any(name.startswith("limbeck.integrations") for name in imported(f))] == []
    own = list((ROOT / "integrations").glob("*.py"))
    assert [f for f in own if any(name.startswith("limbeck.cli") for name in imported(f))] == []


CODE = """
import sys, limbeck
limbeck.integrations
print(sorted({"torch", "transformers", "pytorch_lightning", "lightning"} & set(sys.modules)))
import limbeck.integrations.hosting, limbeck.integrations.reading
print(sorted({"transformers", "pytorch_lightning", "lightning"} & set(sys.modules)))
for name in ("transformers", "pytorch_lightning", "lightning"):
    sys.modules[name] = None
for name in ("transformers", "lightning"):
    try:
        __import__(f"limbeck.integrations.{name}")
    except limbeck.LimbeckError as error:
        print(type(error).__name__, error)
"""


def test_libraries_are_imported_when_they_are_asked_for_and_named_when_missing() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    bare, lower, transformers, lightning = done.stdout.splitlines()
    assert (bare, lower) == ("[]", "[]")
    assert transformers.startswith("MissingExtra the package 'transformers'")
    assert "limbeck[language]" in transformers
    assert "limbeck[lightning]" in lightning

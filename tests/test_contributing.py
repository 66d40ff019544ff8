"""A stranger adds a method from CONTRIBUTING.md alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def method(tmp_path: Path) -> Path:
    """The guide's file, as a reader would copy it."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    path = tmp_path / "cosine_feature.py"
    path.write_text(code)
    return path


def limbeck(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "limbeck.cli.main", *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_it_is_listed(method: Path) -> None:
    done = limbeck("methods", "--plugin", method.name, "--json", cwd=method.parent)
    assert done.returncode == 0, done.stderr
    assert "cosine_feature" in {row["key"] for row in json.loads(done.stdout)}


def test_it_passes_conformance(method: Path) -> None:
    code = "import cosine_feature; from limbeck.testing import check_objective; check_objective('cosine_feature')"
    done = subprocess.run([sys.executable, "-c", code], cwd=method.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_it_trains_from_a_recipe(method: Path) -> None:
    changes = {
        "plugins": f"[{method.name}]",
        "loss": "{cross_entropy: 1, cosine_feature: 1}",
        "train.epochs": "null",
        "train.steps": "4",
        "teacher.train": "{steps: 4}",
    }
    options = [part for place, value in changes.items() for part in ("--set", f"{place}={value}")]
    done = limbeck("run", "digits", *options, "--out", "runs/cosine", cwd=method.parent)
    assert done.returncode == 0, done.stderr
    lines = [
        json.loads(line) for line in (method.parent / "runs" / "cosine" / "metrics.jsonl").read_text().splitlines()
    ]
    assert "cosine_feature" in lines[0]["terms"]

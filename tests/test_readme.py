"""What the README shows works as it stands, and what is generated is current."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from limbeck.recipes import load
from limbeck.recipes.check import check
from limbeck.recipes.document import parse

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def names() -> dict[str, object]:
    """What the README's snippets take for given."""
    torch.manual_seed(0)

    def net(width: int) -> nn.Module:
        layer3 = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.ReLU())
        tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)]
        model = nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), *tail)
        model.insert(2, layer3)
        named = nn.Sequential()
        for i, child in enumerate(model):
            named.add_module("layer3" if child is layer3 else f"part{i}", child)
        return named

    images, labels = torch.randn(160, 1, 8, 8), torch.arange(160) % 3
    logits = {"student_logits": torch.randn(4, 3, requires_grad=True), "teacher_logits": torch.randn(4, 3)}
    return {"torch": torch, "teacher": net(8), "student": net(4), "images": images, "labels": labels, **logits}


def test_one_line() -> None:
    given = names()
    before = [p.clone() for p in given["student"].parameters()]  # type: ignore[attr-defined]
    exec(PYTHON[0], given)
    assert given["distilled"].student is given["student"]  # type: ignore[attr-defined]
    assert any(not torch.equal(a, b) for a, b in zip(before, given["student"].parameters(), strict=True))  # type: ignore[attr-defined]


def test_bare_function() -> None:
    given = names() | {"labels": torch.arange(4) % 3}
    exec(PYTHON[1], given)
    given["loss"].backward()  # type: ignore[attr-defined]
    assert given["student_logits"].grad.abs().sum() > 0  # type: ignore[attr-defined]


def test_own_loop() -> None:
    given = names()
    given["loader"] = [(given["images"], given["labels"])] * 20
    totals = []
    exec(PYTHON[2] + "\n    totals.append(losses.total.item())\n", given | {"totals": totals})
    assert totals[-1] < totals[0]


def test_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    parse(text)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kd.yaml").write_text(text)
    missing = {problem.where for problem in check("kd.yaml")}
    assert missing <= {"data.source", "teacher.weights"}, "files of the reader's own are all that may be missing"
    assert load("kd.yaml", ["data.source=digits", "teacher.weights=null", "teacher.untrained=true"]).name == "kd"


def test_generated_files_are_current() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "build.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr

"""A recipe under torchrun: a teacher that is trained first, then the student, on two ranks, as one run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_recipe_runs_on_two_ranks(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "two"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    changes = ["train.epochs=2", "train.validate_epochs=2", "teacher.train={epochs: 1}", "data.samples=100"]
    options = [part for change in changes for part in ("--set", change)]
    done = subprocess.run(
        [*launcher, "-m", "limbeck.cli.main", "run", "digits", *options, "--out", str(out), "--json"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((out / "run.json").read_text())["ranks"] == 2
    (teacher,) = (tmp_path / "runs" / "teachers").iterdir()
    assert json.loads((teacher / "run.json").read_text())["ranks"] == 2
    result = json.loads((out / "result.json").read_text())
    assert result["samples"] == 359
    assert result["training"]["steps"] == 4

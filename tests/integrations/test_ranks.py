"""Two processes learn what one learns, and say the same of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.integrations.ranks_run import CASES

SCRIPT, ROOT = Path(__file__).with_name("ranks_run.py"), Path(__file__).parents[2]


@pytest.mark.slow
def test_two_ranks_follow_one(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    for command, name in (([sys.executable], "one"), (launch, "two")):
        done = subprocess.run(
            [*command, str(SCRIPT), str(tmp_path / name)], env=environment, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stderr[-3000:]
    for case in CASES:
        one, two = (json.loads((tmp_path / name / case / "said.json").read_text()) for name in ("one", "two"))
        assert (one["world"], two["world"]) == (1, 2)
        own, other = (load_file(tmp_path / name / case / "s.safetensors") for name in ("one", "two"))
        assert max((own[key] - other[key]).abs().max() for key in own) < 1e-7, case
        steps, others = ([line for line in each["logs"] if "learning_rate" in line] for each in (one, two))
        assert len(steps) == 2
        terms = {name for name in steps[0] if name not in ("epoch", "step", "learning_rate")}
        assert len(terms) > 2
        for step, same in zip(steps, others, strict=True):
            assert all(step[name] == pytest.approx(same[name], rel=1e-5) for name in terms), case
        said = [
            name for name in one["eval"] if name.startswith("eval_") and "second" not in name and "time" not in name
        ]
        assert "eval_loss" in said
        assert all(one["eval"][name] == pytest.approx(two["eval"][name], rel=1e-6) for name in said), case


@pytest.mark.slow
def test_two_ranks_of_lightning_follow_one(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning", reason="Lightning is not installed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script, found = SCRIPT.with_name("lightning_run.py"), []
    for world, accumulate in ((1, 1), (2, 1), (2, 2)):
        file = tmp_path / f"{world}-{accumulate}.json"
        command = [sys.executable, str(script), str(file), str(world), str(accumulate)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(file.read_text()))
    assert [each["world"] for each in found] == [1, 2, 2]
    assert "val_kd" in found[0]["told"]
    for each in found[1:]:
        assert each["told"] == pytest.approx(found[0]["told"], rel=1e-6)
        assert max(abs(a - b) for a, b in zip(each["weights"], found[0]["weights"], strict=True)) < 1e-7

"""Two ranks follow one: the same losses step by step, the same scores, the same student."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("ranks_run", HERE / "ranks_run.py")
ranks_run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ranks_run)


def launch(folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    # --multi_gpu is what starts one process a rank; with --cpu accelerate wants an MPI to do that.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    # Another port than the usual, which a neighbour's test may hold.
    options = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [*launcher, *options, str(HERE / "ranks_run.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    ranks_run.main(one)
    launch(two)
    return one, two


def lines(folder: Path, split: str) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["split"] == split]


@pytest.mark.parametrize("name", [name for name in ranks_run.CASES if name != "dropout"])  # ranks draw for themselves
def test_two_ranks_follow_one(folders, name):
    one, two = (folder / name for folder in folders)
    assert json.loads((two / "run.json").read_text())["ranks"] == 2
    alone, together = lines(one, "train"), lines(two, "train")
    assert len(alone) == len(together) == 15
    for a, b in zip(alone, together, strict=True):
        assert b["total"] == pytest.approx(a["total"], abs=1e-5)
        assert b["terms"] == pytest.approx(a["terms"], abs=1e-5)
        assert b["accuracy"] == (pytest.approx(a["accuracy"]) if a["accuracy"] is not None else None)
    for a, b in zip(lines(one, "validation"), lines(two, "validation"), strict=True):
        for key in {"accuracy", "nll", "ece", "total"} & a.keys():
            assert b[key] == pytest.approx(a[key], abs=1e-5), key
    weights = [load_file(folder / "student" / "model.safetensors") for folder in (one, two)]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_two_ranks_resume_exactly(folders, tmp_path):
    whole = folders[1] / "dropout"
    shutil.copytree(whole, tmp_path / "dropout")
    shutil.rmtree(tmp_path / "dropout" / "checkpoints" / "step-00000015")
    assert [p.name for p in (tmp_path / "dropout" / "checkpoints").iterdir()] == ["step-00000012"]
    for name in set(ranks_run.CASES) - {"dropout"}:  # finished runs pass by at once
        shutil.copytree(folders[1] / name, tmp_path / name)
    launch(tmp_path)
    file = "student/model.safetensors"
    assert (tmp_path / "dropout" / file).read_bytes() == (whole / file).read_bytes()

"""Two processes write and learn what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.schemes.language.writing_ranks_run import CASES
from tests.schemes.tiny import llama

SCRIPT = Path(__file__).with_name("writing_ranks_run.py")
ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_follow_one(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    for command, name in (([sys.executable], "one"), (launch, "two")):
        done = subprocess.run(
            [*command, str(SCRIPT), str(tmp_path / name)], env=environment, capture_output=True, text=True, timeout=580
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "two" / "ranks").read_text() == "2"
    start = llama(seed=1, sharp=6.0).double().state_dict()
    for case in CASES:
        one, two = (load_file(tmp_path / n / case / "student" / "model.safetensors") for n in ("one", "two"))
        moved = max(float((one[key] - start[key]).abs().max()) for key in one)
        assert moved > 1e-3
        assert all((one[key] - two[key]).abs().max() < 1e-4 * moved for key in one), case
        assert all(torch.isfinite(value).all() for value in two.values())
    lines = [
        json.loads(line)
        for path in (tmp_path / "two" / "seq_kd" / "written").glob("texts-*.jsonl")
        for line in path.open()
    ]
    keys = [line["head"]["key"] for line in lines]
    assert len(keys) == len(set(keys)) > 1  # each chunk was written by one of them

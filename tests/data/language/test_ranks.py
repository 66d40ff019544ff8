"""Two processes learn from texts what one learns."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("ranks_run.py")
ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_two_ranks_follow_one(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    for command, name in (([sys.executable], "one"), (launch, "two")):
        done = subprocess.run(
            [*command, str(SCRIPT), str(tmp_path / name)], env=environment, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "two" / "ranks").read_text() == "2"
    for case in ("rows", "left", "packs"):
        one, two = (load_file(next((tmp_path / n / case).rglob("student.safetensors"))) for n in ("one", "two"))
        start = one["model.embed_tokens.weight"].std()
        assert all((one[key] - two[key]).abs().max() < 1e-5 * start for key in one), case

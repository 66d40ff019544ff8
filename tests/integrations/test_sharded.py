"""A student whose weights lie in parts over two processes learns what a whole one learns."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.integrations.sharded_run import CASES

SCRIPT, ROOT = Path(__file__).with_name("sharded_run.py"), Path(__file__).parents[2]


def start(folder: Path, how: str) -> Path:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"] if how != "plain" else []
    command = [sys.executable, *launch, str(SCRIPT), str(folder), how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return start(tmp_path_factory.mktemp("plain"), "plain")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp", "zero1", "zero2", "zero3"])
def test_parts_of_weights_follow_the_whole(how, plain, tmp_path):
    if how != "fsdp" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    found = start(tmp_path, how)
    kind = "FSDPLlamaForCausalLM" if how == "fsdp" else "DeepSpeedEngine"
    for case in CASES:
        one, two = (json.loads((folder / case / "said.json").read_text()) for folder in (plain, found))
        assert two["kind"] == kind
        steps, others = ([line for line in each["logs"] if "learning_rate" in line] for each in (one, two))
        assert len(steps) == 2
        for step, same in zip(steps, others, strict=True):
            assert all(same[name] == pytest.approx(step[name], rel=1e-5) for name in step if name != "step"), case
        said = [name for name in one["eval"] if "second" not in name and "time" not in name]
        assert "eval_loss" in said
        assert all(one["eval"][name] == pytest.approx(two["eval"][name], rel=1e-5) for name in said), case
        own = load_file(plain / case / "saved" / "model.safetensors")
        for name in ("saved", "resumed"):
            AutoModelForCausalLM.from_pretrained(found / case / name)
            other = load_file(found / case / name / "model.safetensors")
            assert own.keys() == other.keys()
            assert max((own[key] - other[key]).abs().max() for key in own) < 1e-6, (case, name)
    assert "weights of its own" in (found / "refused.txt").read_text()

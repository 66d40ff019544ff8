"""Two processes train as one does: every scheme, from its example."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.schemes.test_every_scheme import EXAMPLES

SCRIPT, ROOT = Path(__file__).with_name("ranks_run.py"), Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, request) -> tuple[Path, Path]:
    """All examples that are asked for, by one process and by two."""
    keys = sorted({item.callspec.params["key"] for item in request.session.items if item.path == Path(__file__)})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for command, folder in zip(([sys.executable], launch), found, strict=True):
        done = subprocess.run(
            [*command, str(SCRIPT), str(folder), *keys],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("key", sorted(EXAMPLES))
def test_two_ranks_follow_one(key, folders):
    said = [json.loads(file.read_text()) for folder in folders for file in sorted((folder / key).glob("said-*"))]
    assert [each["error"] for each in said] == ["", "", ""]
    assert [each["ranks"] for each in said] == [1, 2, 2]
    steps = [json.loads((folder / key / "result.json").read_text())["training"]["steps"] for folder in folders]
    assert steps[0] == steps[1]
    one, two = (load_file(folder / key / "student" / "model.safetensors") for folder in folders)
    assert one.keys() == two.keys()
    apart = max(float((one[name].double() - two[name].double()).abs().max()) for name in one)
    if "apart" in EXAMPLES[key]:  # says what each rank draws, or finds, in its own part of a batch
        assert apart > 0
    else:
        assert apart < 1e-5

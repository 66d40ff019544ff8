"""SIGKILL at random moments, also during the write of a checkpoint: the resumed run ends with the same bits."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def start(folder: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, str(HERE / "kill_run.py"), str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(process: subprocess.Popen[bytes], happened) -> bool:
    """Wait until something is there, or the process has ended; says which."""
    while process.poll() is None:
        if happened():
            return True
        time.sleep(0.0005)
    return False


def writing(folder: Path) -> bool:
    return any((folder / "checkpoints").glob(".writing-step-*"))


def kill(folder: Path, during_a_write: bool, dice: random.Random) -> bool:
    """Run until a random moment, then kill; False where the run had ended by itself."""
    known = set((folder / "checkpoints").glob("*"))
    process = start(folder)
    try:
        if not wait_for(process, lambda: set((folder / "checkpoints").glob("*")) - known):
            return False
        time.sleep(dice.uniform(0, 0.5))
        if during_a_write and not wait_for(process, lambda: writing(folder)):
            return False
        process.send_signal(signal.SIGKILL)
        return process.wait() == -signal.SIGKILL
    finally:
        process.kill()
        process.communicate()


def run_to_its_end(folder: Path) -> None:
    process = start(folder)
    out, err = process.communicate()
    assert process.returncode == 0, err.decode()
    assert out == b""
    assert b"Warning" not in err


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("kills", "steps"), [(2, 80), pytest.param(10, 160, marks=pytest.mark.slow)])
def test_killed_runs_end_with_the_same_bits(tmp_path, monkeypatch, kills, steps):
    monkeypatch.setenv("KILL_RUN_STEPS", str(steps))
    if steps > 100:  # importing what validation needs takes every process seconds more
        monkeypatch.setenv("KILL_RUN_VALIDATES", "1")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_to_its_end(whole)
    dice, done, during = random.Random(kills), 0, 0
    while done < kills:
        during_a_write = done % 2 == 1
        assert kill(killed, during_a_write, dice), f"the run ended after {done} kills"
        done, during = done + 1, during + during_a_write
    assert during == kills // 2
    run_to_its_end(killed)
    for file in ("student/model.safetensors", f"checkpoints/step-{steps:08d}/objectives.safetensors"):
        assert (killed / file).read_bytes() == (whole / file).read_bytes(), file
    lines = [[json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()] for f in (whole, killed)]
    for line in lines[0] + lines[1]:
        for timing in ("seconds", "samples_per_s"):
            line.pop(timing, None)
    assert lines[0] == lines[1]
    assert not list((killed / "checkpoints").glob(".writing-*"))

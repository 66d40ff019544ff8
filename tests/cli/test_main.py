"""The command as a whole: help, exit codes, bugs, pipes, Ctrl-C; in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from limbeck.cli import main as module
from tests.cli.conftest import Command
from tests.recipes.test_check import EIGHT

LIMBECK = [sys.executable, "-m", "limbeck.cli.main"]


@pytest.fixture
def environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}


def test_help_is_quick_and_names_every_command(limbeck: Command) -> None:
    answer = limbeck("--help")
    for command in ("demo", "run", "check", "compare", "report", "export", "recipes", "methods", "show", "taps"):
        assert f" {command} " in answer.out
    code = "import sys; sys.argv = ['limbeck']; import limbeck.cli.main; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_version(limbeck: Command) -> None:
    assert limbeck("--version").out.startswith("limbeck 0.")


def test_a_command_that_is_none(limbeck: Command) -> None:
    answer = limbeck("runn")
    assert answer.code == 2
    assert "runn" in answer.err


def test_a_bug_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    import limbeck.recipes.load  # noqa: F401

    def broken() -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(sys.modules["limbeck.recipes.load"], "shipped", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        module.main(["recipes"])


def test_eight_mistakes_in_one_process(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "eight.yaml").write_text(EIGHT)
    done = subprocess.run(
        [*LIMBECK, "check", "eight.yaml"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len([line for line in done.stderr.splitlines() if line.startswith("eight.yaml: line ")]) == 8
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_reader_that_has_seen_enough(tmp_path: Path, environment: dict[str, str]) -> None:
    command = f"{' '.join(LIMBECK)} methods --json | head -c 1"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "["
    assert "Error" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_ctrl_c_leaves_with_130_and_the_run_can_go_on(tmp_path: Path, environment: dict[str, str]) -> None:
    settings = ["--set", "train.epochs=100000", "--set", "train.log_every=1", "--set", "teacher.train.epochs=1"]
    process = subprocess.Popen(
        [*LIMBECK, "run", "digits", "--out", "out", *settings],
        cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    log = tmp_path / "out" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "resume from" in err
    assert "Traceback" not in err
    assert (tmp_path / "out" / "last.json").is_file()

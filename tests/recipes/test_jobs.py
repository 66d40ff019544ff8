"""Several runs at a time come to the same as one after another."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from limbeck.core.errors import ConfigError, LimbeckError
from limbeck.engine.stopping import Stopped
from limbeck.recipes.compare import compare
from limbeck.recipes.jobs import run_all
from limbeck.recipes.load import load

TINY = ["data.samples=40", "data.batch_size=20", "teacher.train.epochs=1", "train.epochs=1", "train.validate_epochs=1"]


@pytest.mark.slow
def test_two_jobs_and_one_come_to_the_same(tmp_path: Path) -> None:
    said: list[str] = []
    recipe = load("digits", TINY)
    found = [
        compare(recipe, ["kd"], 2, ["no_teacher"], out=tmp_path / str(jobs), jobs=jobs, quiet=True, say=said.append)
        for jobs in (1, 2)
    ]
    accuracies = [[[run["accuracy"] for run in row["runs"]] for row in facts["methods"]] for facts in found]
    assert accuracies[0] == accuracies[1]
    assert [facts["jobs"] for facts in found] == [1, 2]
    assert "run 4 of 4 done: KD, seed 1" in said or "run 4 of 4 done: No teacher, seed 1" in said


@pytest.mark.slow
def test_the_error_of_a_run_is_the_error_of_all(tmp_path: Path) -> None:
    recipe = load("digits", [*TINY, "train.clip=1.0"])
    broken = recipe.model_copy(update={"student": recipe.student.model_copy(update={"model": "resnet9"})})
    tasks = [(str(i), broken, tmp_path / str(i)) for i in range(3)]
    with pytest.raises(LimbeckError, match="resnet9"):
        run_all(tasks, 2, teachers=tmp_path / "teachers")
    with pytest.raises(ConfigError, match="jobs"):
        run_all(tasks, 0, teachers=tmp_path / "teachers")


# What starts five runs, two at a time, and a plug-in by which the first is short and the others never end.
STARTS = """
import signal
import sys
from pathlib import Path
from limbeck.recipes import jobs
from limbeck.recipes.load import load

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where tests run in a background that ignores it
    jobs._GRACE, here = 0.5, Path(sys.argv[1])
    recipe = load("digits").model_copy(update={"plugins": [str(here / "endless.py")]})
    jobs.run_all([(f"{i}", recipe, here / f"{i}") for i in range(5)], 2, teachers=here / "teachers", say=print)
"""
ENDLESS = """
import time
from limbeck.engine.stopping import Stopped, StopRequest
from limbeck.recipes import attempt

def run(recipe, folder, **options):
    folder.mkdir()
    with StopRequest() as stop:
        while folder.name != "0" and stop.number is None:
            time.sleep(0.01)
    if stop.number is not None:
        (folder / "stopped").touch()
        raise Stopped("stopped", stop.number)

attempt.run = run
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_workers_end_with_who_started_them(tmp_path: Path, number: signal.Signals) -> None:
    """Told by the pipe that all of them write to: it is closed when the last is gone."""
    (tmp_path / "starts.py").write_text(STARTS)
    (tmp_path / "endless.py").write_text(ENDLESS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-u", str(tmp_path / "starts.py"), str(tmp_path)]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        while not all((tmp_path / name).exists() for name in "12"):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        process.send_signal(number)
        said = process.communicate(timeout=60)[0]
    finally:
        if process.stdout is not None and not process.stdout.closed:  # somebody is left
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == -number, said
    assert "run 1 of 5 done: 0" in said
    assert not (tmp_path / "3").exists()
    assert [(tmp_path / name / "stopped").exists() for name in "12"] == [number == signal.SIGINT] * 2, said


def test_a_stop_can_be_told_to_another_process() -> None:
    told = copy.copy(Stopped("x", 15))  # goes the way of what is sent
    assert (str(told), told.number) == ("x", 15)

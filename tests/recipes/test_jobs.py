"""Several runs at a time come to the same as one after another."""

from __future__ import annotations

from pathlib import Path

import pytest

from limbeck.core.errors import ConfigError, LimbeckError
from limbeck.recipes.compare import compare
from limbeck.recipes.jobs import run_all
from limbeck.recipes.load import load

TINY = ["data.samples=40", "data.batch_size=20", "teacher.train.epochs=1", "train.epochs=1", "train.validate_epochs=1"]


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


def test_the_error_of_a_run_is_the_error_of_all(tmp_path: Path) -> None:
    recipe = load("digits", [*TINY, "train.clip=1.0"])
    broken = recipe.model_copy(update={"student": recipe.student.model_copy(update={"model": "resnet9"})})
    tasks = [(str(i), broken, tmp_path / str(i)) for i in range(3)]
    with pytest.raises(LimbeckError, match="resnet9"):
        run_all(tasks, 2, teachers=tmp_path / "teachers")
    with pytest.raises(ConfigError, match="jobs"):
        run_all(tasks, 0, teachers=tmp_path / "teachers")

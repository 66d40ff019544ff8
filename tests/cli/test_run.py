"""limbeck run, report, export, compare, demo: on little data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from limbeck.cli.main import main
from limbeck.cli.run import checked
from limbeck.recipes.problem import RecipeError
from tests.cli.conftest import Command

SHORT = [
    part
    for setting in (
        "data.samples=100",
        "teacher.train.epochs=1",
        "teacher.samples=100",
        "train.epochs=1",
        "train.device=cpu",
    )
    for part in ("--set", setting)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    with pytest.raises(SystemExit) as left:
        main(["run", "digits", *SHORT, "--out", str(out), "--quiet"])
    assert not left.value.code
    return out


def test_run_says_what_came_out_and_where(limbeck: Command, folder: Path) -> None:
    answer = limbeck("run", folder, "--resume")
    assert answer.code == 0
    assert "accuracy" in answer.out
    assert "359 test samples" in answer.out
    assert "the student is in" in answer.err


def test_run_as_json(limbeck: Command, folder: Path) -> None:
    result = limbeck("run", folder, "--resume", "--json").json
    assert result == json.loads((folder / "result.json").read_text())


def test_run_refuses_a_folder_that_is_taken(limbeck: Command, folder: Path) -> None:
    answer = limbeck("run", folder)
    assert (answer.code, answer.out) == (2, "")
    assert "--resume" in answer.err


def test_run_resumes_no_other_recipe(limbeck: Command, folder: Path) -> None:
    answer = limbeck("run", folder, "--resume", "--set", "train.lr=0.5")
    assert answer.code == 2
    assert "train.lr" in answer.err


def test_run_trains_nothing_where_something_is_wrong(limbeck: Command, tmp_path: Path) -> None:
    answer = limbeck("run", "digits", "--set", "train.epochs=-1", "--set", "loss=kdd")
    assert answer.code == 2
    assert "2 mistakes" in answer.err
    assert not list(tmp_path.iterdir())


def test_all_problems_reach_the_screen(limbeck: Command) -> None:
    with pytest.raises(RecipeError) as caught:
        checked("digits", ["train.epochs=-1", "seed=-1"])
    assert len(caught.value.problems) == 2


def test_report_of_a_run(limbeck: Command, folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert limbeck("report", folder, "--out", page, "--json").json == {"report": str(page)}
    assert "<html" in page.read_text()
    answer = limbeck("report", tmp_path / "nothing")
    assert (answer.code, answer.out) == (2, "")


def test_export_of_a_run(limbeck: Command, folder: Path, tmp_path: Path) -> None:
    facts = limbeck("export", folder, "--out", tmp_path / "out", "--json").json
    assert facts["max_difference"] <= facts["tolerance"]
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert "logits differ by" in limbeck("export", folder, "--out", tmp_path / "out").err
    assert "did you mean 'onnx'?" in limbeck("export", folder, "--to", "onx").err


def test_compare_prints_a_table_and_writes_a_report(limbeck: Command, tmp_path: Path) -> None:
    arguments = [
        "compare",
        "digits",
        *SHORT,
        "-m",
        "kd:temperature=2,dkd",
        "--seeds",
        "2",
        "--controls",
        "no_teacher",
        "-q",
    ]
    answer = limbeck(*arguments, "--out", tmp_path / "c")
    assert answer.code == 0, answer.err
    for word in ("No teacher", "KD (temperature=2)", "DKD", "95% interval"):
        assert word in answer.out
    assert "run 6 of 6" in answer.err
    assert (tmp_path / "c" / "report.html").is_file()
    facts = limbeck(*arguments, "--out", tmp_path / "c", "--json").json
    assert [row["entry"] for row in facts["methods"]] == ["no_teacher", "kd:temperature=2", "dkd"]
    assert "did you mean" in limbeck("compare", "digits", "-m", "kdd").err


@pytest.mark.slow
def test_the_demo(limbeck: Command, tmp_path: Path) -> None:
    answer = limbeck("demo", "--seeds", "2", "--out", tmp_path / "demo")
    assert answer.code == 0
    for word in ("teacher", "No teacher", "Label smoothing", "Random teacher", "KD", "DKD", "FitNets", "latency"):
        assert word in answer.out
    assert "arning" not in answer.err + answer.out
    facts = json.loads((tmp_path / "demo" / "compare.json").read_text())
    rows = {row["entry"]: row["accuracy"]["mean"] for row in facts["methods"]}
    assert facts["teacher"]["accuracy"] > rows["kd"] > rows["no_teacher"] > rows["random_teacher"]
    assert (tmp_path / "demo" / "report.html").stat().st_size > 10_000

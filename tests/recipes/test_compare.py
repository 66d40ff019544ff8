"""Comparisons: real runs, figures that follow from them, and nothing trained twice."""

import dataclasses
import json
import shlex
import sys

import pytest
import torch
from scipy.stats import ttest_rel

from limbeck.analysis import assess
from limbeck.core.errors import ConfigError, TrainingError
from limbeck.models import create, load_weights
from limbeck.models.student import load_student
from limbeck.recipes import RecipeError, attempt, load
from limbeck.recipes.build import check_loader, source_of
from limbeck.recipes.compare import compare
from limbeck.report.sentences import findings, losses
from limbeck.report.table import markdown_table

SMALL = [
    "data.samples=100",
    "data.batch_size=32",
    "train.epochs=2",
    "teacher={model: mlp_16, train: {epochs: 8}}",
    "student={model: mlp_8}",
]
CONTROLS = ["no_teacher", "label_smoothing", "random_teacher"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    said: list[str] = []
    facts = compare(load("digits", SMALL), ["kd", "dist"], 2, CONTROLS, out=folder, quiet=True, say=said.append)
    return folder, facts, said


def rows(facts):
    return {row["entry"]: row for row in facts["methods"]}


def results(folder, entry):
    return [json.loads((folder / "runs" / f"{entry}-seed{s}" / "result.json").read_text()) for s in (0, 1)]


def test_every_method_and_control_runs_with_every_seed(compared):
    folder, facts, said = compared
    assert facts["status"] == "finished"
    assert json.loads((folder / "compare.json").read_text()) == facts
    assert list(rows(facts)) == [*CONTROLS, "kd", "dist"]
    for entry, row in rows(facts).items():
        assert [run["seed"] for run in row["runs"]] == [0, 1]
        assert {run["steps"] for run in row["runs"]} == {2 * (100 // 32)}
        for run, result in zip(row["runs"], results(folder, entry), strict=True):
            assert run["accuracy"] == result["accuracy"]
            assert (folder / run["folder"] / "student" / "model.safetensors").is_file()
    assert said[0] == "run 1 of 10: No teacher, seed 0"
    assert len(said) == 10


def test_figures_follow_from_the_runs(compared):
    folder, facts, _ = compared
    table = rows(facts)
    values = {entry: [r["accuracy"] for r in results(folder, entry)] for entry in table}
    best = max(CONTROLS, key=lambda c: sum(values[c]))
    assert facts["best_control"] == best
    for entry, row in table.items():
        assert row["accuracy"]["mean"] == pytest.approx(sum(values[entry]) / 2)
        assert (row["gain"] is None) == (entry in CONTROLS)
        for name, difference in row["differences"].items():
            interval = ttest_rel(values[entry], values[name]).confidence_interval(0.95)
            if difference["sd"] > 1e-9:
                assert difference["interval"] == pytest.approx([interval.low, interval.high], abs=1e-9)
    assert table["kd"]["gain"] == {"over": best, **table["kd"]["differences"][best]}


def test_one_teacher_is_trained_and_teaches_in_every_run_but_the_random_ones(compared):
    folder, facts, _ = compared
    assert len(list((folder / "teachers").iterdir())) == 1
    own = [r["teacher"]["accuracy"] for e in ("no_teacher", "kd", "dist") for r in results(folder, e)]
    assert set(own) == {facts["teacher"]["accuracy"]}
    assert facts["teacher"]["accuracy"] > 0.5
    assert all(r["teacher"]["accuracy"] < 0.4 for r in results(folder, "random_teacher"))


def test_a_random_teachers_student_is_held_against_the_real_one(compared):
    folder, facts, _ = compared
    recipe = load("digits", SMALL)
    loader = check_loader(recipe.data, source_of(recipe.data).test)
    teacher = create("mlp_16", num_classes=10, in_channels=1, image_size=8)
    load_weights(teacher, next((folder / "teachers").iterdir()) / "student")
    for run in rows(facts)["random_teacher"]["runs"]:
        student = load_student(folder / run["folder"] / "student")
        assert run["agreement"] == pytest.approx(assess(student, teacher, loader, latency=False)["agreement"])


def test_what_was_run_is_written_down(compared):
    _, facts, _ = compared
    assert facts["recipe"] == load("digits", SMALL).written()
    assert facts["environment"]["torch"] == torch.__version__
    assert facts["environment"]["threads"] == torch.get_num_threads()
    assert rows(facts)["kd"]["loss"] == {"cross_entropy": {"weight": 0.1}, "kd": {"weight": 0.9}}
    assert facts["command"].endswith(shlex.join(sys.argv[1:]))
    assert rows(facts)["kd"]["parameters"] == 64 * 8 + 8 + 8 * 10 + 10


def test_again_nothing_is_trained_and_nothing_changes(compared, monkeypatch):
    folder, facts, _ = compared
    monkeypatch.setattr("limbeck.engine.fit", lambda *_, **__: pytest.fail("trained again"))
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}
    again = compare(load("digits", SMALL), ["kd", "dist"], 2, CONTROLS, out=folder, quiet=True)
    assert again["methods"] == facts["methods"]
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")} == before


def test_seeds_and_methods_can_be_added(compared):
    folder, facts, _ = compared
    more = compare(load("digits", SMALL), ["kd", "dkd"], [0, 1, 2], ["no_teacher"], out=folder, quiet=True)
    assert list(rows(more)) == ["no_teacher", "kd", "dkd"]
    assert [r["accuracy"] for r in rows(more)["kd"]["runs"]][:2] == [r["accuracy"] for r in rows(facts)["kd"]["runs"]]
    assert rows(more)["kd"]["accuracy"]["n"] == 3


def test_an_interrupted_comparison_goes_on(compared, tmp_path, monkeypatch):
    real, done = attempt.run, []

    def interrupted(*args, **kwargs):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(args[1])
        return real(*args, **kwargs)

    monkeypatch.setattr(attempt, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(load("digits", SMALL), ["kd"], 2, ["no_teacher"], out=tmp_path, quiet=True)
    partial = json.loads((tmp_path / "compare.json").read_text())
    assert partial["status"] == "running"
    assert [len(row["runs"]) for row in partial["methods"]] == [2, 1]
    monkeypatch.setattr(attempt, "run", real)
    whole = compare(load("digits", SMALL), ["kd"], 2, ["no_teacher"], out=tmp_path, quiet=True)
    assert whole["status"] == "finished"
    expected = rows(compared[1])
    for entry, row in rows(whole).items():  # the same bits, trained in another folder
        assert [r["accuracy"] for r in row["runs"]] == [r["accuracy"] for r in expected[entry]["runs"]]
        assert [r["nll"] for r in row["runs"]] == [r["nll"] for r in expected[entry]["runs"]]


def test_a_folder_of_other_runs_is_refused(compared):
    with pytest.raises(ConfigError, match="another"):
        compare(load("digits", [*SMALL, "train.lr=0.01"]), ["kd"], 2, ["no_teacher"], out=compared[0], quiet=True)


def test_all_mistakes_of_all_runs_come_before_the_first(tmp_path):
    recipe = load("digits", [*SMALL, "student.weights=nowhere.safetensors"])
    with pytest.raises(RecipeError) as error:
        compare(recipe, ["kd:temperature=-1", "dkd:alhpa=2"], 2, out=tmp_path / "out")
    text = str(error.value)
    assert "nowhere.safetensors" in text
    assert "temperature" in text
    assert "alhpa" in text
    assert text.count("nowhere.safetensors") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seeds", [0, [], [1, 1]])
def test_seeds_stand_once_and_there_are_some(tmp_path, seeds):
    with pytest.raises(ConfigError, match="seeds"):
        compare(load("digits", SMALL), ["kd"], seeds, out=tmp_path)


def test_tuned_kd_takes_the_temperature_that_validates_best(tmp_path):
    facts = compare(load("digits", SMALL), ["dist"], 2, ["no_teacher", "tuned_kd"], out=tmp_path, quiet=True)
    row = rows(facts)["tuned_kd"]
    validated, tested = {}, {}
    for temperature in (1, 2, 4, 8):
        found = [
            json.loads((tmp_path / "runs" / f"kd-temperature-{temperature}-seed{s}" / "result.json").read_text())
            for s in (0, 1)
        ]
        validated[temperature] = sum(r["training"]["validation"] for r in found)
        tested[temperature] = [r["accuracy"] for r in found]
    best = max(validated, key=lambda t: validated[t])
    assert row["role"] == "control"
    assert row["loss"]["kd"]["temperature"] == best
    assert f"kd:temperature={best}" in row["about"]
    assert [run["accuracy"] for run in row["runs"]] == tested[best]
    assert list(rows(facts)["dist"]["differences"]) == ["no_teacher", "tuned_kd"]


def test_tuned_kd_needs_validation_data(tmp_path, monkeypatch):
    from limbeck.recipes.build import source_of as read

    without = lambda data: dataclasses.replace(read(data), validation=None)  # noqa: E731
    monkeypatch.setattr("limbeck.recipes.compare.source_of", without)
    with pytest.raises(ConfigError, match="validation"):
        compare(load("digits", SMALL), ["dist"], 1, ["tuned_kd"], out=tmp_path, quiet=True)


WILD = [*SMALL, "teacher={model: mlp_16, untrained: true}"]


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_goes_astray_does_not_end_the_others(tmp_path, jobs):
    """KD of a vast weight is no number after a few steps; the rest is compared, and the report tells."""
    said: list[str] = []
    again = {"seeds": 2, "controls": ["no_teacher"], "out": tmp_path, "quiet": True, "jobs": jobs}
    facts = compare(load("digits", WILD), ["kd:weight=1.0e+14", "dist"], say=said.append, **again)
    assert [row["entry"] for row in facts["methods"]] == ["no_teacher", "dist"]
    assert facts["status"] == "finished"
    assert [(run["entry"], run["seed"]) for run in facts["failed"]] == [
        ("kd:weight=1.0e+14", 0),
        ("kd:weight=1.0e+14", 1),
    ]
    assert "finite" in facts["failed"][0]["error"]
    assert any("failed" in line for line in said)
    (sentence,) = losses(facts)
    assert sentence.startswith("KD (weight=1.0e+14) failed with seeds 0, 1: ")
    assert sentence in markdown_table(facts)
    assert sentence in findings(facts)
    files = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("metrics.jsonl")}
    assert compare(load("digits", WILD), ["kd:weight=1.0e+14", "dist"], **again)["failed"] == facts["failed"]
    assert files == {f: f.stat().st_mtime_ns for f in tmp_path.rglob("metrics.jsonl")}


def test_where_every_run_goes_astray_that_is_the_error(tmp_path):
    with pytest.raises(TrainingError, match="every run failed"):
        compare(load("digits", WILD), ["kd:weight=1.0e+14"], 2, False, out=tmp_path, quiet=True)

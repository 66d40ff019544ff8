"""A recipe to a finished folder: what is in it, resuming, teachers trained once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from limbeck.core.errors import ConfigError, LimbeckError
from limbeck.models import create, load_weights, save_weights
from limbeck.models.student import load_student
from limbeck.recipes.document import parse
from limbeck.recipes.load import load
from limbeck.recipes.run import differences, run
from limbeck.recipes.schema import Recipe
from tests.recipes.cut_off import cut_off_and_resumed, same_students

SHORT = [
    "data={source: digits, samples: 120, batch_size: 32}",
    "teacher={model: resnet8, samples: 200, train: {epochs: 1}}",
    "student={model: mlp_8}",
    "train={epochs: 2, device: cpu}",
]


def short(*settings: str) -> Recipe:
    return load("digits", [*SHORT, *settings])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs") / "first"
    return folder, run(short(), folder, quiet=True)


def test_the_folder_holds_the_run(done: tuple[Path, dict[str, Any]]) -> None:
    folder, result = done
    assert json.loads((folder / "result.json").read_text()) == result
    assert {"name": "digits", "split": "test", "samples": 359, "seed": 0}.items() <= result.items()
    assert 0 < result["accuracy"] < 1
    assert 0 < result["agreement"] < 1
    assert result["teacher"]["parameters"] > result["parameters"] > 0
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    assert (folder / "metrics.jsonl").read_text().count('"validation"') == 2
    assert parse((folder / "recipe.yaml").read_text()).data == short().written()


def test_the_student_is_plain_and_can_be_built_again(done: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = done
    names = set(load_file(folder / "student" / "model.safetensors"))
    student = load_student(folder)
    assert names == set(student.state_dict())
    assert student(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    about = json.loads((folder / "student" / "student.json").read_text())
    assert about["classes"] == [str(n) for n in range(10)]
    assert set(about["normalize"]) == {"mean", "std"}


def test_the_same_recipe_gives_the_same_student(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, result = done
    again = run(short(), tmp_path / "again", quiet=True, teachers=folder.parent / "teachers")
    assert same_students(folder, tmp_path / "again")
    assert again["accuracy"] == result["accuracy"]


def test_a_teacher_is_trained_once(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = done
    (kept,) = (folder.parent / "teachers").iterdir()
    before = (kept / "student" / "model.safetensors").stat().st_mtime_ns
    run(short("seed=1", "loss=dkd"), tmp_path / "other", quiet=True, teachers=kept.parent)
    assert [p.name for p in kept.parent.iterdir()] == [kept.name]
    assert (kept / "student" / "model.safetensors").stat().st_mtime_ns == before
    run(short("teacher.seed=1"), tmp_path / "another", quiet=True, teachers=kept.parent)
    assert len(list(kept.parent.iterdir())) == 2


def test_a_teacher_with_weights_is_only_loaded(tmp_path: Path) -> None:
    teacher = create("resnet8", in_channels=1)
    save_weights(teacher, tmp_path / "teacher.safetensors")
    spec = f"teacher={{model: resnet8, weights: {tmp_path / 'teacher.safetensors'}}}"
    result = run(short(spec, "train.steps=1", "train.epochs="), tmp_path / "run", quiet=True)
    assert not (tmp_path / "teachers").exists()
    assert result["training"]["steps"] == 1
    load_weights(teacher, tmp_path / "teacher.safetensors")


def test_a_run_without_a_teacher(tmp_path: Path) -> None:
    result = run(short("teacher=", "loss=cross_entropy", "train.epochs=1"), tmp_path / "run", quiet=True)
    assert result["teacher"] is None
    assert "agreement" not in result


def test_two_stages_by_the_methods_own_scheme(tmp_path: Path) -> None:
    recipe = short("loss={fitnets: 1}", "scheme=hint_then_kd", "student.model=resnet8", "data.samples=64")
    assert run(recipe, tmp_path / "run", quiet=True)["training"]["steps"] == 4
    stages = {json.loads(line)["stage"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()}
    assert stages == {"hint", "distill"}


def test_a_folder_with_a_run_is_not_overwritten(done: tuple[Path, dict[str, Any]]) -> None:
    folder, result = done
    with pytest.raises(ConfigError, match="holds a run already"):
        run(short(), folder, quiet=True)
    assert run(short(), folder, resume=True, quiet=True) == result


def test_resuming_with_another_recipe_is_refused_by_name(done: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = done
    with pytest.raises(ConfigError, match=r"train\.lr: .*found 0\.2; wanted 0\.05"):
        run(short("train.lr=0.2"), folder, resume=True, quiet=True)
    with pytest.raises(ConfigError, match=r"loss\.cross_entropy"):
        run(short("loss=dkd"), folder, resume=True, quiet=True)
    run(short("train.log_every=7"), folder, resume=True, quiet=True)  # changes no weight


def test_a_run_cut_off_goes_on_to_the_same_bits(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    whole, _ = done
    cut_off_and_resumed(short(), tmp_path / "run", whole.parent / "teachers")
    assert same_students(whole, tmp_path / "run")


def test_a_damaged_result_is_told(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text((done[0] / "recipe.yaml").read_text())
    (tmp_path / "result.json").write_text('{"accuracy": 0.')
    with pytest.raises(LimbeckError, match="damaged"):
        run(short(), tmp_path, resume=True, quiet=True)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="not a folder"):
        run(short(), tmp_path / "run", quiet=True)


def test_differences_leave_out_what_changes_no_weight() -> None:
    old = {"train": {"lr": 1, "log_every": 5}, "teacher": {"train": {"keep": 1}}, "loss": {"kd": 1}}
    new = {"train": {"lr": 2, "log_every": 6}, "teacher": {"train": {"keep": 3}}, "loss": {"dkd": 1}}
    assert [place for place, _, _ in differences(old, new)] == ["train.lr", "loss.kd", "loss.dkd"]

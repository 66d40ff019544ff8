"""Recipes by file, name and folder; settings; typed sections."""

from __future__ import annotations

from pathlib import Path

import pytest

from limbeck.core.errors import ConfigError
from limbeck.recipes.document import Document, dump, parse
from limbeck.recipes.load import change, load, read, shipped, typed
from limbeck.recipes.problem import RecipeError

SMALL = "data: {source: digits}\nstudent: {model: mlp_8}\nloss: cross_entropy\n"


def test_a_recipe_is_named_after_its_file(tmp_path: Path) -> None:
    (tmp_path / "tiny-one.yaml").write_text(SMALL)
    assert load(tmp_path / "tiny-one.yaml").name == "tiny-one"


def test_a_run_folder_is_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: mine\n" + SMALL)
    assert load(tmp_path).name == "mine"


def test_an_unknown_recipe_names_near_ones() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cifar10_vgg13_vgg8'"):
        read("cifar10_vgg13_vgg9")


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_are_whole_and_written_as_they_are_read(name: str) -> None:
    recipe = load(name)
    assert recipe.name == name
    again = typed(parse(dump(recipe.written())))
    assert again == recipe
    assert again.written() == recipe.written()


def test_the_crd_pairs_are_there() -> None:
    pairs = {(r.teacher.model, r.student.model) for n in shipped() if (r := load(n)).teacher and n != "digits"}
    assert len(pairs) == 11
    assert {("resnet56", "resnet20"), ("vgg13", "mobilenetv2"), ("resnet32x4", "shufflenetv2")} <= pairs
    assert load("cifar10_vgg13_mobilenetv2").train.lr == 0.01
    assert load("cifar10_vgg13_vgg8").train.lr == 0.05


def test_settings_change_what_was_written() -> None:
    recipe = load(
        "digits", ["train.epochs=3", "loss={kd: {weight: 1e0, temperature: 2}}", "data.augment=[pad_crop]", "teacher="]
    )
    assert recipe.train.epochs == 3
    assert recipe.loss["kd"].options == {"temperature": 2}
    assert recipe.data.augment == ["pad_crop"]
    assert recipe.teacher is None


def test_settings_reach_into_lists_and_new_sections() -> None:
    document = parse("a: [1, {b: 2}]")
    change(document, "a.1.b=5")
    change(document, "c.d.e=[x]")
    assert document.data == {"a": [1, {"b": 5}], "c": {"d": {"e": ["x"]}}}
    assert document.line(("a", 0)) == 1
    assert document.line(("a", 1, "b")) is None


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.epochs", "form place=value"),
        ("=5", "form place=value"),
        ("train..epochs=5", "form place=value"),
        ("seed.of.what=5", "seed has no 'of'"),
        ("data.augment.9=flip", "has no 9"),
        ("train.epochs=[", "no YAML"),
    ],
)
def test_settings_that_cannot_be_made(setting: str, message: str) -> None:
    document = Document({"seed": 1, "data": {"augment": ["flip"]}, "train": {}})
    with pytest.raises(ConfigError, match=message):
        change(document, setting)


def test_a_bare_method_is_its_usual_sum() -> None:
    terms = load("digits", ["loss=kd"]).loss
    assert {name: term.weight for name, term in terms.items()} == {"cross_entropy": 0.1, "kd": 0.9}


def test_a_teacher_trains_like_the_student_unless_it_says_otherwise() -> None:
    base = ["train={lr: 0.2, epochs: 9, optimizer: sgd, optimizer_options: {nesterov: true}, clip: 1.0}"]
    same = load("digits", [*base, "teacher={model: resnet8, train: {steps: 5}}"]).teacher
    assert same is not None
    assert same.train is not None
    assert (same.train.lr, same.train.steps, same.train.epochs, same.train.clip) == (0.2, 5, None, 1.0)
    other = load("digits", [*base, "teacher={model: resnet8, train: {optimizer: adamw}}"]).teacher
    assert other is not None
    assert other.train is not None
    assert (other.train.optimizer, other.train.optimizer_options, other.train.epochs) == ("adamw", {}, 9)


def test_every_mistake_of_form_is_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(
        "dta: {source: digits}\nstudent: {model: 5}\nloss: [kd]\nseed: -1\ntrain: {epochs: '5'}\n"
    )
    with pytest.raises(RecipeError) as caught:
        load(tmp_path / "bad.yaml")
    places = {(p.where, p.line) for p in caught.value.problems}
    assert places == {("dta", 1), ("data", None), ("student.model", 2), ("loss", 3), ("seed", 4), ("train.epochs", 5)}
    assert "did you mean 'data'?" in str(caught.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_bytes(b"a: 1\nb: \xff\xfe\n")
    with pytest.raises(RecipeError, match="line 2: this is no text in UTF-8"):
        load(tmp_path / "bad.yaml")

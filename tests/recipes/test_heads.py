"""Heads in recipes: given by the method, checked, kept over a resume, shipped, and compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import limbeck
from limbeck.core.errors import ConfigError
from limbeck.models import head_of
from limbeck.models.student import load_student
from limbeck.recipes.check import check
from limbeck.recipes.compare import compare
from limbeck.recipes.distill import distill
from limbeck.recipes.entries import method
from limbeck.recipes.load import load
from limbeck.recipes.run import run
from limbeck.recipes.schema import Recipe
from tests.recipes.cut_off import cut_off_and_resumed, same_students

SHORT = [
    "data={source: digits, samples: 120, batch_size: 32}",
    "teacher={model: mlp_32, samples: 200, train: {epochs: 2}}",
    "student={model: mlp_16}",
    "train={epochs: 2, device: cpu}",
]
NETS = ["teacher.model=resnet8", "student={model: resnet8, options: {widths: [4, 4, 4, 8]}}"]


def short(*settings: str) -> Recipe:
    return load("digits", [*SHORT, *settings])


def about(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "student" / "student.json").read_text())


@pytest.mark.parametrize(
    ("loss", "head"),
    [
        ("kd", None),
        ("lelp", {"subclass": {}}),
        ("dho", {"dual": {}}),
        ("simkd", {"reused": {}}),
        ("{kd: 1, lelp: {weight: 2, subclasses: 4}}", {"subclass": {"subclasses": 4}}),
        ("{mine: {method: simkd, feature: pooled}}", {"reused": {"feature": "pooled"}}),
    ],
)
def test_a_loss_brings_its_head(loss: str, head: dict[str, Any] | None) -> None:
    recipe = short(f"loss={loss}")
    found = recipe.student.head
    assert (None if found is None else {found.name: found.options}) == head
    assert Recipe(**json.loads(json.dumps(recipe.written()))).written() == recipe.written()
    assert short(f"loss={loss}", "student.head=linear").student.head.name == "linear"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["loss=kd", "student.head=dul"], ["student.head: no such head; found 'dul'"]),
        (["loss=dho", "student.head={dual: {alpa: 1}}"], ["alpa: no such option"]),
        (["loss=dho", "student.head=linear"], ["loss.dho: in the student this model has no head"]),
        (["loss={lelp: 1, dho: 1}"], ["student.head: these methods want different heads", "loss.lelp", "loss.dho"]),
        (["loss=simkd"], ["student.head: head.reused: what enters the teacher's last layer is not the mean"]),
        (["loss=lelp", "student.model=mlp_0"], ["student.model: "]),
        (["loss=kd", "student.head={dual: 1, reused: 1}"], ["student.head: must be a name"]),
    ],
)
def test_mistakes_are_told_before_any_training(settings: list[str], told: list[str]) -> None:
    found = [str(p) for p in check("digits", [*SHORT, *settings])]
    for text in told:
        assert any(text in problem for problem in found), found
    assert len(found) <= len(told) + 1


def test_a_good_one_passes() -> None:
    for settings in (["loss=lelp"], ["loss=dho"], ["loss=simkd", *NETS], ["loss={simkd: {feature: pooled}}"]):
        assert check("digits", [*SHORT, *settings]) == []


def test_runs_ship_their_heads(tmp_path: Path) -> None:
    for loss, settings in (("lelp", []), ("dho", []), ("simkd", NETS)):
        folder = tmp_path / loss
        result = run(short(f"loss={loss}", *settings), folder, quiet=True)
        student = load_student(folder)
        assert about(folder)["head"] == head_of(student)
        assert result["parameters"] == sum(p.numel() for p in student.parameters())
        assert student(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_the_teachers_classifier_is_in_the_student(tmp_path: Path) -> None:
    run(short("loss=simkd", *NETS), tmp_path / "run", quiet=True)
    (teacher,) = (tmp_path / "teachers").iterdir()
    student, teacher_ = (load_file(f / "student" / "model.safetensors") for f in (tmp_path / "run", teacher))
    assert torch.equal(student["linear.weight"], teacher_["linear.weight"])
    assert not torch.equal(student["layer3.body.0.conv1.weight"], teacher_["layer3.0.conv1.weight"][:8])


def test_what_a_dual_head_leaves_open_is_chosen_on_validation_data(tmp_path: Path) -> None:
    result = run(short("loss=dho"), tmp_path / "run", quiet=True)
    chosen, written = result["training"]["head"], about(tmp_path / "run")["head"]["dual"]
    assert result["split"] == "test"
    assert chosen == {"alpha": written["alpha"], "beta": written["beta"]}
    fixed = run(short("loss=dho", "student.head={dual: {search: false, alpha: 0.25}}"), tmp_path / "fixed", quiet=True)
    assert "head" not in fixed["training"]
    assert about(tmp_path / "fixed")["head"]["dual"]["alpha"] == 0.25


@pytest.mark.parametrize("loss", ["lelp", "dho"])
def test_a_run_cut_off_goes_on_to_the_same_bits(loss: str, tmp_path: Path) -> None:
    recipe, teachers = short(f"loss={loss}"), tmp_path / "teachers"
    run(recipe, tmp_path / "whole", quiet=True, teachers=teachers)
    cut_off_and_resumed(recipe, tmp_path / "run", teachers)
    assert same_students(tmp_path / "whole", tmp_path / "run")


def test_in_a_comparison_each_line_has_the_head_of_its_method(tmp_path: Path) -> None:
    facts = compare(
        short("loss=lelp"),  # whose head is not the others'
        ["kd", "lelp", "lelp:subclasses=4", "dho", "simkd:feature=pooled"],
        1,
        ["no_teacher"],
        out=tmp_path,
        quiet=True,
    )
    rows = {row["entry"]: row for row in facts["methods"]}
    own = {entry: about(tmp_path / row["runs"][0]["folder"]).get("head") for entry, row in rows.items()}
    assert own["no_teacher"] is own["kd"] is None
    assert {entry: list(head) for entry, head in own.items() if head} == {
        "lelp": ["subclass"],
        "lelp:subclasses=4": ["subclass"],
        "dho": ["dual"],
        "simkd:feature=pooled": ["reused"],
    }
    assert own["lelp:subclasses=4"]["subclass"]["subclasses"] == 4
    assert method("lelp:temperature=3").head.options == {"temperature": 3}
    assert rows["lelp"]["head"] == "subclass"
    assert "head" not in rows["kd"]


def test_a_comparison_keeps_what_the_recipe_says_of_the_same_head() -> None:
    base = short("loss=dho", "student.head={dual: {search: false}}")
    assert method("dho").recipe(base, 0).student.head.options == {"search": False}
    assert method("kd").recipe(base, 0).student.head is None


def pair() -> tuple[nn.Module, nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    inputs = torch.randn(96, 6)
    models = (nn.Sequential(nn.Linear(6, w), nn.ReLU(), nn.Linear(w, 3)) for w in (12, 8))
    return *models, (inputs, inputs[:, :3].argmax(dim=1))


@pytest.mark.parametrize("way", ["name", "loss"])
def test_distill_puts_it_on(way: str, tmp_path: Path) -> None:
    teacher, student, data = pair()
    method_: Any = "dho" if way == "name" else limbeck.objectives.CrossEntropy() + limbeck.objectives.DHO()
    done = distill(teacher, student, data, method_, epochs=2, lr=0.1, batch_size=32, quiet=True, out=tmp_path)
    assert done.student is student
    assert list(head_of(student)) == ["dual"]
    assert json.loads((tmp_path / "student" / "student.json").read_text())["head"] == head_of(student)
    again = distill(teacher, student, data, method_, epochs=1, lr=0.1, batch_size=32, quiet=True)
    assert again.student is student


def test_distill_draws_a_head_from_its_seed() -> None:
    teacher, student, data = pair()
    state = student.state_dict()
    weights = []
    for seed in (0, 0, 1):
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        model.load_state_dict(state)
        torch.rand(len(weights))
        distill(teacher, model, data, "lelp", steps=1, lr=1e-9, batch_size=32, quiet=True, seed=seed)
        weights.append(model[2].sub.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_distill_without_a_layer_to_replace_says_so() -> None:
    teacher, student, data = pair()
    short_: dict[str, Any] = {"steps": 1, "batch_size": 32, "quiet": True}
    with pytest.raises(limbeck.LimbeckError, match="nothing but its last layer"):
        distill(teacher, nn.Linear(6, 3), data, "dho", **short_)
    both = limbeck.objectives.LELP() + limbeck.objectives.DHO()
    with pytest.raises(ConfigError, match="different heads"):
        distill(teacher, student, data, both, **short_)

"""Methods as they are written, controls, and the recipes that they become."""

import pytest

from limbeck.core import catalogue
from limbeck.core.errors import ConfigError
from limbeck.recipes.entries import CONTROLS, control, controls_of, entries_of, method, split_methods, with_budget
from limbeck.recipes.load import load
from limbeck.recipes.run import differences
from limbeck.recipes.schema import Recipe, usual, usual_terms

SMALL = [
    "data.samples=100",
    "data.batch_size=32",
    "train.epochs=2",
    "teacher={model: mlp_16, train: {epochs: 2}}",
    "student={model: mlp_8}",
]


def test_every_method_of_the_catalogue_trains_as_its_card_says():
    base = load("digits", SMALL)
    for key, known in catalogue.methods().items():
        entry = method(key)
        recipe = entry.recipe(base, 3)
        assert recipe.loss == usual_terms(key)
        assert Recipe.model_validate(recipe.written()).loss == recipe.loss
        assert recipe.scheme.name == known.card.scheme
        assert entry.role == ("control" if known.card.knowledge == "control" else "method")


def test_options_go_to_the_method_and_weights_replace_its_own():
    entry = method("kd:temperature=2,weight=0.5")
    assert entry.loss["kd"].options == {"temperature": 2}
    assert entry.loss["kd"].weight == 0.5
    assert entry.loss["cross_entropy"].weight == usual("kd")["cross_entropy"]
    assert entry.name == "KD (temperature=2,weight=0.5)"
    assert entry.slug == "kd-temperature-2-weight-0.5"


def test_all_entries_do_the_same_but_for_what_they_are():
    """Steps, data, student, optimizer: nothing but loss, scheme and (for one control) the teacher differs."""
    base = load("digits", SMALL)
    allowed = {"name", "loss", "seed", "scheme"}
    for entry in entries_of(["kd", "dkd", "fitnets", "crd"], ["no_teacher", "label_smoothing", "random_teacher"]):
        changed = {place.split(".")[0] for place, _, _ in differences(base.written(), entry.recipe(base, 5).written())}
        assert changed <= allowed | ({"teacher"} if entry.entry == "random_teacher" else set())


def test_a_random_teacher_has_the_same_shape_other_weights_for_each_seed_and_says_that_it_is_meant():
    base = load("digits", SMALL)
    recipes = [control("random_teacher").recipe(base, seed) for seed in (0, 1)]
    assert {r.teacher.model for r in recipes} == {"mlp_16"}
    assert [r.teacher.seed for r in recipes] == [0, 1]
    assert all(r.teacher.untrained and r.teacher.train is None and r.teacher.weights is None for r in recipes)


def test_same_budget_takes_the_steps_that_the_teachers_operations_would_buy():
    base = load("digits", SMALL)
    entries, left_out = with_budget(base, entries_of(["kd"], ["same_budget"]))
    assert left_out == {}
    student, teacher = (2 * (64 * width + width * 10) for width in (8, 16))
    times = (3 * student + teacher) / (3 * student)
    steps = entries[0].recipe(base, 0).train.steps
    assert steps == round(times * 2 * (100 // 32))
    assert f"{times:.3g} times the steps" in entries[0].about
    assert entries[1].recipe(base, 0).train.epochs == 2
    entries, left_out = with_budget(base, entries_of(["kd"], ["same_budget"]), most=1.2)
    assert [entry.entry for entry in entries] == ["kd"]
    assert "times the steps" in left_out["same_budget"]


def test_controls_among_the_methods_stand_once():
    entries = entries_of(["cross_entropy", "kd", "label_smoothing"], ["no_teacher"])
    assert [(e.entry, e.role) for e in entries] == [
        ("no_teacher", "control"),
        ("kd", "method"),
        ("label_smoothing", "control"),
    ]
    assert [e.entry for e in entries_of(["cross_entropy"], ["same_budget"])] == ["same_budget", "cross_entropy"]


def test_a_scheme_with_a_controls_loss_is_a_line_of_its_own():
    entries = entries_of(["seq_kd/cross_entropy", "cross_entropy"], ["no_teacher"], "language")
    assert [(entry.entry, entry.scheme) for entry in entries] == [
        ("no_teacher", "offline"),
        ("seq_kd/cross_entropy", "seq_kd"),
    ]


def test_which_controls():
    assert controls_of(True, teacher=True) == list(CONTROLS)
    assert controls_of(True, teacher=False) == ["no_teacher", "label_smoothing"]
    assert controls_of(False, teacher=True) == []
    assert controls_of(["label_smoothing"], teacher=False) == ["label_smoothing"]
    with pytest.raises(ConfigError, match="needs a teacher"):
        controls_of(["random_teacher"], teacher=False)


def test_commas_part_methods_and_options():
    assert split_methods(" kd , dkd:alpha=1,beta=4,, crd") == ["kd", "dkd:alpha=1,beta=4", "crd"]
    assert split_methods("") == []


@pytest.mark.parametrize(
    ("methods", "controls", "message"),
    [
        (["kdd"], [], "no such method.*did you mean 'kd'"),
        (["kd:temperature"], [], "name=value"),
        (["kd:=2"], [], "name=value"),
        (["kd:method=dkd"], [], "before the colon"),
        (["kd:temperature=[1"], [], "YAML"),
        (["kd", "kd"], [], "twice"),
        (["kd:a@=b", "kd:a:=b"], [], "share a folder"),
        ([], ["no_teacher"], "no method to compare"),
        (["kd"], ["no_techer"], "no such control.*did you mean 'no_teacher'"),
    ],
)
def test_mistakes_are_named(methods, controls, message):
    with pytest.raises(ConfigError, match=message):
        entries_of(methods, controls)

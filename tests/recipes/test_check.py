"""Every mistake at once, each with its place; and never a traceback."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limbeck.models import create, save_weights
from limbeck.recipes.check import check
from limbeck.recipes.document import dump
from limbeck.recipes.load import load, shipped
from limbeck.recipes.problem import Problem

GOOD = """\
name: good
data: {source: digits, batch_size: 64, augment: [pad_crop, {cutout: {size: 3}}], normalize: digits}
teacher: {model: resnet8, train: {epochs: 2}}
student: {model: mlp_8}
loss:
  cross_entropy: 0.1
  kd: {weight: {linear: {start: 1, end: 0.5}}, temperature: 4}
  rkd: 0.1
scheme: offline
train: {epochs: 2, optimizer: sgd, lr: 0.05, schedule: cosine}
"""

EIGHT = """\
data: {source: digits, batch_size: 100000, augment: [pad_crop, flop]}
teacher: {model: resnet56, weights: nowhere.safetensors}
student: {model: resnet8, optoins: {}}
loss:
  cross_entropy: 0.1
  kd: {weight: 0.9, temprature: 4}
  fitnet: 1
train:
  epochs: -1
  optimizer: sgdd
"""

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    monkeypatch.chdir(tmp_path)

    def made(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    return made


def places(problems: list[Problem]) -> dict[str, int | None]:
    return {p.where: p.line for p in problems}


def only(problems: list[Problem]) -> Problem:
    assert len(problems) == 1, [str(p) for p in problems]
    return problems[0]


def test_nothing_is_wrong_with_a_good_recipe(write: Write) -> None:
    assert check(write(GOOD)) == []


def test_a_recipe_in_hand_can_be_checked(write: Write) -> None:
    recipe = load(write(GOOD))
    assert check(recipe) == []
    assert only(check(recipe.model_copy(update={"teacher": None}))).where == "teacher"


def test_eight_mistakes_are_told_at_once(write: Write) -> None:
    problems = check(write(EIGHT))
    assert places(problems) == {
        "data.augment[1]": 1,
        "data.batch_size": 1,
        "teacher.weights": 2,
        "student.optoins": 3,
        "loss.kd.temprature": 6,
        "loss.fitnet": 7,
        "train.epochs": 9,
        "train.optimizer": 10,
    }
    assert all("; " in str(p) for p in problems)  # found, wanted or what to do


MISTAKES = {
    "data.source": ("nowhere", "no such data"),
    "data.options": ("{sead: 1}", "no such option"),
    "data.samples": ("5000", "not that many"),
    "teacher.samples": ("5000", "at most 1259"),
    "data.normalize": ("imagnet", "did you mean 'imagenet'"),
    "data.augment": ("[{pad_crop: {padding: -1}}]", "whole number"),
    "data.batch_size": ("1.5", "valid integer"),
    "student.model": ("resnet9", "no such depth"),
    "student.options": ("{depth: 3}", "no such option"),
    "student.logits": ("scores", "no such entry"),
    "teacher.model": ("resnett8", "did you mean"),
    "teacher.train": ("{epochs: 0}", "greater than or equal to 1"),
    "loss.kd.temperature": ("-4", "temperature"),
    "loss.kd.weight": ("{linnear: {}}", "no such schedule"),
    "loss.rkd": ("{linear: {start: 1}}", "write weight"),
    "loss.fitnets": ("{tap: layer7, teacher_tap: layer2}", "in the student no such place"),
    "scheme": ("{offline: 3}", "must be a name"),
    "train.schedule": ("cosin", "did you mean 'cosine'"),
    "train.optimizer_options": ("{momentm: 0.9}", "momentm"),
    "seed": ("1e3", "valid integer"),
    "plugins": ("[nowhere.py]", "no such file"),
    "name": ("a/b", "pattern"),
}


@pytest.mark.parametrize("place", MISTAKES)
def test_one_mistake_is_told_once_and_where_it_is(write: Write, place: str) -> None:
    value, message = MISTAKES[place]
    problem = only(check(write(GOOD), [f"{place}={value}"]))
    assert problem.where.startswith(place.rpartition(".")[0])
    assert message in str(problem)


def test_weights_must_fit(write: Write, tmp_path: Path) -> None:
    save_weights(create("resnet8", num_classes=7, in_channels=1), tmp_path / "seven.safetensors")
    teacher = "teacher={model: resnet8, weights: seven.safetensors}"
    problem = only(check(write(GOOD), [teacher]))
    assert problem.where == "teacher.weights"
    assert "linear.weight [7, 64] in the file, [10, 64] in the model" in str(problem)
    save_weights(create("resnet8", in_channels=1), tmp_path / "seven.safetensors")
    assert check(write(GOOD), [teacher]) == []


def test_a_teacher_knows_something_or_says_that_it_does_not(write: Write) -> None:
    assert "random weights" in str(only(check(write(GOOD), ["teacher={model: resnet8}"])))
    assert check(write(GOOD), ["teacher={model: resnet8, untrained: true}"]) == []


def test_methods_that_learn_from_nobody(write: Write) -> None:
    problem = only(check(write(GOOD), ["teacher="]))
    assert (problem.where, problem.message) == ("teacher", "kd, rkd cannot work without a teacher")
    assert check(write(GOOD), ["teacher=", "loss=cross_entropy"]) == []


DATA_OF_MY_OWN = """
import torch

def unlabelled():
    return torch.zeros(40, 1, 8, 8)

def whole():
    from limbeck.data import tensors
    return tensors(torch.zeros(40, 1, 8, 8), torch.arange(40) % 10, validation=0)

def vectors():
    return torch.zeros(40, 5), torch.arange(40) % 3

def many():
    from limbeck.data import tensors
    return tensors(torch.zeros(40, 5), (torch.arange(40).view(40, 1) % 3 == torch.arange(3)).float(), task="multilabel")
"""


@pytest.mark.parametrize("scheme", ["ban", "kernel_self_distill", "momentum_teacher", "ps_kd"])
def test_schemes_that_make_their_teacher_need_none(scheme: str) -> None:
    assert check("digits", ["teacher=null", "loss=kd", f"scheme={scheme}"]) == []


def test_data_that_lack_what_a_method_needs(write: Write, tmp_path: Path) -> None:
    (tmp_path / "my_data.py").write_text(DATA_OF_MY_OWN)
    problems = check(
        write(GOOD), ["data={source: 'my_data:unlabelled', batch_size: 8}", "student.options={num_classes: 10}"]
    )
    assert "needs labels" in str(problems)
    assert "loss.cross_entropy" in places(problems)


def test_nothing_to_judge_by(write: Write, tmp_path: Path) -> None:
    (tmp_path / "my_data.py").write_text(DATA_OF_MY_OWN)
    data = "data={source: 'my_data:whole', batch_size: 8}"
    assert check(write(GOOD), [data]) == []
    problems = check(write(GOOD), [data, "train.patience=3", "train.select=best"])
    assert {"train.patience", "train.select"} == set(places(problems))


def test_models_that_do_not_take_the_data(write: Write, tmp_path: Path) -> None:
    (tmp_path / "my_data.py").write_text(DATA_OF_MY_OWN)
    data = "data={source: 'my_data:vectors', batch_size: 8}"
    (problem,) = check(write(GOOD), [data])  # its student is built for feature vectors, which its teacher cannot be
    assert problem.where == "teacher.model"
    assert "this model takes images, and these are feature vectors" in problem.message
    (problem,) = check(
        write(GOOD), [data, "teacher={model: mlp_8, untrained: true}", "student.options={in_features: 6}"]
    )
    assert problem.where == "student.model"
    assert "does not take these data" in problem.message


def test_losses_on_labels_of_another_kind(write: Write, tmp_path: Path) -> None:
    (tmp_path / "my_data.py").write_text(DATA_OF_MY_OWN)
    settings = ["data={source: 'my_data:many', batch_size: 8}", "student={model: mlp_8}"]
    settings += ["teacher={model: mlp_16, train: {epochs: 1}}"]
    (problem,) = check(write(GOOD), [*settings, "loss={cross_entropy: 1, mld: 1}"])
    assert problem.where == "loss.cross_entropy"
    assert "use binary_cross_entropy" in str(problem)
    assert check(write(GOOD), [*settings, "loss=mld"]) == []


def test_models_that_disagree_are_found_by_the_dry_run(write: Write) -> None:
    problem = only(check(write(GOOD), ["student.options={num_classes: 7}", "loss=kd"]))
    assert problem.where == "loss"
    assert "7" in str(problem)
    assert "10" in str(problem)


def test_a_plug_ins_method_can_be_used_at_once(write: Write, tmp_path: Path) -> None:
    (tmp_path / "my_plugged_method.py").write_text(
        textwrap.dedent("""
        from limbeck.core.catalogue import Card, register
        from limbeck.core.objective import Objective

        @register(Card("my_plugged", "Mine", "Mine", 2030, "response", "s - t", "", with_labels={"cross_entropy": 0.5}))
        class MyPlugged(Objective):
            student_taps = teacher_taps = ("logits",)

            def forward(self, student, teacher, batch):
                return (student.logits - teacher.logits).square().mean()
        """)
    )
    plugin = "plugins=[my_plugged_method.py]"
    assert check(write(GOOD), [plugin, "loss=my_plugged"]) == []
    assert set(load(write(GOOD), [plugin, "loss=my_plugged"]).loss) == {"cross_entropy", "my_plugged"}


def test_a_check_leaves_no_trace(write: Write, tmp_path: Path) -> None:
    path = write(GOOD)
    state = torch.random.get_rng_state()
    check(path)
    assert torch.equal(state, torch.random.get_rng_state())
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


_TREE = load("digits").written() | {"loss": {"cross_entropy": 0.1, "kd": {"weight": 0.9, "temperature": 4.0}}}
_VALUES: list[Any] = [
    *(None, True, -1, 0, 3, 10**9, 2**62, -(2**62), 0.5, -1e300, 1e300, 1e-300),
    *("", "x", "ü✓漢\u202e", "../..", "digits", "kd", "resnet8", "a" * 500, "package.module:thing", "hf:", ":"),
    *([], ["x"], [[]], {}, {"x": 1}, {"kd": {}}, {"weight": []}, {"linear": {"start": 1, "end": 0}}),
    [None, {"pad_crop": None}, 5],
]


def _every(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    steps = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    return [at, *(place for key, value in steps for place in _every(value, (*at, key)))]


_PLACES = [p for p in _every(_TREE) if p]
_changes = st.lists(
    st.tuples(st.sampled_from(_PLACES), st.sampled_from(["set", "drop", "add", "wrap"]), st.sampled_from(_VALUES)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=_changes)
def test_no_change_to_a_recipe_makes_a_traceback(changes: list[tuple[tuple[Any, ...], str, Any]], write: Write) -> None:
    tree = copy.deepcopy(_TREE)
    for (*path, last), kind, value in changes:
        target: Any = tree
        for step in path:
            target = target[step] if isinstance(target, (dict, list)) and _there(target, step) else None
        if not _there(target, last):
            continue
        if kind == "drop":
            del target[last]
        elif kind == "add" and isinstance(target, dict):
            target[f"{last}x"] = value
        else:
            target[last] = [target[last]] if kind == "wrap" else value
    for problem in check(write(dump(tree) if tree else "{}")):
        text = str(problem)
        assert problem.message
        assert "Traceback" not in text
        text.encode()


def _there(target: Any, step: Any) -> bool:
    return (
        step in target
        if isinstance(target, dict)
        else isinstance(target, list) and isinstance(step, int) and step < len(target)
    )


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    start=st.integers(0, len(GOOD)),
    length=st.integers(0, 40),
    typed=st.text("{}[]:,'\"&*!|>%@#-\n\t ayü1.\x07", max_size=12),
)
def test_no_slip_of_the_keyboard_makes_a_traceback(start: int, length: int, typed: str, write: Write) -> None:
    path = write(GOOD)
    path.write_text(GOOD[:start] + typed + GOOD[start + length :], encoding="utf-8")
    assert all(str(problem).encode() for problem in check(path))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.text("abdseml.0=", max_size=12), value=st.sampled_from(["", "[", "5", "{a: 1}", "x", "=", "*a", "ü"]))
def test_no_setting_makes_a_traceback(place: str, value: str) -> None:
    assert all(str(problem) for problem in check("digits", [f"{place}{value}"]))


_PAIRS = [name for name in shipped() if name != "digits"]
_QUICK = "cifar10_vgg13_mobilenetv2"


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == _QUICK else pytest.mark.slow) for n in _PAIRS])
def test_the_crd_recipes_run_on_cifar10(name: str, shared_data: Path) -> None:
    assert check(name, [f"data.source={shared_data / 'cifar10'}"]) == []


def test_published_weights_fit(shared_data: Path) -> None:
    weights = shared_data / "teachers" / "cifar10_resnet56.safetensors"
    places = [f"data.source={shared_data / 'cifar10'}", f"teacher={{model: resnet56_a, weights: {weights}}}"]
    assert check("cifar10_resnet56_resnet20", places) == []
    problem = only(check("cifar10_resnet56_resnet20", [*places, "teacher.model=resnet56"]))
    assert "write resnet{depth}_a" in str(problem)

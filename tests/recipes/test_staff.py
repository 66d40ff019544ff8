"""Several teachers in a recipe: each trained or loaded once, told apart by name, together where none is the one."""

import json

import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.engine.stage import Stage
from limbeck.objectives import KD
from limbeck.recipes.check import check
from limbeck.recipes.distill import distill
from limbeck.recipes.load import load
from limbeck.recipes.run import run
from limbeck.schemes import Cast, Scheme, Training, register
from limbeck.schemes import scheme as registry
from limbeck.teachers.several import SeveralTeachers

COMMON = ["data.samples=60", "data.batch_size=20", "student={model: mlp_8}", "train={steps: 4, lr: 0.05}"]
TWO = [
    *COMMON,
    "teachers={wide: {model: mlp_16, train: {steps: 3}, samples: 60}, deep: {model: mlp_10, untrained: true}}",
]


@pytest.fixture
def spy():
    """A scheme that looks at who is in its cast, and learns from the second teacher."""
    seen = {}

    @register("spy")
    class Spy(Scheme):
        def trainings(self, cast):
            seen["cast"] = cast
            second = list(cast.need_teachers("spying asks for").values())[1]
            yield Training([Stage("spy", Distiller(cast.student, cast.loss, second), cast.config)])

    yield seen
    del registry._schemes["spy"]


def test_they_are_in_the_cast_by_name_the_teacher_first(spy, tmp_path):
    settings = [*TWO, "teacher={model: mlp_12, untrained: true}", "loss=kd", "scheme=spy"]
    assert check("digits", settings) == []
    result = run(load("digits", settings), tmp_path / "run", quiet=True)
    cast = spy["cast"]
    assert list(cast.teachers) == ["teacher", "wide", "deep"]
    assert isinstance(cast.teacher, FrozenTeacher)
    assert cast.teacher is cast.teachers["teacher"]
    assert len({id(t.model) for t in cast.teachers.values()}) == 3
    assert {f.name.split("-")[0] for f in (tmp_path / "teachers").iterdir()} == {"mlp_16"}  # the others do not train
    assert result["teacher"]["accuracy"] < 0.5  # the first is reported on, and it is untrained
    kept = json.loads((tmp_path / "run" / "student" / "student.json").read_text())
    assert kept["learned"]["teachers"] == ["deep", "wide"]


def test_without_one_they_together_are_the_teacher(spy, tmp_path):
    run(load("digits", [*TWO, "teacher=null", "loss=kd", "scheme=spy"]), tmp_path / "run", quiet=True)
    assert isinstance(spy["cast"].teacher, SeveralTeachers)
    assert [m.model for m in spy["cast"].teacher.members] == [t.model for t in spy["cast"].teachers.values()]


def test_a_run_with_several_is_finished_after_an_interruption_and_another_staff_is_refused(spy, tmp_path):
    settings = [*TWO, "teacher={model: mlp_12, untrained: true}", "loss=kd", "scheme=spy"]
    first = run(load("digits", settings), tmp_path / "run", quiet=True)
    (tmp_path / "run" / "result.json").unlink()
    again = run(load("digits", settings), tmp_path / "run", resume=True, quiet=True)
    assert again["accuracy"] == first["accuracy"]
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(ConfigError, match="another than the run") as raised:
        run(load("digits", [*settings, "teachers.deep.model=mlp_9"]), tmp_path / "run", resume=True, quiet=True)
    assert raised.value.where == "teachers.deep.model"


def test_a_cached_teacher_may_be_one_of_several(spy, tmp_path):
    from limbeck.recipes.caching import build_cache

    settings = [*COMMON, "teacher={model: mlp_16, train: {steps: 3}, samples: 60}", "loss=kd"]
    build_cache(load("digits", [*settings, "data.augment=[]"]), tmp_path / "cache", quiet=True)
    several = f"teachers={{told: {{cache: {tmp_path / 'cache'}}}, deep: {{model: mlp_8, untrained: true}}}}"
    recipe = [*COMMON, "data.augment=[]", "teacher=null", several, "loss=kd", "scheme=spy"]
    run(load("digits", recipe), tmp_path / "run", quiet=True)
    assert list(spy["cast"].teachers) == ["told", "deep"]
    assert len(spy["cast"].teachers["told"].cache.folder.name)


@pytest.mark.parametrize(
    ("change", "where", "says"),
    [
        ("teachers.deep.model=nosuch", "teachers.deep.model", "no such model"),
        ("teachers.deep.untrained=false", "teachers.deep", "random weights"),
        ("teachers.deep.weights=nowhere.safetensors", "teachers.deep.weights", "no such file"),
        ("teachers.deep.mode=mlp_8", "teachers.deep.mode", "no such key"),
        ("teachers.teacher={model: mlp_8}", "teachers", "section teacher's own"),
    ],
)
def test_mistakes_are_told_with_their_place(change, where, says):
    problems = check("digits", [*TWO, "loss=kd", change])
    assert any(problem.where == where and says in str(problem) for problem in problems), problems


def test_a_scheme_that_needs_several_says_so(spy):
    (problem,) = check("digits", [*COMMON, "teacher={model: mlp_16, untrained: true}", "loss=kd", "scheme=spy"])
    assert "spying asks for 2 teachers or more" in str(problem)


def test_distill_takes_them_too(spy):
    inputs = torch.randn(64, 5)
    models = {"a": nn.Linear(5, 3), "b": nn.Linear(5, 3).train()}
    done = distill(
        None,
        nn.Linear(5, 3),
        (inputs, torch.arange(64) % 3),
        KD(),
        teachers=models,
        scheme="spy",
        steps=2,
        batch_size=32,
        quiet=True,
    )
    assert done.steps == 2
    assert [t.model for t in spy["cast"].teachers.values()] == list(models.values())
    assert models["b"].training


def test_a_cast_without_them_names_what_is_missing():
    from limbeck.engine import TrainConfig

    cast = Cast(nn.Linear(4, 3), Terms.of(KD()), None, TrainConfig(), teachers={"one": FrozenTeacher(nn.Linear(4, 3))})
    with pytest.raises(ConfigError, match="this asks for 2 teachers or more; found one"):
        cast.need_teachers("this asks for")
    assert list(cast.need_teachers("this asks for", 1)) == ["one"]
    assert Batch(torch.zeros(1, 4)).size == 1

"""How the suite is used: by key, class, instance or with models of one's own, and what it says."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn

from limbeck.conformance.models import ImageClassifier
from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError
from limbeck.objectives import CRD, KD, FitNets
from limbeck.testing import Nonconforming, check_objective, checks
from tests.conformance.mutants import ForgetsTheSquare, SumInsteadOfMean


def test_one_error_lists_what_failed_and_what_was_found() -> None:
    with pytest.raises(
        Nonconforming, match=r"(?s)ForgetsTheSquare: does not keep .*temperature \(images\): .*squared"
    ) as e:
        check_objective(ForgetsTheSquare, only=["value", "temperature"])
    assert e.value.report.failed == ["temperature"]
    assert e.value.report.passed == ["runs", "value"]


def test_a_check_is_not_judged_where_one_that_it_stands_on_failed() -> None:
    report = check_objective(ForgetsTheSquare, only=["value", "decomposes"], fail=False)
    assert report.failed == []
    report = check_objective(SumInsteadOfMean, only="decomposes", fail=False)
    assert report.failed == ["decomposes"]
    assert "micro-batches of" in str(report)


def test_it_takes_a_key_a_class_or_an_instance() -> None:
    for target in ("kd", KD, KD(temperature=7.0)):
        assert check_objective(target, only="at_equal").passed == ["runs", "at_equal"]
    assert check_objective("crd", options={"memory": "batch"}, only="missing").subject == "crd(memory='batch')"
    assert check_objective(CRD(memory="batch"), only="missing").failed == []


def test_models_of_ones_own_serve_taps_of_ones_own() -> None:
    student, teacher = ImageClassifier(2, 1, 3), ImageClassifier(4, 1, 3)
    before = copy.deepcopy(student.state_dict())
    batch = Batch(torch.randn(5, 3, 8, 8), labels=torch.arange(5) % 3)
    objective = FitNets("layer2.0.norm")
    with pytest.raises(Nonconforming, match="refuses every setting.*no such place ran in this model"):
        check_objective(nothing_there(), only="value")
    report = check_objective(
        objective,
        student=student,
        teacher=teacher,
        batch=batch,
        only=[c.name for c in checks() if c.name != "compiled"],
    )
    assert {r.setting for r in report.results} == {"given"}
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert student.training
    assert objective.regressor is None


def nothing_there() -> FitNets:
    return FitNets("backbone.stage4")


def test_it_leaves_the_random_state_alone() -> None:
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    check_objective("fitnets", only=["state", "same_seed", "half"])
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "kdd"}, "no such method.*'kd'"),
        ({"target": 3}, "nothing that can be checked"),
        ({"target": "kd", "only": "gradchek"}, "no such check.*did you mean 'gradcheck'"),
        ({"target": "kd", "teacher": nn.Linear(1, 1)}, "needs a student"),
        ({"target": "kd", "student": nn.Linear(1, 1)}, "needs an example"),
        ({"target": "kd", "student": 3, "batch": Batch(torch.zeros(4, 1))}, "student: not a model"),
    ],
)
def test_mistakes_in_its_use_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_objective(**arguments)  # type: ignore[arg-type]

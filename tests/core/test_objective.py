"""Composition of objectives: weights, names, taps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Objective, Terms
from limbeck.core.schedules import Constant, Linear, WarmUp
from limbeck.core.trace import Trace
from limbeck.objectives import KD, CrossEntropy, FitNets


class Bare(Objective):
    pass


def weights(terms: Terms, progress: float = 0.5) -> list[float]:
    return [float(w(progress)) for w in terms.weights]


def test_sums_and_products_read_like_the_formula() -> None:
    terms = CrossEntropy() + 0.9 * KD() + WarmUp(0.5) * FitNets("layer1") * 2
    assert terms.names == ["cross_entropy", "kd", "fitnets"]
    assert weights(terms) == pytest.approx([1.0, 0.9, 2.0])
    assert weights(terms, 0.25) == pytest.approx([1.0, 0.9, 1.0])
    assert weights(0.1 * (2.0 * (KD() + 3 * KD()))) == pytest.approx([0.2, 0.6])
    assert weights(Linear(1.0, 0.0) * (KD() + KD() * Linear(0.0, 1.0))) == pytest.approx([0.5, 0.25])


def test_constant_weights_stay_constants() -> None:
    assert (0.5 * (2 * KD())).weights == [Constant(1.0)]
    assert (0.5 * KD() * WarmUp(0.1)).weights[0](1.0) == 0.5
    assert (KD() * WarmUp(0.1)).weights == [WarmUp(0.1)]


def test_every_term_has_a_name_of_its_own_that_survives_composition() -> None:
    assert (KD() + KD() + KD()).names == ["kd", "kd_2", "kd_3"]
    named = Terms([KD(), KD()], [Constant(1.0)] * 2, ["soft", "softer"])
    assert (named + KD() + named).names == ["soft", "softer", "kd", "soft_2", "softer_2"]
    awkward = Terms([KD(), KD(), KD()], [Constant(1.0)] * 3, ["kd_2", "kd", "kd"])
    assert awkward.names == ["kd_2", "kd", "kd_3"]
    assert [n for n, _, _ in awkward.items()] == awkward.names
    assert (Bare() + Bare()).names == ["bare", "bare_2"]


def test_terms_are_the_children_and_share_what_is_shared() -> None:
    one = FitNets("layer1")
    one.regressor = nn.Linear(2, 3)
    terms = one + 2.0 * one
    assert list(terms) == [one, one]
    assert len(list(terms.parameters())) == 2
    assert sorted(k.split(".")[1] for k in terms.state_dict()) == ["fitnets", "fitnets", "fitnets_2", "fitnets_2"]


def test_taps_of_a_sum_are_those_of_its_terms_once() -> None:
    terms = CrossEntropy() + KD() + FitNets("layer1", teacher_tap="layer2") + FitNets("layer1")
    assert terms.student_taps == ("logits", "layer1")
    assert terms.teacher_taps == ("logits", "layer2", "layer1")
    assert Terms.of(CrossEntropy()).teacher_taps == ()


def test_what_is_no_loss_is_refused() -> None:
    with pytest.raises(ConfigError, match="loss: not a loss limbeck can train with; found CrossEntropyLoss"):
        KD() + nn.CrossEntropyLoss()  # type: ignore[operator]
    with pytest.raises(ConfigError, match="found float"):
        KD() + 1.0  # type: ignore[operator]


def test_a_helper_that_setup_did_not_make_says_how_it_comes_about() -> None:
    with pytest.raises(ConfigError, match=r"bare\.projector: not set up yet; let Distiller\.setup"):
        Bare().ready("projector")
    with pytest.raises(ConfigError, match=r"fitnets\.regressor: not set up yet"):
        FitNets().ready("regressor")


def test_an_objective_without_a_forward_says_so() -> None:
    with pytest.raises(TypeError, match=r"Bare defines no forward\(student, teacher, batch\)"):
        Bare()(Trace(None), Trace(None), Batch(torch.zeros(1)))


def test_an_objective_may_have_no_setup_no_prepare_and_no_options() -> None:
    class Small(Objective):
        student_taps = ("logits",)

        def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
            return student.logits.square().mean()

    batch = Batch(torch.zeros(2, 3))
    assert Small().prepare(batch) is batch
    assert float(Small()(Trace(torch.ones(2, 3)), Trace(None), batch)) == 1.0

"""Fidelity against scipy, and its limits."""

import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

from limbeck.analysis import Fidelity, agreement, js, kl
from limbeck.core.errors import DataError, TensorError


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    return 3 * torch.randn(37, 6, dtype=torch.float64), 3 * torch.randn(37, 6, dtype=torch.float64)


def test_divergences_are_those_of_scipy(pair):
    student, teacher = (softmax(z.numpy(), -1) for z in pair)
    middle = (student + teacher) / 2
    np.testing.assert_allclose(kl(*pair), entropy(teacher, student, axis=-1).mean(), rtol=1e-10)
    expected = (entropy(teacher, middle, axis=-1) + entropy(student, middle, axis=-1)).mean() / 2
    np.testing.assert_allclose(js(*pair), expected, rtol=1e-10)


def test_kl_runs_from_the_teacher_and_js_has_no_direction(pair):
    student, teacher = pair
    assert abs(float(kl(student, teacher) - kl(teacher, student))) > 0.1
    assert float(js(student, teacher)) == pytest.approx(float(js(teacher, student)))
    assert float(js(student, teacher)) < math.log(2)


def test_positions_are_places_like_any_other(pair):
    folded = [z[:36].unflatten(0, (4, 9)) for z in pair]
    flat = [z[:36] for z in pair]
    for function in (agreement, kl, js):
        assert float(function(*folded)) == pytest.approx(float(function(*flat)))


def test_batches_give_what_the_whole_gives(pair):
    fidelity = Fidelity()
    for rows in (slice(0, 5), slice(5, 5), slice(5, 37)):
        fidelity.update(pair[0][rows], pair[1][rows])
    expected = {"agreement": agreement(*pair), "kl": kl(*pair), "js": js(*pair)}
    assert fidelity.compute() == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-6)


def test_far_logits_in_half_precision_stay_finite():
    student = torch.tensor([[6e4, -6e4]], dtype=torch.float16)
    assert math.isfinite(float(kl(student, -student)))
    assert float(js(student, -student)) == pytest.approx(math.log(2))


def test_wrong_shapes_and_no_places_are_named():
    with pytest.raises(TensorError, match="student_logits"):
        kl(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(DataError, match="no place"):
        Fidelity().compute()

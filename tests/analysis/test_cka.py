"""CKA against its formula written out, its invariances, and the promise that minibatches do not bias it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.analysis import CKA, linear_cka
from limbeck.core.errors import DataError, TensorError


def hsic(K: np.ndarray, L: np.ndarray) -> float:
    """HSIC_1 of Nguyen et al., term by term."""
    n = len(K)
    K, L = K - np.diag(np.diag(K)), L - np.diag(np.diag(L))
    one = np.ones(n)
    first = np.trace(K @ L)
    second = (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
    third = 2 / (n - 2) * (one @ K @ L @ one)
    return (first + second - third) / (n * (n - 3))


def formula(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    grams = [(x @ x.T, y @ y.T) for x, y in pairs]
    cross, first, second = (
        np.mean([hsic(*f(K, L)) for K, L in grams])
        for f in (lambda K, L: (K, L), lambda K, L: (K, K), lambda K, L: (L, L))
    )
    return float(cross / (math.sqrt(first) * math.sqrt(second)))


def features(n: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    hidden = torch.randn(n, 4, dtype=torch.float64)
    noise = lambda *size: torch.randn(*size, dtype=torch.float64)  # noqa: E731
    flat = [hidden @ noise(4, math.prod(s)) + noise(n, math.prod(s)) + 3 for s in shapes]
    return [f.reshape(n, *s) for f, s in zip(flat, shapes, strict=True)]


def test_every_pair_is_the_formula_in_float64():
    minibatches = [(features(12, (5,), (2, 3, 3)), features(12, (7,), (4,), (3, 2))) for _ in range(3)]
    measure = CKA()
    for first, second in minibatches:
        measure.update(first, second)
    matrix = measure.compute()
    assert matrix.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            pairs = [(f[i].flatten(1).numpy(), s[j].flatten(1).numpy()) for f, s in minibatches]
            assert float(matrix[i, j]) == pytest.approx(formula(pairs), rel=1e-10)


def test_one_minibatch_is_the_plain_quotient():
    first, second = features(20, (6,), (9,))
    expected = formula([(first.numpy(), second.numpy())])
    assert float(linear_cka(first, second)) == pytest.approx(expected, rel=1e-10)


@given(st.integers(0, 10**6), st.floats(1e-3, 1e3), st.floats(-50, 50))
def test_rotation_scale_and_shift_change_nothing(seed, scale, shift):
    torch.manual_seed(seed)
    first, second = features(15, (6,), (8,))
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    changed = scale * first @ rotation + shift
    assert float(linear_cka(changed, second)) == pytest.approx(float(linear_cka(first, second)), abs=1e-9)
    assert float(linear_cka(first, changed)) == pytest.approx(1.0, abs=1e-9)


def test_a_general_linear_map_does_change_it():
    first = torch.randn(50, 6, dtype=torch.float64)
    stretched = first * torch.tensor([100.0, 1, 1, 1, 1, 1], dtype=torch.float64)
    assert float(linear_cka(first, stretched)) < 0.8


def test_the_size_of_a_minibatch_does_not_bias_it():
    """Few samples of many unrelated features: the biased estimate goes to 1, this one stays at 0."""
    first, second = torch.randn(4000, 60), torch.randn(4000, 60)
    small, large = CKA(), CKA()
    for rows in torch.arange(4000).split(8):
        small.update([first[rows]], [second[rows]])
    for rows in torch.arange(4000).split(400):
        large.update([first[rows]], [second[rows]])
    assert abs(float(small.compute())) < 0.03
    assert abs(float(large.compute())) < 0.03


def test_float32_far_from_the_origin_keeps_its_digits():
    first, second = features(64, (30,), (20,))
    exact = float(linear_cka(first, second))
    assert float(linear_cka((first + 300).float(), second.float())) == pytest.approx(exact, abs=1e-3)


@pytest.mark.parametrize("constant", [torch.zeros(10, 3), torch.full((10, 3), 0.1)])
def test_a_constant_layer_has_no_similarity(constant):
    assert math.isnan(float(linear_cka(constant, torch.randn(10, 3))))


def test_mistakes_are_named():
    with pytest.raises(TensorError, match="same samples"):
        CKA().update([torch.zeros(5, 2)], [torch.zeros(6, 2)])
    with pytest.raises(TensorError, match="four samples"):
        linear_cka(torch.zeros(3, 2), torch.zeros(3, 2))
    with pytest.raises(DataError, match="no minibatch"):
        CKA().compute()

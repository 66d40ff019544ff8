from __future__ import annotations

from math import sqrt

import pytest
import torch
from torch import Tensor

from limbeck.core.relations import cosines, dcor, distances, double_centre, gram


def test_products_and_cosines_go_by_rows() -> None:
    first, second = torch.randn(3, 4, 5).double(), torch.randn(3, 2, 5).double()
    torch.testing.assert_close(gram(first, second), torch.einsum("bnd,bmd->bnm", first, second))
    torch.testing.assert_close(gram(first), gram(first, first))
    wanted = torch.nn.functional.cosine_similarity(first.unsqueeze(2), second.unsqueeze(1), dim=-1)
    torch.testing.assert_close(cosines(first, second), wanted)


def test_distances_keep_their_digits_and_equal_rows_pass_no_gradient() -> None:
    near = 1e4 + 1e-2 * torch.arange(4.0).unsqueeze(1)
    wanted = (near.double() - near.double().T).abs()
    torch.testing.assert_close(distances(near).double(), wanted, rtol=1e-6, atol=0)
    same = torch.ones(3, 2, requires_grad=True)
    distances(same).sum().backward()
    assert not same.grad.any()


def test_double_centring_with_a_mask_is_that_of_the_rest() -> None:
    relations, counts = torch.randn(5, 5).double(), torch.tensor([True, False, True, True, False])
    centred = double_centre(relations, counts)
    torch.testing.assert_close(centred[counts][:, counts], double_centre(relations[counts][:, counts]))
    assert not centred[~counts].any()
    assert not centred[:, ~counts].any()
    assert centred.sum(0).abs().max() < 1e-12


def loops(x: list[list[float]], z: list[list[float]]) -> float:
    def centred(points: list[list[float]]) -> list[list[float]]:
        n = len(points)
        d = [[sqrt(sum((a - b) ** 2 for a, b in zip(p, q, strict=True))) for q in points] for p in points]
        rows = [sum(row) / n for row in d]
        return [[d[i][j] - rows[i] - rows[j] + sum(rows) / n for j in range(n)] for i in range(n)]

    def product(a: list[list[float]], b: list[list[float]]) -> float:
        return sum(p * q for r, s in zip(a, b, strict=True) for p, q in zip(r, s, strict=True))

    a, b = centred(x), centred(z)
    return sqrt(product(a, b) / sqrt(product(a, a) * product(b, b)))


@pytest.mark.parametrize("size", [2, 3, 7])
def test_distance_correlation_equals_its_definition(size: int) -> None:
    x, z = torch.randn(size, 3).double(), torch.randn(size, 5).double()
    assert dcor(x, z).item() == pytest.approx(loops(x.tolist(), z.tolist()), rel=1e-9)
    assert dcor(z, x).item() == pytest.approx(dcor(x, z).item(), rel=1e-12)


def test_similar_figures_have_distance_correlation_one() -> None:
    x = torch.randn(8, 4).double()
    turned = -3.0 * x @ torch.linalg.qr(torch.randn(4, 4).double())[0] + torch.randn(4)
    assert dcor(x, turned).item() == pytest.approx(1.0, abs=1e-12)
    assert dcor(x, turned, least=1e-4).item() == pytest.approx(1.0, abs=1e-4)


def test_independent_samples_have_little_distance_correlation() -> None:
    generator = torch.Generator().manual_seed(0)
    x, z = torch.randn(1500, 1, generator=generator), torch.randn(1500, 1, generator=generator)
    assert 0 <= dcor(x, z) < 0.08
    assert dcor(x, x**2) > 0.3  # dependent, though not correlated


def test_distance_correlation_leaves_masked_samples_out() -> None:
    x, z, counts = torch.randn(6, 3).double(), torch.randn(6, 2).double(), torch.arange(6) % 3 > 0
    torch.testing.assert_close(dcor(x, z, counts), dcor(x[counts], z[counts]))


@pytest.mark.parametrize("still", [torch.ones(4, 3), torch.zeros(4, 3), torch.randn(1, 3)])
def test_what_does_not_vary_has_none_and_no_gradient(still: Tensor) -> None:
    still.requires_grad_()
    other = torch.randn(len(still), 2, requires_grad=True)
    value = dcor(still, other)
    value.backward()
    assert value == 0
    assert not still.grad.any()
    assert not other.grad.any()

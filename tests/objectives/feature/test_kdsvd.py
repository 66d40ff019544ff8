"""KD-SVD against its paper's equations, the gradient of its vectors, and its edges."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from limbeck.core.errors import ConfigError, LimbeckError, TensorError
from limbeck.objectives.feature.kdsvd import kdsvd_loss


def maps(*shapes: tuple[int, int], batch: int = 2) -> list[Tensor]:
    return [torch.randn(batch, c, n, n).double() for c, n in shapes]


def vectors(feature: Tensor, number: int) -> tuple[list[Tensor], list[float]]:
    """Right singular vectors of places by channels from the eigenvectors of the channels' Gram matrix."""
    x = feature.flatten(1).T
    number = min(number, *x.shape)
    values, columns = torch.linalg.eigh(x.T @ x)
    order = values.argsort(descending=True)[:number]
    return [columns[:, i] for i in order], [math.sqrt(max(values[i].item(), 0.0)) for i in order]


def reference(student: list[Tensor], teacher: list[Tensor], k: int) -> float:
    """The paper's sums for one sample."""
    aligned = []
    for s_map, t_map in zip(student, teacher, strict=True):
        t_vectors, sigma = vectors(t_map, k)
        s_vectors, _ = vectors(s_map, k + 3)
        norm = math.sqrt(sum(v * v for v in sigma))
        layer = []
        for t, value in zip(t_vectors, sigma, strict=True):
            t = t if t.sum() > 0 else -t
            s = max(s_vectors, key=lambda v, t=t: abs(v.dot(t).item()))
            s = s if s.dot(t) > 0 else -s
            layer.append((s * value / norm, t * value / norm))
        aligned.append(layer)
    total = 0.0
    for lower, upper in pairwise(aligned):
        for (s_low, t_low), (s_up, t_up) in zip(lower, upper, strict=True):
            for i in range(len(s_low)):
                for j in range(len(s_up)):
                    s, t = (math.exp(-((a[i] - b[j]).item() ** 2) / 8) for a, b in ((s_low, s_up), (t_low, t_up)))
                    total += (s - t) ** 2
    return total


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("shapes", [((3, 4), (5, 3), (4, 3)), ((6, 2), (7, 2))])  # more places, and more channels
def test_the_papers_sums(k: int, shapes: tuple[tuple[int, int], ...]) -> None:
    student, teacher = maps(*shapes), maps(*shapes)
    wanted = [reference([f[b] for f in student], [f[b] for f in teacher], k) for b in range(2)]
    found = kdsvd_loss(student, teacher, k=k, reduction="none")
    assert found.tolist() == pytest.approx(wanted, rel=1e-9)
    tokens = [[f.flatten(2).transpose(1, 2) for f in side] for side in (student, teacher)]
    torch.testing.assert_close(kdsvd_loss(*tokens, k=k), found.mean())


@pytest.mark.parametrize("shapes", [((3, 3), (4, 3)), ((6, 2), (5, 2))])
def test_gradient_of_the_vectors(shapes: tuple[tuple[int, int], ...]) -> None:
    student, teacher = maps(*shapes), maps(*shapes)
    for k in (1, 2):
        leaves = [f.clone().requires_grad_() for f in student]
        assert torch.autograd.gradcheck(lambda *s, k=k: kdsvd_loss(s, teacher, k=k), leaves)


def test_scale_and_resolution_do_not_matter() -> None:
    student, teacher = maps((3, 4), (4, 3)), maps((3, 4), (4, 3))
    wanted = kdsvd_loss(student, teacher)
    scaled = [1e-6 * student[0], 1e6 * student[1]]
    torch.testing.assert_close(kdsvd_loss(scaled, teacher), wanted)
    finer = [torch.nn.functional.interpolate(f, scale_factor=2) for f in teacher]
    torch.testing.assert_close(kdsvd_loss(student, finer), wanted)


def test_equal_singular_values_and_dead_layers_pass_finite_gradients() -> None:
    equal = torch.eye(4).reshape(1, 4, 2, 2)
    for feature in (equal, torch.zeros_like(equal), torch.ones_like(equal)):
        student = [feature.clone().requires_grad_() for _ in range(2)]
        value = kdsvd_loss(student, [torch.randn(1, 4, 2, 2) for _ in range(2)], k=2)
        value.backward()
        assert value.isfinite()
        assert all(f.grad.isfinite().all() for f in student)


def test_equal_layers_cost_nothing_and_few_places_give_fewer_vectors() -> None:
    student, teacher = maps((3, 4), (4, 1)), maps((3, 4), (4, 1))
    assert kdsvd_loss(student, student, k=3).item() == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(kdsvd_loss(student, teacher, k=3), kdsvd_loss(student, teacher, k=1))


def test_tokens_left_out_are_as_if_they_were_not() -> None:
    student, teacher = ([torch.randn(2, 6, w).double() for w in (3, 4)] for _ in range(2))
    mask = torch.arange(6) < torch.tensor([[4], [4]])
    cut = [[f[:, :4] for f in side] for side in (student, teacher)]
    torch.testing.assert_close(kdsvd_loss(student, teacher, mask=mask), kdsvd_loss(*cut))


def test_mistakes_are_named() -> None:
    layers = maps((3, 2), (4, 2))
    with pytest.raises(TensorError, match="found 1 and 1 layers"):
        kdsvd_loss(layers[:1], layers[:1])
    with pytest.raises(TensorError, match="student_feature: other channels; found 3; wanted 5"):
        kdsvd_loss(layers, maps((5, 2), (4, 2)))
    with pytest.raises(ConfigError, match="k"):
        kdsvd_loss(layers, layers, k=0)
    with pytest.raises(LimbeckError, match="teacher_feature"):
        kdsvd_loss(layers, [f[:1] for f in layers])

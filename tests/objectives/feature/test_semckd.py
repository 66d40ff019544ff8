from __future__ import annotations

import pytest
import torch
from torch import Tensor

from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.layout import same_places
from limbeck.core.relations import unit
from limbeck.objectives.feature.semckd import SemCKD, semckd_loss, similarities
from tests.objectives.reference import mean
from tests.objectives.test_classes import make, make_batch


def written_out(students: list[Tensor], teachers: list[Tensor], weights: Tensor) -> float:
    samples, own, other = weights.shape
    total = 0.0
    for b in range(samples):
        for i in range(own):
            for j in range(other):
                s, t = students[i * other + j][b], teachers[i * other + j][b]
                gaps = zip(s.flatten().tolist(), t.flatten().tolist(), strict=True)
                total += float(weights[b, i, j]) * mean([(x - y) ** 2 for x, y in gaps])
    return total / (samples * own)


def test_equals_the_papers_code() -> None:
    shapes = [(3, 2, 4, 4), (3, 4, 2, 2), (3, 5), (3, 2, 2, 2), (3, 1, 1, 1), (3, 6)]
    students, teachers = ([torch.randn(s).double() for s in shapes] for _ in range(2))
    weights = torch.rand(3, 2, 3).double()
    found = semckd_loss(students, teachers, weights)
    assert found.item() == pytest.approx(written_out(students, teachers, weights), rel=1e-9)


def test_similarities_are_inner_products_within_a_group() -> None:
    feature = torch.randn(7, 2, 3, 3).double()
    rows = feature.flatten(1)
    found = similarities(feature, 4)
    torch.testing.assert_close(found[:4], rows[:4] @ rows[:4].T)
    torch.testing.assert_close(found[4:], torch.cat([rows[4:] @ rows[4:].T, torch.zeros(3, 1).double()], dim=1))


def test_the_objective_written_out() -> None:
    """One pass by hand: queries and keys from similarities, softmax over the teacher's layers, every pair regressed."""
    loss, batch = SemCKD(group=5), make_batch()
    distiller = make(loss)
    student, teacher = distiller.traces(batch)
    layers = [trace["stages"] for trace in (student, teacher)]
    assert len(loss.regressors) == 9
    q = [unit(e(similarities(f, 5))) for e, f in zip(loss.queries, layers[0], strict=True)]
    k = [unit(e(similarities(f, 5))) for e, f in zip(loss.keys, layers[1], strict=True)]
    total = torch.tensor(0.0)
    for i in range(3):
        weights = torch.stack([(q[i] * key).sum(1) for key in k], 1).softmax(1)
        for j in range(3):
            s, t = same_places(layers[0][i], layers[1][j])
            gap = (loss.regressors[3 * i + j](s) - t).square().flatten(1).mean(1)
            total = total + (weights[:, j] * gap).mean() / 3
    torch.testing.assert_close(loss(student, teacher, batch), total)


def test_attention_moves_to_the_layer_that_can_be_had() -> None:
    """Of two teacher layers one is noise that nobody can regress: its weight falls."""
    torch.manual_seed(0)
    keys = torch.nn.Parameter(torch.zeros(8, 1, 2))
    student, near, far = torch.randn(3, 8, 2, 3, 3)
    near = student + 0.1 * near
    optimizer = torch.optim.SGD([keys], lr=5.0)
    for _ in range(20):
        optimizer.zero_grad()
        semckd_loss([student, student], [near, far], keys.softmax(-1)).backward()
        optimizer.step()
    assert (keys.softmax(-1)[:, 0, 0] > 0.9).all()


@pytest.mark.parametrize("size", [3, 8, 11])
def test_any_size_of_batch(size: int) -> None:
    distiller = make(SemCKD(group=4))
    total = distiller(make_batch(size=size)).total
    total.backward()
    assert total.isfinite()


def test_refusals() -> None:
    maps = torch.randn(2, 3, 4, 4)
    with pytest.raises(TensorError, match=r"student_feature.*1 and 1.*wanted 2"):
        semckd_loss([maps], [maps], torch.rand(2, 1, 2))
    with pytest.raises(TensorError, match="teacher_feature"):
        semckd_loss([maps], [maps[:, :2]], torch.rand(2, 1, 1))
    with pytest.raises(ConfigError, match="group"):
        SemCKD(group=0)
    distiller = make(SemCKD(["layer3"]))
    with pytest.raises(TensorError, match="another width"):
        distiller.loss.objectives["semckd"].regressors[0](torch.randn(2, 5, 2, 2))
    assert distiller(make_batch()).total.isfinite()

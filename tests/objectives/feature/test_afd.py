from __future__ import annotations

from math import sqrt

import pytest
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from limbeck.core.errors import ConfigError, TensorError
from limbeck.objectives.feature.afd import AFD, afd_loss
from tests.objectives.reference import dot, mean
from tests.objectives.test_classes import make, make_batch


def written_out(students: list[Tensor], teachers: list[Tensor], weights: Tensor) -> float:
    """Activity is the mean square over channels; the student's is pooled to the teacher's size, both have length 1."""
    total = 0.0
    for b in range(len(weights)):
        for i, teacher in enumerate(teachers):
            goal = (teacher[b] ** 2).mean(0)
            for j, student in enumerate(students):
                mine = adaptive_avg_pool2d((student[b] ** 2).mean(0)[None, None], goal.shape)[0, 0]
                s, t = mine.flatten().tolist(), goal.flatten().tolist()
                s, t = ([v / sqrt(dot(x, x)) for v in x] for x in (s, t))
                total += float(weights[b, i, j]) * mean([(x - y) ** 2 for x, y in zip(s, t, strict=True)])
    return total / len(weights)


def test_equals_the_paper() -> None:
    students = [torch.randn(3, c, n, n).double() for c, n in ((2, 4), (3, 6), (5, 2))]
    teachers = [torch.randn(3, c, n, n).double() for c, n in ((4, 4), (4, 4), (7, 3))]
    weights = torch.rand(3, 3, 3).double()
    found = afd_loss(students, teachers, weights)
    assert found.item() == pytest.approx(written_out(students, teachers, weights), rel=1e-9)


def test_the_same_activity_costs_nothing_whatever_its_size() -> None:
    feature = torch.randn(2, 3, 4, 4)
    assert afd_loss([5 * feature], [feature], torch.ones(2, 1, 1)) < 1e-12


def test_the_objective_written_out() -> None:
    loss, batch = AFD("stages", dim=6), make_batch()
    distiller = make(loss)
    student, teacher = distiller.traces(batch)
    own, other = student["stages"], teacher["stages"]
    keys = [layer(f.mean((2, 3))).relu() for layer, f in zip(loss.keys, own, strict=True)]
    queries = [layer(f.mean((2, 3))) for layer, f in zip(loss.queries, other, strict=True)]
    turned = loss.bilinear(torch.stack(keys, 1).flatten(0, 1)).view(8, 3, 3, 6)  # [B, S, T, d]
    rows = []
    for i, query in enumerate(queries):
        place = loss.student_place @ loss.teacher_place[i]
        logits = torch.stack([(turned[:, j, i] * query).sum(1) + place[j] for j in range(3)], 1)
        rows.append((logits / sqrt(6)).softmax(1))
    wanted = afd_loss(own, other, torch.stack(rows, 1))
    torch.testing.assert_close(loss(student, teacher, batch), wanted)


def test_all_blocks_take_part() -> None:
    distiller = make(loss := AFD(["layer1", "layer3"], ["layer1", "layer2", "layer3"]))
    assert (len(loss.keys), len(loss.queries)) == (2, 3)
    distiller(make_batch()).total.backward()
    assert AFD().student_taps == ("blocks",)
    assert distiller.student.layer1[0].weight.grad.any()


def test_refusals() -> None:
    maps = torch.randn(2, 3, 4, 4)
    with pytest.raises(TensorError, match=r"weights.*\[2, 2, 1\].*\[2, 1, 1\]"):
        afd_loss([maps], [maps], torch.rand(2, 2, 1))
    with pytest.raises(TensorError, match="teacher_feature"):
        afd_loss([maps], [maps[:1]], torch.rand(2, 1, 1))
    with pytest.raises(ConfigError, match="dim"):
        AFD(dim=0)

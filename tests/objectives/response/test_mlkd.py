from __future__ import annotations

import pytest
import torch

from limbeck.core.errors import ConfigError
from limbeck.objectives.response.kd import kd_loss
from limbeck.objectives.response.mlkd import MLKD, mlkd_loss
from tests.objectives.reference import dot, kl, softmax


def parts(student: list, teacher: list, temperature: float) -> tuple[float, float, float]:
    p, q = ([softmax(row, temperature) for row in rows] for rows in (teacher, student))
    size, classes = len(p), len(p[0])
    instance = temperature**2 * sum(kl(a, b) for a, b in zip(p, q, strict=True)) / size
    alike = sum((dot(p[i], p[j]) - dot(q[i], q[j])) ** 2 for i in range(size) for j in range(size)) / size
    p_columns, q_columns = ([list(c) for c in zip(*rows, strict=True)] for rows in (p, q))
    together = sum(
        (dot(p_columns[i], p_columns[j]) - dot(q_columns[i], q_columns[j])) ** 2
        for i in range(classes)
        for j in range(classes)
    )
    return instance, alike, together / classes


@pytest.mark.parametrize(
    "weights", [(1.0, 1.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (2.0, 0.5, 3.0)]
)
@pytest.mark.parametrize("temperatures", [[1.0], [2.0, 3.0, 5.0]])
def test_equals_the_paper(temperatures: list[float], weights: tuple[float, float, float]) -> None:
    student, teacher = 3 * torch.randn(2, 5, 7).double()
    wanted = sum(dot(list(weights), list(parts(student.tolist(), teacher.tolist(), t))) for t in temperatures)
    names = ("instance_weight", "batch_weight", "class_weight")
    found = mlkd_loss(student, teacher, temperatures=temperatures, **dict(zip(names, weights, strict=True)))
    assert found.item() == pytest.approx(wanted, rel=1e-9)


def test_the_first_part_alone_is_kd_at_several_temperatures() -> None:
    student, teacher = torch.randn(2, 5, 7).double()
    wanted = sum(kd_loss(student, teacher, temperature=t) for t in (2.0, 3.0, 4.0, 5.0, 6.0))
    torch.testing.assert_close(mlkd_loss(student, teacher, batch_weight=0.0, class_weight=0.0), wanted)


def test_relations_do_not_see_classes_or_samples_exchanged() -> None:
    """Samples are as alike if classes are renamed, classes occur together as often if samples are."""
    student, teacher = torch.randn(2, 5, 7).double()
    classes, samples = torch.randperm(7), torch.randperm(5)
    only = {"instance_weight": 0.0, "class_weight": 0.0}
    torch.testing.assert_close(mlkd_loss(student[:, classes], teacher, **only), mlkd_loss(student, teacher, **only))
    only = {"instance_weight": 0.0, "batch_weight": 0.0}
    torch.testing.assert_close(mlkd_loss(student[samples], teacher, **only), mlkd_loss(student, teacher, **only))


def test_what_does_not_count_is_in_no_relation() -> None:
    student, teacher = torch.randn(2, 6, 7).double()
    mask = torch.tensor([True, False, True, True, False, True])
    student[1] = 40.0
    torch.testing.assert_close(mlkd_loss(student, teacher, mask=mask), mlkd_loss(student[mask], teacher[mask]))


def test_positions_are_rows() -> None:
    student, teacher = torch.randn(2, 2, 3, 5).double()
    torch.testing.assert_close(mlkd_loss(student, teacher), mlkd_loss(student.reshape(6, 5), teacher.reshape(6, 5)))


def test_what_it_refuses() -> None:
    for temperatures in ([], [1.0, 0.0]):
        with pytest.raises(ConfigError, match="temperatures"):
            MLKD(temperatures=temperatures)

"""Partial-knowledge teachers: targets against the equations, identities, and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, TensorError
from limbeck.functional import kd_loss, label_smoothing_loss, understanding_kd_loss
from limbeck.objectives import UnderstandingKD
from limbeck.objectives.parts.partial_knowledge import classes_alike, confidence_alone, top_alone


def drawn(size: int = 7, classes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    student, teacher = 2 * torch.randn(2, size, classes, generator=generator, dtype=torch.float64)
    return student, teacher, torch.arange(size) % classes


def test_every_target_is_what_its_equation_says_and_sums_to_one() -> None:
    _, teacher, labels = drawn()
    p, weights = teacher.softmax(1), torch.randn(5, 3, dtype=torch.float64)
    sure, top, alike = confidence_alone(p, labels), top_alone(p, 2), classes_alike(weights, 0.4)
    for i, y in enumerate(labels.tolist()):
        best = sorted(range(5), key=lambda c: -float(p[i, c]))[:2]
        for c in range(5):
            assert float(sure[i, c]) == pytest.approx(float(p[i, y] if c == y else (1 - p[i, y]) / 4))
            rest = (1 - p[i, best].sum()) / 3
            assert float(top[i, c]) == pytest.approx(float(p[i, c] if c in best else rest))
    cosines = torch.stack([F.cosine_similarity(weights[y].expand(5, 3), weights, dim=1) for y in range(5)])
    torch.testing.assert_close(alike.double(), (cosines / 0.4).softmax(1), rtol=1e-5, atol=1e-6)
    for goal in (sure, top, alike):
        torch.testing.assert_close(goal.sum(1), torch.ones_like(goal[:, 0]))
    assert torch.equal(top_alone(p, 5), p)
    orthonormal = classes_alike(torch.eye(4), 0.5)
    assert orthonormal[0, 1:].unique().numel() == 1


def test_topk_of_one_is_pt_where_the_teacher_is_right() -> None:
    _, teacher, _ = drawn()
    p = teacher.softmax(1)
    torch.testing.assert_close(top_alone(p, 1), confidence_alone(p, p.argmax(1)))


def test_all_classes_kept_are_plain_kd_and_a_uniform_teacher_is_label_smoothing() -> None:
    student, teacher, labels = drawn()
    whole = understanding_kd_loss(student, teacher, labels, top=1.0, temperature=3.0)
    torch.testing.assert_close(whole, kd_loss(student, teacher, temperature=3.0))
    found = []
    for smoothed in (True, False):
        z = student.clone().requires_grad_()
        if smoothed:
            loss = label_smoothing_loss(z, labels, smoothing=0.3)
        else:
            uniform = understanding_kd_loss(z, torch.zeros_like(z), labels, temperature=1.0)
            loss = 0.7 * F.cross_entropy(z, labels) + 0.3 * uniform
        loss.backward()
        found.append(z.grad)
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("part", ["topk", "pt", "sim"])
def test_value_and_gradient_are_those_of_the_definition(part: str) -> None:
    student, teacher, labels = drawn()
    weights = torch.randn(5, 3, dtype=torch.float64)
    p = (teacher / 3).softmax(1)
    goals = {"topk": top_alone(p, 2), "pt": confidence_alone(p, labels)}
    goals["sim"] = classes_alike(weights, 3 * 0.1)[labels].double()
    goal, z = goals[part], student.clone().requires_grad_()
    loss = understanding_kd_loss(z, teacher, labels, part=part, temperature=3.0, top=0.4, class_weights=weights)
    wanted = 9 * F.kl_div((student / 3).log_softmax(1), goal, reduction="batchmean")
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    torch.testing.assert_close(z.grad, 3 * ((student / 3).softmax(1) - goal) / 7)


def test_confidence_alone_knows_no_order_of_the_other_classes_and_sim_no_sample() -> None:
    student, teacher, labels = drawn()
    moved = teacher.clone()
    for i, y in enumerate(labels.tolist()):
        others = [c for c in range(5) if c != y]
        moved[i, others] = teacher[i, others[::-1]]
    same = [understanding_kd_loss(student, t, labels, part="pt", temperature=1.0) for t in (teacher, moved)]
    torch.testing.assert_close(*same)
    weights = torch.randn(5, 3)
    of_class = [
        understanding_kd_loss(student, t, labels, part="sim", class_weights=weights) for t in (teacher, -2 * teacher)
    ]
    assert torch.equal(*of_class)


def test_places_without_a_label_do_not_count() -> None:
    student, teacher, labels = drawn()
    labels[:3] = -1
    found = understanding_kd_loss(student, teacher, labels, part="pt")
    torch.testing.assert_close(found, understanding_kd_loss(student[3:], teacher[3:], labels[3:], part="pt"))


def test_sim_reads_the_weights_of_the_teachers_last_layer() -> None:
    torch.manual_seed(0)
    teacher, student = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), nn.Linear(4, 3)
    batch = Batch(torch.randn(5, 4), torch.arange(5) % 3)
    losses = Distiller(student, UnderstandingKD(part="sim"), teacher).setup(batch)(batch)
    logits = student(batch.inputs)
    wanted = understanding_kd_loss(logits, logits, batch.labels, part="sim", class_weights=teacher[2].weight)
    torch.testing.assert_close(losses.total, wanted)


def test_mistakes_are_told() -> None:
    student, teacher, labels = drawn()
    with pytest.raises(ConfigError, match="no such part"):
        understanding_kd_loss(student, teacher, labels, part="all")
    with pytest.raises(TensorError, match="a row of weights"):
        understanding_kd_loss(student, teacher, labels, part="sim")
    with pytest.raises(TensorError, match="beside the"):
        understanding_kd_loss(student[:, :1], teacher[:, :1], labels * 0)

"""MT-DNN with distillation: the loss, who teaches what, whose head moves, and that teachers help."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, DataError, TensorError
from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.data.resident import ResidentLoader
from limbeck.engine import TrainConfig
from limbeck.models.task_heads import BARRED, TaskHeads
from limbeck.objectives import KD, CrossEntropy
from limbeck.objectives.response.cross_entropy import cross_entropy_loss
from limbeck.objectives.response.kd import kd_loss
from limbeck.schemes import Cast, build
from limbeck.schemes.many_teachers.mtdnn_kd import task_answers_loss, tasks_of


def net(seed: int, tasks: tuple[int, ...] = (3, 2), width: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), TaskHeads(width, tasks)).double()


def plain(seed: int, classes: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, classes)).double()


def batch(task: int | None = None) -> Batch:
    inputs = torch.randn(9, 5, generator=torch.Generator().manual_seed(3)).double()
    labels = torch.full((9, 2), -1)
    place = torch.arange(9) % 2 if task is None else torch.full((9,), task)
    labels[torch.arange(9), place] = torch.arange(9) % 2
    return Batch(inputs, labels, torch.arange(9))


def distiller(teachers: dict[str, nn.Module], **options):
    named = {name: FrozenTeacher(model) for name, model in teachers.items()}
    cast = Cast(net(0), Terms.of(CrossEntropy()), None, TrainConfig(steps=4), teachers=named)
    (training,) = build("mtdnn_kd", batches="mixed", **options).trainings(cast)
    return training.stages[0].distiller.setup(batch()).train()


def test_one_hot_answers_are_labels() -> None:
    z, labels = torch.randn(6, 2, 3).double(), torch.tensor([[0, -1], [2, -1], [-1, 1], [1, 0], [-1, -1], [-1, 2]])
    sure = F.one_hot(labels.clamp(min=0), 3).double()
    found = task_answers_loss(z, sure, labels, torch.tensor([True, True]))
    torch.testing.assert_close(found, cross_entropy_loss(z, labels))


@pytest.mark.parametrize("loss", ["cross_entropy", "kl", "symmetric", "js", "mse"])
def test_losses_are_those_of_their_definitions(loss: str) -> None:
    z, q = torch.randn(4, 1, 3).double(), torch.randn(4, 1, 3).double().softmax(-1)
    p = z.softmax(-1)
    middle = (p + q) / 2

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    wanted = {
        "cross_entropy": -(q * p.log()).sum(-1),
        "kl": kl(q, p),
        "symmetric": kl(q, p) + kl(p, q),
        "js": (kl(p, middle) + kl(q, middle)) / 2,
        "mse": (p - q).square().mean(-1),
    }[loss]
    found = task_answers_loss(z, q, torch.zeros(4, 1, dtype=torch.long), torch.tensor([True]), loss=loss)  # type: ignore[arg-type]
    torch.testing.assert_close(found, wanted.mean())


def test_each_task_hears_its_own_teachers_by_their_mean() -> None:
    """Against sums over samples: one teacher of all tasks, one of the first alone, a single one of the second."""
    teachers = {"all": net(1), "first": net(2), "second": plain(3, 2)}
    given = batch()
    losses = distiller(teachers, taught={"first": [0], "second": [1]}, weight=0.7)(given)
    own, z = distiller(teachers, taught={"first": [0], "second": [1]}).student(given.inputs), {}
    for name, model in teachers.items():
        said = model(given.inputs)
        z[name] = said
    total = torch.zeros((), dtype=torch.double)
    for i, row in enumerate(given.labels.tolist()):
        task = 0 if row[0] >= 0 else 1
        classes = (3, 2)[task]
        said = [z["all"][i, task, :classes], z["first"][i, 0] if task == 0 else z["second"][i]]
        q = torch.stack([s.softmax(-1) for s in said]).mean(0)
        log_p = own[i, task, :classes].log_softmax(-1)
        total += -log_p[row[task]] - 0.7 * (q * log_p).sum()
    torch.testing.assert_close(losses.total, total / 9)


def test_tasks_without_a_teacher_learn_from_labels_alone() -> None:
    given = batch(task=1)
    losses = distiller({"a": net(1)}, taught={"a": [0]})(given)
    assert float(losses.terms["teachers"]) == 0.0
    torch.testing.assert_close(losses.total.detach(), losses.terms["cross_entropy"])


def test_heads_of_other_tasks_stay() -> None:
    found = distiller({"a": net(1)})
    found(batch(task=0)).total.backward()
    first, second = found.student[2].heads
    assert float(first.weight.grad.abs().sum()) > 0
    assert second.weight.grad is None or float(second.weight.grad.abs().sum()) == 0.0


def test_of_one_task_and_one_teacher_it_is_kd() -> None:
    """Up to the scale: half the labels, half the teacher, at a temperature of 1."""
    student, teacher = plain(0, 3), plain(1, 3)
    x, y = batch().inputs, torch.arange(9) % 3
    cast = Cast(student, Terms.of(CrossEntropy()), None, TrainConfig(steps=4), teachers={"a": FrozenTeacher(teacher)})
    (training,) = build("mtdnn_kd", soft="kl", batches="mixed").trainings(cast)
    found = training.stages[0].distiller.setup(Batch(x, y)).train()(Batch(x, y)).total
    half = 0.5 * F.cross_entropy(student(x), y) + 0.5 * kd_loss(student(x), teacher(x), temperature=1.0)
    torch.testing.assert_close(found, 2 * half)


def test_parts_of_a_step_add_up() -> None:
    found, given = distiller({"a": net(1)}, taught={"a": [0]}), batch()
    totals = {"labels": given.count("labels")}
    parts = [
        found(Batch(given.inputs[rows], given.labels[rows], given.index[rows], totals=totals)).total
        for rows in (slice(0, 4), slice(4, 9))
    ]
    torch.testing.assert_close(sum(parts), found(given).total)


class Knows(nn.Module):
    """The rule of the first task, softly: how many of two numbers are above 0."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = 6 * x[:, 0], 6 * x[:, 1]
        return torch.stack([-a - b, torch.maximum(a - b, b - a), a + b], dim=1)


def test_a_teacher_helps_the_task_whose_labels_are_poor() -> None:
    draw = torch.Generator().manual_seed(0)
    x, fresh = torch.randn(2, 120, 5, generator=draw).double()
    labels = torch.stack([(x[:, :2] > 0).sum(1), (x[:, 2] > 0).long()], dim=1)
    labels[::2, 1], labels[1::2, 0] = -1, -1
    poor = torch.rand(120, generator=draw) < 0.4
    labels[poor & (labels[:, 0] >= 0), 0] = 0
    given, scores = Batch(x, labels), {}
    for weight in (1e-9, 2.0):
        torch.manual_seed(0)
        found = distiller({"a": Knows()}, taught={"a": [0]}, weight=weight)
        optimizer = torch.optim.Adam(found.student.parameters(), lr=0.03)
        for _ in range(60):
            optimizer.zero_grad()
            found(given).total.backward()
            optimizer.step()
        right = found.student(fresh)[:, 0].argmax(1) == (fresh[:, :2] > 0).sum(1)
        scores[weight] = float(right.double().mean())
    assert scores[2.0] > scores[1e-9] + 0.05


def test_steps_are_of_one_task_each() -> None:
    x, labels = torch.randn(30, 5).double(), torch.full((30, 2), -1)
    labels[:20, 0], labels[20:, 1] = torch.arange(20) % 3, torch.arange(10) % 2
    loader = ResidentLoader(x, labels, batch_size=5, shuffle=True)
    cast = Cast(net(0), Terms.of(CrossEntropy()), None, TrainConfig(epochs=1), loader)
    cast.teachers = {"a": FrozenTeacher(net(1))}
    (training,) = build("mtdnn_kd").trainings(cast)
    tasks = [tasks_of(batch.labels).unique().tolist() for batch in training.train.batches()]
    assert sorted(tasks) == [[0], [0], [0], [0], [1], [1]]


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match="scheme.soft"):
        build("mtdnn_kd", soft="none")
    with pytest.raises(ConfigError, match="no such teacher"):
        distiller({"a": net(1)}, taught={"b": [0]})
    with pytest.raises(ConfigError, match="fewer tasks"):
        distiller({"a": net(1)}, taught={"a": [2]})
    with pytest.raises(TensorError, match="a teacher of one task"):
        distiller({"a": plain(1, 2)})(batch())
    with pytest.raises(DataError, match="which sample is of which task"):
        tasks_of(None)
    cast = Cast(net(0), Terms.of(KD()), None, TrainConfig(steps=4), teachers={"a": FrozenTeacher(net(1))})
    with pytest.raises(ConfigError, match="what labels teach"):
        next(iter(build("mtdnn_kd").trainings(cast)))
    with pytest.raises(TensorError, match="student of several tasks"):
        distiller({"a": net(1)}).setup(Batch(batch().inputs, torch.zeros(9, 3, dtype=torch.long)))


def test_a_class_that_a_task_lacks_gets_nothing() -> None:
    z = torch.zeros(2, 1, 3)
    z[..., 2] = BARRED
    z.requires_grad_()
    q = torch.tensor([[[0.3, 0.7, 0.0]]]).expand(2, -1, -1)
    for loss in ("cross_entropy", "kl", "symmetric", "js", "mse"):
        value = task_answers_loss(z, q, torch.zeros(2, 1, dtype=torch.long), torch.tensor([True]), loss=loss)  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(value, z)
        assert bool(gradient.isfinite().all())
        assert bool((gradient[..., 2].abs() < 1e-30).all())

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt

import pytest
import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, DataError, TensorError
from limbeck.core.objective import DataInfo
from limbeck.core.trace import Trace
from limbeck.objectives.feature.nd_loss import NDLoss, nd_loss_loss
from limbeck.objectives.response.kd import KD
from tests.objectives.reference import dot
from tests.objectives.test_classes import Net, make_batch

E_Y = torch.tensor([[0.6, 0.8, 0.0]]).double()
ACROSS = torch.tensor([[0.8, -0.6, 0.0]]).double()
LABEL = torch.tensor([0])


def batches() -> Iterator[Batch]:
    return (make_batch(8 * i) for i in range(3))


def ready(loss: NDLoss | object, teacher: Net | None = None) -> Distiller:
    return Distiller(Net(4), loss, teacher or Net(6)).setup(make_batch(), DataInfo(batches=batches))


def written_out(student: Tensor, teacher: Tensor, labels: Tensor, means: Tensor) -> float:
    values = []
    for s, t, y in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        c = means[y].tolist()
        values.append(1 - dot(s, c) / sqrt(dot(c, c)) / max(sqrt(dot(s, s)), sqrt(dot(t, t))))
    return sum(values) / len(values)


@pytest.mark.parametrize("scale", [0.2, 1.0, 5.0])
def test_equals_the_paper(scale: float) -> None:
    student, teacher = scale * torch.randn(6, 5).double(), torch.randn(6, 5).double()
    labels, means = torch.tensor([0, 1, 2, 1, 0, 3]), torch.randn(4, 5).double()
    found = nd_loss_loss(student, teacher, labels, means)
    assert found.item() == pytest.approx(written_out(student, teacher, labels, means), rel=1e-9)


@pytest.mark.parametrize(
    ("student", "wanted"),
    [
        (3 * E_Y, 0.0),
        (1.5 * E_Y, 0.5),
        (6 * E_Y, 0.0),
        (torch.tensor([[0.8, -0.6, 0.0]]).double(), 1.0),
        (-3 * E_Y, 2.0),
    ],
)
def test_along_the_class_mean(student: Tensor, wanted: float) -> None:
    assert nd_loss_loss(student, 3 * E_Y, LABEL, 7 * E_Y).item() == pytest.approx(wanted, abs=1e-12)


def test_a_short_feature_grows_along_the_mean_and_a_long_one_only_turns() -> None:
    teacher = torch.tensor([[0.0, 3.0, 4.0]]).double()
    short = torch.tensor([[1.0, 1.0, -1.0]]).double().requires_grad_()
    nd_loss_loss(short, teacher, LABEL, E_Y).backward()
    torch.testing.assert_close(short.grad, -E_Y / 5)
    long = 10 * torch.tensor([[1.0, 1.0, -1.0]]).double()
    torch.testing.assert_close(nd_loss_loss(long, teacher, LABEL, E_Y), nd_loss_loss(3 * long, teacher, LABEL, E_Y))


def test_class_means_are_those_of_the_training_set() -> None:
    loss, teacher = NDLoss(), Net(6)
    ready(loss, teacher)
    rows: dict[int, list[Tensor]] = {c: [] for c in range(5)}
    for batch in batches():
        feature = teacher.layer3(teacher.layer2(teacher.layer1(batch.inputs))).mean((2, 3))
        for row, label in zip(feature, batch.labels.tolist(), strict=True):
            rows[label].append(row)
    for label, mine in rows.items():
        torch.testing.assert_close(loss.means[label], sum(mine) / len(mine))


def test_a_class_without_samples_adds_nothing() -> None:
    means = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    student = torch.randn(2, 2, requires_grad=True)
    each = nd_loss_loss(student, torch.randn(2, 2), torch.tensor([0, 1]), means, reduction="none")
    each.sum().backward()
    assert each[1] == 0
    assert not student.grad[1].any()
    assert student.grad[0].any()


def test_weight_zero_is_kd() -> None:
    teacher, batch = Net(6), make_batch()
    both = ready(KD() + 0.0 * NDLoss(), teacher)
    alone = Distiller(both.student, KD(), teacher).setup(batch)
    torch.testing.assert_close(both(batch).total, alone(batch).total)


def test_features_grow() -> None:
    """Shorter than the teacher's, the student's features become longer and turn to the class means."""
    teacher = Net(6)
    with torch.no_grad():
        teacher.layer3[0].weight *= 20
    distiller = ready(NDLoss(), teacher)
    optimizer = torch.optim.Adam(distiller.student.parameters(), lr=0.01)
    batch = make_batch()

    def length() -> float:
        trace, _ = distiller.traces(batch)
        return trace["penultimate"].norm(dim=1).mean().item()

    before, losses = length(), []
    for _ in range(20):
        optimizer.zero_grad()
        total = distiller(batch).total
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert length() > 1.5 * before
    assert losses[-1] < losses[0]


def test_unlabelled_and_masked_places_do_not_count() -> None:
    student, teacher, means = torch.randn(3, 4, 6), torch.randn(3, 4, 6), torch.randn(5, 6)
    labels = torch.randint(0, 5, (3, 4))
    labels[0] = -100
    counts = torch.rand(3, 4) < 0.6
    kept = counts & (labels >= 0)
    wanted = nd_loss_loss(student[kept], teacher[kept], labels[kept], means)
    torch.testing.assert_close(nd_loss_loss(student, teacher, labels, means, mask=counts), wanted)


def test_tokens_under_one_label_are_averaged() -> None:
    features = torch.randn(2, 4, 6, 7)
    batch = Batch(torch.zeros(4), labels=torch.tensor([0, 1, 2, 0]))
    logits = torch.zeros(4, 3)

    def trace(feature: Tensor) -> Trace:
        return Trace(logits, {"x": feature, "logits": logits})

    loss, values = NDLoss("x"), []
    for pair in (features, features.mean(2)):
        student, teacher = (trace(f) for f in pair)
        loss.setup(student, teacher, batch, DataInfo(answers=lambda t=teacher: [(t, batch)]))
        values.append(loss(student, teacher, batch))
    torch.testing.assert_close(*values)


def test_refusals() -> None:
    s = torch.randn(3, 4)
    with pytest.raises(TensorError, match=r"means.*\[1, 6\].*\[1, 4\]"):
        nd_loss_loss(s, s, torch.tensor([0, 1, 2]), torch.randn(5, 6))
    with pytest.raises(TensorError, match="names no class"):
        nd_loss_loss(s, s, torch.tensor([0, 1, 5]), torch.randn(5, 4))
    with pytest.raises(ConfigError, match=r"nd_loss\.means.*training set"):
        Distiller(Net(4), NDLoss(), Net(6)).setup(make_batch())
    with pytest.raises(DataError, match=r"batch\.labels"):
        ready(NDLoss())(make_batch().replace(labels=None))

"""LELP: targets by loops, what its directions may and may not depend on, and the whole of it on a small problem."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, TapError, TensorError
from limbeck.core.objective import DataInfo
from limbeck.models import put_head
from limbeck.models.heads import SubclassHead
from limbeck.objectives.parts.subspaces import class_directions, class_scores, features_by_class
from limbeck.objectives.response.kd import kd_loss
from limbeck.objectives.response.lelp import LELP, lelp_loss
from tests.objectives.reference import kl, softmax

CLASSES, WIDTH, SAMPLES = 3, 9, 60


def target(logits: list[float], scores: list[list[float]], temperature: float, tau: float) -> list[float]:
    """The teacher's distribution over all subclasses of one sample."""
    found = []
    for share, along in zip(softmax(logits, temperature), scores, strict=True):
        both = [*along, *(-a for a in along)]
        found += [share * q for q in (softmax(both, tau * temperature) if both else [1.0])]
    return found


def drawn(number: int = 2, samples: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    student = torch.randn(samples, CLASSES * max(2 * number, 1), dtype=torch.float64)
    return student, *(torch.randn(samples, *s, dtype=torch.float64) for s in ((CLASSES,), (CLASSES, number)))


def teachers_data() -> tuple[Tensor, Tensor, Tensor]:
    """Features, weights of a classifier, and classes."""
    weight = torch.randn(CLASSES, WIDTH, dtype=torch.float64)
    features = torch.randn(SAMPLES, WIDTH, dtype=torch.float64) * torch.linspace(0.2, 3, WIDTH) + torch.randn(WIDTH)
    features = (
        features + torch.randn(SAMPLES, WIDTH, dtype=torch.float64).exp()
    )  # tails, so that directions have a sign
    return features, weight, torch.arange(SAMPLES) % CLASSES


@pytest.mark.parametrize(("number", "temperature", "tau"), [(2, 2.0, 1.0), (1, 1.0, 0.5), (3, 4.0, 2.0), (0, 3.0, 1.0)])
def test_it_is_the_divergence_over_subclasses(number: int, temperature: float, tau: float) -> None:
    student, teacher, scores = drawn(number)
    wanted = sum(
        kl(target(t, a, temperature, tau), softmax(s, temperature))
        for s, t, a in zip(student.tolist(), teacher.tolist(), scores.tolist(), strict=True)
    )
    found = lelp_loss(student, teacher, scores, temperature=temperature, subclass_temperature=tau)
    assert found.item() == pytest.approx(temperature**2 * wanted / 4, rel=1e-10)


def test_targets_sum_to_one_and_their_classes_are_the_teachers() -> None:
    """At its least, where the student says the target itself, the loss is 0: so the target can be read from it."""
    _, teacher, scores = drawn()
    wanted = torch.tensor(
        [target(t, a, 2.0, 1.0) for t, a in zip(teacher.tolist(), scores.tolist(), strict=True)], dtype=torch.float64
    )
    torch.testing.assert_close(wanted.unflatten(1, (CLASSES, 4)).sum(dim=2), (teacher / 2).softmax(dim=1))
    assert lelp_loss(2 * wanted.log(), teacher, scores).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_who_says_the_target_has_the_teachers_class_logits(temperature: float) -> None:
    """However unevenly its subclasses share a class: they are folded at the temperature they were learned at."""
    _, teacher, scores = drawn()
    wanted = torch.tensor(
        [target(t, a, temperature, 0.2) for t, a in zip(teacher.tolist(), scores.tolist(), strict=True)]
    )
    head = SubclassHead(CLASSES * 4, CLASSES, 4, temperature)
    head.sub = nn.Identity()
    folded = head(temperature * wanted.double().log())
    torch.testing.assert_close(folded.softmax(dim=1), teacher.softmax(dim=1), rtol=1e-4, atol=1e-5)


def test_without_directions_it_is_kd() -> None:
    student, teacher, scores = drawn(0)
    torch.testing.assert_close(lelp_loss(student, teacher, scores), kd_loss(student, teacher, temperature=2.0))


def test_where_subclasses_do_not_differ_it_is_kd_on_classes() -> None:
    student, teacher = torch.randn(2, 4, CLASSES, dtype=torch.float64)
    alike = student.repeat_interleave(4, dim=1)
    found = lelp_loss(alike, teacher, torch.zeros(4, CLASSES, 2).double())
    torch.testing.assert_close(found, kd_loss(student, teacher, temperature=2.0))


def test_scores_are_standardised_in_each_class() -> None:
    features, weight, classes = teachers_data()
    directions, offsets = class_directions(features, classes, weight, 3)
    scores = class_scores(features, directions.double(), offsets.double())
    for c in range(CLASSES):
        own = scores[classes == c, c]
        torch.testing.assert_close(own.mean(dim=0), torch.zeros(3).double(), atol=1e-5, rtol=0)
        torch.testing.assert_close(own.var(dim=0, correction=0), torch.ones(3).double(), atol=1e-5, rtol=0)
        assert (own.pow(3).sum(dim=0) >= -1e-4).all()


def test_directions_are_the_principal_ones_of_what_the_classifier_does_not_see() -> None:
    """By singular values of the data, where ours are eigenvalues of the covariance."""
    features, weight, classes = teachers_data()
    directions, _ = class_directions(features, classes, weight, 2)
    projector = torch.eye(WIDTH).double() - torch.linalg.pinv(weight) @ weight
    for c in range(CLASSES):
        hidden = features[classes == c] @ projector
        _, sizes, vectors = torch.linalg.svd(hidden - hidden.mean(dim=0), full_matrices=False)
        spread = sizes[:2] / math.sqrt(len(hidden))
        cosine = (directions[c].double() * spread.unsqueeze(1) * vectors[:2]).sum(dim=1)
        torch.testing.assert_close(cosine.abs(), torch.ones(2).double(), atol=1e-5, rtol=0)


def test_what_the_classifier_sees_changes_no_score() -> None:
    features, weight, classes = teachers_data()
    directions, offsets = (t.double() for t in class_directions(features, classes, weight, 3))
    before = class_scores(features, directions, offsets)
    after = class_scores(features + torch.randn(SAMPLES, CLASSES).double() @ weight, directions, offsets)
    torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-5)


def test_a_rotation_of_the_feature_space_changes_no_score() -> None:
    features, weight, classes = teachers_data()
    rotation, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64))
    found = []
    for h, w in ((features, weight), (features @ rotation, weight @ rotation)):
        directions, offsets = class_directions(h, classes, w, 3)
        found.append(class_scores(h, directions.double(), offsets.double()))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_a_class_that_nobody_is_counted_to_is_not_split() -> None:
    features, weight, classes = teachers_data()
    directions, offsets = class_directions(features, classes.clamp(max=1), weight, 2)
    assert not class_scores(features, directions.double(), offsets.double())[:, 2].any()
    few, _ = class_directions(features[:1], classes[:1] * 0, weight, 2)
    assert not few.any()  # one sample does not vary


class Teacher(nn.Module):
    """Two classes, each of two groups that the logits do not tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(4, 4), nn.Linear(4, 2)
        with torch.no_grad():
            self.body.weight.copy_(torch.eye(4))
            self.body.bias.zero_()
            self.fc.weight.copy_(torch.tensor([[2.0, 0, 0, 0], [-2.0, 0, 0, 0]]))
            self.fc.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x))


def problem() -> tuple[nn.Module, nn.Module, Batch, DataInfo]:
    inputs = torch.randn(80, 4) * 0.1
    labels = torch.arange(80) % 2
    inputs[:, 0] += 1 - 2 * labels
    inputs[:, 1] += 3.0 * ((torch.arange(80) // 2 % 2) * 2 - 1)  # the group
    batch = Batch(inputs, labels)
    student = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    put_head(student, {"subclass": {"subclasses": 2}}, example=batch)
    return student, Teacher(), batch, DataInfo(samples=80, classes=2, batches=lambda: iter([batch]))


def test_the_student_learns_groups_that_no_logit_tells() -> None:
    student, teacher, batch, data = problem()
    distiller = Distiller(student, LELP(subclasses=2), teacher).setup(batch, data)
    optimizer = torch.optim.Adam(distiller.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        distiller(batch).total.backward()
        optimizer.step()
    with torch.no_grad():
        sub = student[2].sub(student[:2](batch.inputs)).unflatten(1, (2, 2))
    own = sub[torch.arange(80), batch.labels]
    group = torch.arange(80) // 2 % 2
    told = own.argmax(dim=1)
    for c in (0, 1):  # which half is which is the direction's sign
        agreement = (told == group)[batch.labels == c].float().mean()
        assert max(agreement, 1 - agreement) == 1.0
    assert (student(batch.inputs).argmax(dim=1) == batch.labels).all()


def test_the_statistics_are_saved_and_loaded() -> None:
    student, teacher, batch, data = problem()
    first = Distiller(student, LELP(subclasses=2), teacher).setup(batch, data)
    saved = next(iter(first.loss)).state_dict()
    assert set(saved) == {"directions", "offsets"}
    other = DataInfo(batches=lambda: iter([batch.replace(inputs=batch.inputs * torch.rand(4))]))
    second = Distiller(student, LELP(subclasses=2), teacher).setup(batch, other)
    assert not torch.equal(first(batch).total, second(batch).total)
    next(iter(second.loss)).load_state_dict(saved)
    assert torch.equal(first(batch).total, second(batch).total)


def test_at_most_so_many_of_a_class_are_looked_at() -> None:
    _, teacher, batch, _ = problem()
    distiller = Distiller(nn.Linear(4, 2), LELP(subclasses=1), teacher)
    distiller.teacher.attach(("logits", "penultimate"), batch)
    answers = DataInfo(answers=lambda: ((distiller.teacher(part), part) for part in (batch, batch)))
    features, told = features_by_class(answers, 2, "test", most=50)
    assert told.bincount().tolist() == [50, 50]
    torch.testing.assert_close(features[:80], batch.inputs)
    assert len(features_by_class(answers, 2, "test")[0]) == 160


def test_what_is_missing_or_wrong_is_named() -> None:
    for wrong in (0, 3, -2):
        with pytest.raises(ConfigError, match="even, or 1"):
            LELP(subclasses=wrong)
    student, teacher, scores = drawn()
    with pytest.raises(TensorError, match="subclass_logits"):
        lelp_loss(student[:, :5], teacher, scores)
    model, judge, batch, data = problem()
    with pytest.raises(ConfigError, match="teacher's answers"):
        Distiller(model, LELP(subclasses=2), judge).setup(batch, DataInfo())
    with pytest.raises(ConfigError, match=r"subclasses: .*found 8; wanted at most 6"):
        Distiller(model, LELP(subclasses=8), judge).setup(batch, data)
    with pytest.raises(TapError, match=r"head\.sub: .*put_head"):
        Distiller(nn.Sequential(nn.Linear(4, 2)), LELP(), judge).setup(batch, data)

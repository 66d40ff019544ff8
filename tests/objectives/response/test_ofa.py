from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, TensorError
from limbeck.models.vit import ViT
from limbeck.models.zoo import create
from limbeck.objectives.response.cross_entropy import CrossEntropy
from limbeck.objectives.response.ofa import OFA, ofa_loss
from tests.objectives import reference
from tests.objectives.test_classes import Net, make_batch

TEACHER = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log()
STUDENT = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64).log()


def plain(student: Tensor, teacher: Tensor, labels: Tensor, gamma: float, temperature: float) -> float:
    values = []
    for s, t, y in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        p, log_q = reference.softmax(t, temperature), torch.tensor(s).double().div(temperature).log_softmax(-1).tolist()
        m = [1.0 if c == y else 0.0 for c in range(len(p))]
        values.append(-sum(((a + b) ** gamma - b) * q for a, b, q in zip(p, m, log_q, strict=True)))
    return reference.mean(values)


@pytest.mark.parametrize(("gamma", "temperature"), [(1.0, 1.0), (1.5, 1.0), (2.0, 3.0)])
def test_equals_the_paper(gamma: float, temperature: float) -> None:
    student, teacher, labels = *torch.randn(2, 5, 4).double(), torch.tensor([0, 3, -1, 2, 2])
    value = ofa_loss(student, teacher, labels, gamma=gamma, temperature=temperature)
    assert value.item() == pytest.approx(plain(student, teacher, labels, gamma, temperature), rel=1e-6)


@pytest.mark.parametrize(("gamma", "wanted"), [(1.0, 0.82863), (1.5, 0.80193), (2.0, 1.03665)])
def test_worked_examples(gamma: float, wanted: float) -> None:
    value = ofa_loss(STUDENT, TEACHER, torch.tensor([0]), gamma=gamma)
    assert value.item() == pytest.approx(wanted, abs=5e-6)


def test_gamma_one_is_plain_distillation() -> None:
    student, teacher, labels = *torch.randn(2, 4, 5).double(), torch.randint(0, 5, (4,))
    student.requires_grad_()
    ofa_loss(student, teacher, labels, gamma=1.0).backward()
    torch.testing.assert_close(student.grad, ((student.softmax(-1) - teacher.softmax(-1)) / 4).detach())


def test_what_gamma_does_to_the_coefficients() -> None:
    """The gradient at log q tells them; the worked example's are (1.21653, 0.08944, 0.03162)."""

    def coefficients(teacher: Tensor, gamma: float) -> list[float]:
        found = []
        for c in range(3):
            q = torch.full((1, 3), 1e-3).double()
            q[0, c] = 1 - 2e-3
            base = ofa_loss(q.log(), teacher, torch.tensor([0]), gamma=gamma)
            found.append(base.item())
        total = torch.tensor(found)  # total_c = -(sum of others) log 1e-3 - own log(1 - 2e-3)
        a, b = -torch.log(torch.tensor(1e-3)), -torch.log(torch.tensor(1 - 2e-3))
        matrix = a * (1 - torch.eye(3)) + b * torch.eye(3)
        return torch.linalg.solve(matrix, total).tolist()

    assert coefficients(TEACHER, 1.5) == pytest.approx([1.21653, 0.08944, 0.03162], abs=1e-4)
    surer = torch.tensor([[0.9, 0.06, 0.04]]).double().log()
    assert coefficients(surer, 1.5)[0] > coefficients(TEACHER, 1.5)[0]
    assert coefficients(TEACHER, 2.0)[1] < coefficients(TEACHER, 1.5)[1]


def test_soft_labels_count_by_their_largest() -> None:
    student, teacher, labels = *torch.randn(2, 4, 5), torch.randint(0, 5, (4,))
    soft = 0.7 * nn.functional.one_hot(labels, 5).float() + 0.06
    torch.testing.assert_close(ofa_loss(student, teacher, soft), ofa_loss(student, teacher, labels))


STUDENTS = {
    "convolutional": lambda: create("resnet8", num_classes=5),
    "transformer": lambda: ViT(dim=16, depth=4, heads=2, num_classes=5, image_size=8, patch_size=2),
}


@pytest.mark.parametrize("kind", STUDENTS)
def test_every_stage_has_a_branch_and_the_student_ships_without(kind: str) -> None:
    torch.manual_seed(0)
    student, teacher, loss = STUDENTS[kind](), Net(6), OFA()
    names, batch = list(student.state_dict()), make_batch()
    distiller = Distiller(student, loss, teacher).setup(batch)
    assert len(loss.heads) == {"convolutional": 3, "transformer": 4}[kind]
    losses = distiller(batch)
    assert sorted(losses.terms) == ["ofa/branches", "ofa/logits"]
    losses.total.backward()
    assert all(p.grad is not None for p in loss.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert list(student.state_dict()) == names
    torch.testing.assert_close(
        losses.terms["ofa/logits"], ofa_loss(student(batch.inputs), teacher(batch.inputs), batch.labels).detach()
    )


@pytest.mark.parametrize("kind", STUDENTS)
def test_it_learns(kind: str) -> None:
    torch.manual_seed(0)
    batch = make_batch(size=16)
    teacher = Net(6)
    distiller = Distiller(STUDENTS[kind](), CrossEntropy() + OFA(), teacher).setup(batch)
    optimizer = torch.optim.Adam(distiller.parameters(), lr=3e-3)
    seen = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = distiller(batch).total
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 0.97 * seen[0]


def test_what_it_refuses() -> None:
    logits = torch.randn(2, 3)
    with pytest.raises(TensorError, match="labels"):
        ofa_loss(logits, logits)
    for name in ("gamma", "temperature"):
        with pytest.raises(ConfigError, match=name):
            ofa_loss(logits, logits, torch.tensor([0, 1]), **{name: 0.0})
        with pytest.raises(ConfigError, match=name):
            OFA(**{name: 0.0})
    distiller = Distiller(create("resnet8", num_classes=5), OFA(), Net(6)).setup(make_batch())
    distiller.student.eval()  # whose own normalisation refuses one sample too
    with pytest.raises(TensorError, match="2 or more"):
        distiller(Batch(torch.randn(1, 3, 4, 4), labels=torch.tensor([0])))

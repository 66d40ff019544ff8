"""KD-Loss against the paper's equations in plain loops, and what its zones promise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import DataError, TensorError
from limbeck.objectives.response.kd_loss_landmark import KDLossLandmark, kd_loss_landmark_loss
from limbeck.objectives.response.mse import MSE


def assist(p: float, g: float, t: float, pull: float, push: float) -> float:
    side = 1 if p > g else -1
    reflected = g + side * abs(t - g)
    knee = g + 0.15 * (reflected - g)
    if abs(p - g) > abs(reflected - g):
        slope = pull
    elif min(knee, reflected) <= p <= max(knee, reflected):
        slope = push
    else:
        slope = 0.0
    return slope * abs(reflected - p)


def written_out(student: Tensor, tough: Tensor, tolerant: Tensor, labels: Tensor) -> float:
    total = 0.0
    for p, t1, t2, g in zip(*(x.flatten().tolist() for x in (student, tough, tolerant, labels)), strict=True):
        e, d = abs(g - p), abs(g - t2)
        total += 2 * (3 * e if e <= d else e * e + 3 * d - d * d)
        total += assist(p, g, t1, 1.9, -0.45) + assist(p, g, t2, 1.8, -0.4)
    return total / student.numel()


def one(value: float) -> Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


def tough_part(p: float, t: float = 0.2) -> float:
    return kd_loss_landmark_loss(one(p), one(t), one(0), one(0), main_weight=0.0, tolerant_weight=0.0).item()


def test_equals_the_paper() -> None:
    labels = torch.randn(9, 8).double()
    student, tough, tolerant = (labels + s * torch.randn(9, 8).double() for s in (0.2, 0.1, 0.2))
    found = kd_loss_landmark_loss(student, tough, tolerant, labels)
    assert found.item() == pytest.approx(written_out(student, tough, tolerant, labels), rel=1e-9)


@pytest.mark.parametrize(
    ("p", "wanted"), [(0.5, 0.57), (0.25, 0.095), (0.1, -0.045), (0.03, -0.0765), (0.02, 0.0), (-0.1, -0.045)]
)
def test_worked_zones(p: float, wanted: float) -> None:
    assert tough_part(p) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("p", [-0.3, -0.1, 0.01, 0.15, 0.4])
def test_on_which_side_the_teacher_errs_does_not_matter(p: float) -> None:
    assert tough_part(p, 0.2) == tough_part(p, -0.2)


def test_the_main_loss_is_continuous_at_the_teacher() -> None:
    main = {"tough_weight": 0.0, "tolerant_weight": 0.0, "main_weight": 1.0}
    for e in (0.1 - 1e-12, 0.1 + 1e-12):
        assert kd_loss_landmark_loss(one(e), one(0), one(0.1), one(0), **main).item() == pytest.approx(0.3)


def test_a_right_student_has_nothing_to_learn() -> None:
    labels = torch.randn(4, 6)
    found = kd_loss_landmark_loss(labels, labels + 0.1, labels - 0.2, labels)
    assert found.item() == 0


def test_it_is_downhill_to_the_truth_everywhere() -> None:
    distance = torch.linspace(1e-3, 1, 999, dtype=torch.float64).unsqueeze(1).requires_grad_()
    teachers = torch.full((2, 999, 1), 0.2, dtype=torch.float64) * torch.tensor([1.0, 1.7]).double().view(2, 1, 1)
    kd_loss_landmark_loss(distance, *teachers, torch.zeros_like(distance)).backward()
    assert distance.grad is not None
    assert (distance.grad > 0).all()


def errors(loss: MSE | KDLossLandmark) -> float:
    """Mean distance from the truth of a student that saw outliers, beside teachers that did not."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(96, 4, generator=generator)
    truth = inputs @ torch.randn(4, 6, generator=generator)
    noise = torch.randn(truth.shape, generator=generator) * (torch.rand(truth.shape, generator=generator) < 0.15)
    extras = {"tolerant": truth + 0.05}
    batch = Batch(inputs, labels=truth + 4 * noise, extras=extras)
    torch.manual_seed(0)
    student, teacher = nn.Linear(4, 6), Truth(truth)
    distiller = Distiller(student, loss, teacher).setup(batch)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.03)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / 200)
        optimizer.zero_grad()
        distiller(batch).total.backward()
        optimizer.step()
    return (student(inputs) - truth).norm(dim=1).mean().item()


class Truth(nn.Module):
    def __init__(self, truth: Tensor) -> None:
        super().__init__()
        self.register_buffer("truth", truth)
        self.logits = nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.logits(self.get_buffer("truth")[: len(inputs)])


def test_teachers_help_where_labels_are_noisy() -> None:
    assert errors(KDLossLandmark()) < 0.7 * errors(MSE())


def test_a_teacher_that_holds_both() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tough, self.tolerant = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.tolerant(x)
            return self.tough(x)

    teacher, student = Both(), nn.Linear(3, 2)
    batch = Batch(torch.randn(5, 3), labels=torch.randn(5, 2))
    distiller = Distiller(student, KDLossLandmark(tolerant="tolerant"), teacher).setup(batch)
    answers = (m(batch.inputs) for m in (student, teacher.tough, teacher.tolerant))
    assert batch.labels is not None
    torch.testing.assert_close(distiller(batch).total, kd_loss_landmark_loss(*answers, batch.labels))


def test_errors_say_what_is_missing() -> None:
    batch = Batch(torch.randn(5, 3), labels=torch.randn(5, 2))
    distiller = Distiller(nn.Linear(3, 2), KDLossLandmark(), nn.Linear(3, 2))
    with pytest.raises(DataError, match=r"batch\.extras: the tolerant teacher's answers.*wanted 'tolerant'"):
        distiller.setup(batch)(batch)
    with pytest.raises(TensorError, match="tolerant_output"):
        kd_loss_landmark_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 3))

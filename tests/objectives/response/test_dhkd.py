from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, TensorError
from limbeck.objectives.response.cross_entropy import CrossEntropy
from limbeck.objectives.response.dhkd import DHKD, dhkd_loss
from tests.objectives import reference


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def plain(own: Tensor, teacher: Tensor, temperature: float, norm: bool) -> float:
    def one(a: float, z: float) -> float:
        p, q = (0.5, sigmoid((a - z) / temperature)) if norm else (sigmoid(z / temperature), sigmoid(a / temperature))
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    rows = zip(own.tolist(), teacher.tolist(), strict=True)
    return temperature**2 * reference.mean([sum(one(a, z) for a, z in zip(r, t, strict=True)) for r, t in rows])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("norm", [True, False])
def test_equals_the_paper(temperature: float, norm: bool) -> None:
    own, teacher = 3 * torch.randn(2, 5, 4).double()
    value = dhkd_loss(own, teacher, temperature=temperature, norm=norm)
    assert value.item() == pytest.approx(plain(own, teacher, temperature, norm), rel=1e-9)


@pytest.mark.parametrize(("gap", "wanted"), [(5.0, 2.54297), (2.5, 0.735128), (0.0, 0.0)])
def test_log_cosh(gap: float, wanted: float) -> None:
    own = torch.tensor([[gap]], dtype=torch.float64).requires_grad_()
    value = dhkd_loss(own, torch.zeros(1, 1).double())
    assert value.item() == pytest.approx(wanted, abs=5e-6)
    value.backward()
    assert own.grad.item() == pytest.approx(math.tanh(gap / 4), abs=1e-12)


def test_a_sure_teacher_costs_no_precision() -> None:
    value = dhkd_loss(torch.tensor([[1e4]]), torch.tensor([[-1e4]]))
    assert value.item() == pytest.approx(4 * (2e4 / 4 - math.log(2)), rel=1e-6)


def step(*terms: tuple[float, nn.Module]) -> tuple[nn.Module, Distiller]:
    torch.manual_seed(0)
    student, teacher = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), nn.Linear(6, 3)
    loss = sum((w * o for w, o in terms[1:]), terms[0][0] * terms[0][1])
    batch = Batch(torch.randn(8, 6), labels=torch.arange(8) % 3)
    distiller = Distiller(student, loss, teacher).setup(batch)
    distiller(batch).total.backward()
    return student, distiller


@pytest.mark.parametrize("head", ["nonlinear", "linear"])
def test_each_head_sees_its_own_loss_and_the_backbone_both(head: str) -> None:
    aux = DHKD(head=head)  # type: ignore[arg-type]
    student, _ = step((1.0, aux))
    assert student[2].weight.grad is None
    assert student[0].weight.grad.abs().sum() > 0
    assert all(p.grad is not None for p in aux.parameters())
    alone, _ = step((1.0, CrossEntropy()))
    other = DHKD(head=head)  # type: ignore[arg-type]
    both, _ = step((1.0, CrossEntropy()), (1.0, other))
    torch.testing.assert_close(both[2].weight.grad, alone[2].weight.grad)
    assert not torch.allclose(both[0].weight.grad, alone[0].weight.grad)


def test_weight_zero_is_plain_training() -> None:
    alone, _ = step((1.0, CrossEntropy()))
    both, _ = step((1.0, CrossEntropy()), (0.0, DHKD()))
    for a, b in zip(alone.parameters(), both.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_the_second_head_stays_out_of_the_student() -> None:
    student, distiller = step((1.0, DHKD()))
    before = copy.deepcopy(student.state_dict())
    assert sorted(before) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert any("auxiliary" in name for name in distiller.state_dict())


def test_what_it_refuses() -> None:
    with pytest.raises(TensorError, match="teacher_logits"):
        dhkd_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ConfigError, match="temperature"):
        dhkd_loss(torch.zeros(2, 3), torch.zeros(2, 3), temperature=0.0)
    with pytest.raises(ConfigError, match="head"):
        DHKD(head="deep")  # type: ignore[arg-type]

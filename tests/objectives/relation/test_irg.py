from __future__ import annotations

import pytest
import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import TensorError
from limbeck.core.trace import Trace
from limbeck.objectives.relation.irg import IRG, irg_loss
from tests.objectives.test_classes import Net, make_batch


def apart(x: list[float], y: list[float]) -> float:
    return sum((a - b) ** 2 for a, b in zip(x, y, strict=True))


def graph(x: Tensor) -> list[list[float]]:
    found = [[apart(p, q) for q in x.tolist()] for p in x.tolist()]
    return [[v / max(max(row) for row in found) for v in row] for row in found]


def way(y: Tensor, z: Tensor) -> list[float]:
    found = [apart(p, q) for p, q in zip(y.tolist(), z.tolist(), strict=True)]
    return [v / max(found) for v in found]


def test_equals_its_equation() -> None:
    student, teacher = torch.randn(6, 4).double(), torch.randn(6, 7).double()
    own, told = list(torch.randn(4, 6, 3).double()), list(torch.randn(4, 6, 5).double())
    wanted = 2 * sum(apart(a, b) for a, b in zip(graph(student), graph(teacher), strict=True))
    for i in (0, 2):
        wanted += 3 * apart(way(own[i], own[i + 1]), way(told[i], told[i + 1]))
    found = irg_loss(student, teacher, own, told, edges=2.0, transformation=3.0)
    assert found.item() == pytest.approx(wanted / 12, rel=1e-9)


def test_gradient_is_the_derivative() -> None:
    """Also of the greatest distance, to which both of its samples belong."""
    student, teacher = torch.randn(5, 3).double().requires_grad_(), torch.randn(5, 4).double()
    assert torch.autograd.gradcheck(lambda s: irg_loss(s, teacher), student)


def test_figures_alike_cost_nothing() -> None:
    teacher = torch.randn(6, 4).double()
    turn = torch.linalg.qr(torch.randn(4, 4).double()).Q
    assert irg_loss(0.3 * teacher @ turn + 2, teacher).item() == pytest.approx(0.0, abs=1e-12)


def test_equal_samples_pass_a_finite_gradient() -> None:
    student = torch.ones(4, 3, requires_grad=True)
    irg_loss(student, torch.randn(4, 3), [student, student], list(torch.randn(2, 4, 3))).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_masked_samples_are_left_out_also_of_the_greatest() -> None:
    features = [torch.randn(6, 4).double() for _ in range(6)]
    for x in features:
        x[3:5] *= 50
    counts = torch.tensor([True, True, True, False, False, True])
    s, t, *flow = features
    wanted = irg_loss(s[counts], t[counts], [f[counts] for f in flow[:2]], [f[counts] for f in flow[2:]])
    torch.testing.assert_close(irg_loss(s, t, flow[:2], flow[2:], mask=counts), wanted)


def test_objective_with_flow_within_stages() -> None:
    student, teacher, batch = Net(4), Net(6), make_batch()
    taps = ["layer2.0", "layer2", "layer3.0", "layer3"]
    objective = IRG(flow=taps)
    found = Distiller(student, objective, teacher).setup(batch)(batch).total

    def layers(net: Net) -> list[Tensor]:
        x = net.layer1(batch.inputs)
        second = net.layer2[0](x)
        third = net.layer3[0](second.relu())
        return [f.mean((2, 3)) for f in (second, second.relu(), third, third.relu())]

    own, told = layers(student), layers(teacher)
    torch.testing.assert_close(found, irg_loss(own[-1], told[-1], own, told))
    assert objective.student_taps == ("penultimate", *taps)


def test_misuse_is_refused() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(TensorError, match="student_flow"):
        irg_loss(x, x, [x, x], [x])
    with pytest.raises(TensorError, match="student_flow"):
        irg_loss(x, x, [x], [x])
    with pytest.raises(TensorError, match="its last"):
        irg_loss(x, x, [x, x[:, :2]], [x, x])
    traces = [Trace(None, {"penultimate": torch.randn(n, 2)}) for n in (3, 4)]
    with pytest.raises(TensorError, match="teacher_feature"):
        IRG()(*traces, Batch(torch.zeros(3)))

from __future__ import annotations

from math import exp, sqrt

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.objective import DataInfo
from limbeck.core.trace import Trace
from limbeck.core.transport import sinkhorn
from limbeck.objectives import WCoRD
from limbeck.objectives.parts.critic import LipschitzCritic
from limbeck.objectives.relation.wcord import wcord_loss


def primal(student: Tensor, teacher: Tensor, epsilon: float, iterations: int) -> float:
    """Sinkhorn's iterations on plain numbers."""

    def cosine(p: list[float], q: list[float]) -> float:
        return sum(a * b for a, b in zip(p, q, strict=True)) / sqrt(sum(a * a for a in p) * sum(b * b for b in q))

    n = len(student)
    cost = [[1 - cosine(p, q) for q in teacher.tolist()] for p in student.tolist()]
    kernel = [[exp(-c / epsilon) for c in row] for row in cost]
    v = [1.0] * n
    for _ in range(iterations):
        u = [1 / n / sum(kernel[i][j] * v[j] for j in range(n)) for i in range(n)]
        v = [1 / n / sum(kernel[i][j] * u[i] for i in range(n)) for j in range(n)]
    return sum(u[i] * kernel[i][j] * v[j] * cost[i][j] for i in range(n) for j in range(n))


@pytest.mark.parametrize(("epsilon", "iterations"), [(0.5, 3), (0.2, 50)])
def test_equals_its_equations(epsilon: float, iterations: int) -> None:
    s, t = torch.randn(5, 4).double(), torch.randn(5, 4).double()
    positive, negative = torch.randn(5).double(), torch.randn(5, 3).double()
    options = {"epsilon": epsilon, "iterations": iterations}
    local = primal(s, t, epsilon, iterations)
    found = wcord_loss(s, t, positive, negative, dual=0.0, primal=1.0, **options)  # type: ignore[arg-type]
    assert found.item() == pytest.approx(local, rel=1e-7)
    both = wcord_loss(s, t, positive, negative, dual=0.7, primal=0.3, **options)  # type: ignore[arg-type]
    wanted = 0.7 * float(negative.mean() - positive.mean()) + 0.3 * local
    assert both.item() == pytest.approx(wanted, rel=1e-7)


def test_equal_embeddings_cost_less_and_less_as_the_entropy_goes() -> None:
    z, nothing = torch.eye(6).double(), torch.zeros(6).double()
    costs = [
        wcord_loss(z, z, nothing, nothing[:, None], primal=1.0, epsilon=e, iterations=100).item()
        for e in (1, 0.2, 0.05)
    ]
    assert costs[0] > costs[1] > costs[2]
    assert costs[2] < 1e-6


def test_another_order_of_the_students_costs_the_same() -> None:
    s, t, nothing = torch.randn(6, 4).double(), torch.randn(6, 4).double(), torch.zeros(6).double()
    order = torch.randperm(6)
    found = [wcord_loss(x, t, nothing, nothing[:, None], primal=1.0, iterations=200) for x in (s, s[order])]
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=0)


def test_marginals_are_uniform() -> None:
    s, t = (torch.nn.functional.normalize(torch.randn(8, 6).double(), dim=1) for _ in range(2))
    plan = sinkhorn(1 - s @ t.T, 0.1, 500)
    for dim in (0, 1):
        torch.testing.assert_close(plan.sum(dim), torch.full((8,), 1 / 8).double(), rtol=0, atol=1e-4)


def test_the_critic_changes_by_no_more_than_its_input() -> None:
    torch.manual_seed(0)
    critic, none = LipschitzCritic(8), torch.empty(0, dtype=torch.long)

    def score(x: Tensor) -> Tensor:
        return critic(x[:, :8], x[:, 8:], x[:1, :8], x[:1, 8:], none.expand(len(x), 0))[:, 0]

    optimizer = torch.optim.Adam(critic.parameters(), lr=0.01)
    for _ in range(50):  # towards a steep function
        x = torch.randn(32, 16)
        loss = (score(x) - 5 * x.sum(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    critic.eval()
    a, b = torch.randn(2, 500, 16)
    change, distance = (score(a) - score(b)).abs(), (a - b).norm(dim=1)
    assert (change <= 1.01 * distance).all()
    assert (change / distance).max() > 0.3  # and it learned


@pytest.mark.parametrize("samples", [5, 50])
def test_the_critic_meets_each_pair_and_others_on_either_side(samples: int) -> None:
    critic = LipschitzCritic(3).eval()
    left, right, left_bank, right_bank = (
        torch.randn(4, 3),
        torch.randn(4, 3),
        torch.randn(samples, 3),
        torch.randn(samples, 3),
    )
    others = torch.randint(0, samples, (4, 2))

    def score(a: Tensor, b: Tensor) -> Tensor:
        return critic.last(critic.first(torch.cat([a, b])).relu())

    wanted = [
        [score(left[i], right[i])]
        + [score(left[i], right_bank[j]) for j in others[i]]
        + [score(left_bank[j], right[i]) for j in others[i]]
        for i in range(4)
    ]
    found = critic(left, right, left_bank, right_bank, others)
    torch.testing.assert_close(found, torch.stack([torch.cat(row) for row in wanted]))


def test_masked_samples_are_left_out() -> None:
    s, t, positive, negative = (torch.randn(5, n).double() for n in (4, 4, 1, 3))
    counts, positive = torch.arange(5) % 2 == 0, positive.squeeze(1)
    wanted = wcord_loss(s[counts], t[counts], positive[counts], negative[counts], primal=1.0)
    torch.testing.assert_close(wcord_loss(s, t, positive, negative, primal=1.0, mask=counts), wanted)


def made(samples: int = 12, **options: float) -> tuple[WCoRD, Trace, Trace, Batch]:
    student, teacher = torch.randn(4, 5, requires_grad=True), torch.randn(4, 7, requires_grad=True)
    traces = Trace(None, {"penultimate": student}), Trace(None, {"penultimate": teacher})
    batch, objective = Batch(torch.zeros(4, 1), index=torch.tensor([3, 1, 7, 5])), WCoRD(negatives=6, dim=16, **options)  # type: ignore[arg-type]
    objective.setup(*traces, batch, DataInfo(samples=samples))
    return objective, *traces, batch


def test_without_weights_it_is_zero() -> None:
    objective, student, teacher, batch = made(dual=0.0, primal=0.0)
    value = objective(student, teacher, batch)
    value.backward()
    assert value == 0
    assert not student["penultimate"].grad.any()


def test_the_memory_moves_on_outside_of_the_graph() -> None:
    objective, student, teacher, batch = made()
    before = objective.banks.student_bank.clone()
    objective(student, teacher, batch).backward()
    moved = (objective.banks.student_bank != before).any(dim=1)
    assert moved.nonzero().flatten().tolist() == [1, 3, 5, 7]
    assert not objective.banks.student_bank.requires_grad
    assert teacher["penultimate"].grad is None
    assert student["penultimate"].grad.any()
    objective.eval()
    kept = objective.banks.student_bank.clone()
    objective(student, teacher, batch)
    assert torch.equal(kept, objective.banks.student_bank)


@pytest.mark.slow
def test_students_come_to_hold_more_of_the_teachers_state() -> None:
    """A linear probe reads the teacher's state out of a student trained so better than out of an untrained one."""
    images = torch.randn(128, 6, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    state = nn.Sequential(nn.Linear(6, 16), nn.Tanh())(images).detach()

    def unexplained(steps: int, **weights: float) -> float:
        torch.manual_seed(2)
        student = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
        objective, index = WCoRD(negatives=32, dim=16, **weights), torch.arange(128)  # type: ignore[arg-type]
        first = Batch(images, index=index)
        traces = Trace(None, {"penultimate": student(images)}), Trace(None, {"penultimate": state})
        objective.setup(*traces, first, DataInfo(samples=128))
        optimizer = torch.optim.Adam([*student.parameters(), *objective.parameters()], lr=1e-2)
        for step in range(steps):
            rows = index.roll(32 * step)[:32]
            taps = Trace(None, {"penultimate": student(images[rows])}), Trace(None, {"penultimate": state[rows]})
            optimizer.zero_grad()
            objective(*taps, Batch(images[rows], index=rows)).backward()
            optimizer.step()
        said = torch.cat([student(images).detach(), torch.ones(128, 1)], dim=1)
        return (state - said @ torch.linalg.lstsq(said, state).solution).square().mean().item()

    both = unexplained(100)
    assert both < 0.9 * unexplained(0)
    assert both < min(unexplained(100, primal=0.0), unexplained(100, dual=0.0))


def test_misuse_is_refused() -> None:
    with pytest.raises(ConfigError, match="epsilon"):
        WCoRD(epsilon=0.0)
    objective, student, teacher, batch = made()
    with pytest.raises(ConfigError, match="how many samples"):
        objective.setup(student, teacher, batch, DataInfo())
    with pytest.raises(TensorError, match="positive"):
        wcord_loss(torch.eye(3), torch.eye(3), torch.zeros(2), torch.zeros(2, 1))

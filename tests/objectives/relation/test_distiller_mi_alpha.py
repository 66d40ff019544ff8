from __future__ import annotations

from math import exp, log

import pytest
import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.pairing import pair_layers
from limbeck.core.trace import Trace
from limbeck.objectives import DistillerMIAlpha
from limbeck.objectives.relation.distiller_mi_alpha import distiller_mi_alpha_loss


def reference(scores: list[list[float]], log_q: list[float], alpha: float) -> float:
    """Poole et al.'s bound with one sample left out of each mean, by loops."""
    n = len(scores)

    def r(i: int, j: int) -> float:
        mean = sum(exp(scores[i][k]) for k in range(n) if k != j) / (n - 1)
        return alpha * mean + (1 - alpha) * exp(log_q[i])

    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    joint = sum(scores[i][i] - log(r(i, j)) for i, j in pairs) / len(pairs)
    return 1 + joint - sum(exp(scores[i][j]) / r(i, i) for i, j in pairs) / len(pairs)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("size", [2, 3, 6])
def test_equals_the_bound(size: int, alpha: float) -> None:
    student, teacher, log_q = torch.randn(size, 4).double(), torch.randn(size, 4).double(), torch.randn(size).double()
    wanted = reference((student @ teacher.T).tolist(), log_q.tolist(), alpha)
    found = distiller_mi_alpha_loss(student, teacher, log_q, alpha=alpha)
    assert found.item() == pytest.approx(-wanted, rel=1e-9, abs=1e-12)


def test_alpha_one_is_infonce() -> None:
    """The marginal term is 1, so what is left is f_ii less the logarithms of the means; never more than log K."""
    for scale in (1.0, 30.0):
        student, teacher = scale * torch.randn(8, 4).double(), torch.randn(8, 4).double()
        scores = student @ teacher.T
        each = [scores[i, i] - (scores[i, [k for k in range(8) if k != j]].logsumexp(0) - log(7))
                for i in range(8) for j in range(8) if i != j]  # fmt: skip
        found = -distiller_mi_alpha_loss(student, teacher, torch.randn(8).double(), alpha=1.0)
        assert found.item() == pytest.approx(float(sum(each)) / len(each), abs=1e-5)
        assert found <= log(8)
    perfect = -distiller_mi_alpha_loss(50 * torch.eye(8), torch.eye(8), torch.zeros(8), alpha=1.0)
    assert log(7) - 1e-5 <= perfect + log(8 / 7) <= log(8) + 1e-5


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_a_constant_critic_with_its_own_baseline_knows_nothing(alpha: float) -> None:
    ones = torch.ones(5, 1).double()
    log_q = torch.full((5,), 1.7).double()
    assert distiller_mi_alpha_loss(1.7 * ones, ones, log_q, alpha=alpha).item() == pytest.approx(0.0, abs=1e-12)


def test_it_bounds_the_information_of_gaussians_from_below() -> None:
    """With the true log-density ratio as scores: the mean stays below the truth, and varies more as alpha falls."""
    generator, rho, size = torch.Generator().manual_seed(0), 0.9, 64
    truth = -0.5 * log(1 - rho**2)
    found: dict[float, list[float]] = {0.0: [], 0.5: [], 1.0: []}
    for _ in range(300):
        x, noise = torch.randn(2, size, generator=generator, dtype=torch.float64)
        y = rho * x + (1 - rho**2) ** 0.5 * noise
        # log p(y | x) / p(y) is quadratic in both, so an inner product of three features each.
        shrink = rho / (1 - rho**2)
        ones = torch.ones(size, dtype=torch.float64)
        student = torch.stack([-0.5 * shrink * rho * y**2 + truth, ones, shrink * y], dim=1)
        teacher = torch.stack([ones, -0.5 * shrink * rho * x**2, x], dim=1)
        for alpha, values in found.items():
            values.append(-distiller_mi_alpha_loss(student, teacher, torch.zeros(size), alpha=alpha).item())
    means = {alpha: sum(v) / len(v) for alpha, v in found.items()}
    spread = {alpha: torch.tensor(v).std().item() for alpha, v in found.items()}
    assert all(mean <= truth + 0.1 for mean in means.values())
    assert all(mean > 0.5 * truth for mean in means.values())
    assert spread[1.0] < spread[0.5] < spread[0.0]


def test_layers_map_as_in_the_paper() -> None:
    assert [j + 1 for _, j in pair_layers(4, 12, "skip")] == [3, 6, 9, 12]
    assert [j + 1 for _, j in pair_layers(4, 12, "last")] == [9, 10, 11, 12]
    student, teacher = [torch.randn(3, 2, 4) for _ in range(2)], [torch.randn(3, 2, 6) for _ in range(4)]
    traces, batch = (Trace(None, {"blocks": student}), Trace(None, {"blocks": teacher})), Batch(torch.zeros(3, 2))
    objective = DistillerMIAlpha("blocks", mapping="last")
    objective.setup(*traces, batch, None)  # type: ignore[arg-type]
    assert len(objective.ready("critics")) == 2
    wanted = torch.zeros(())
    for (g, h, q), s, t in zip(objective.ready("critics"), student, teacher[2:], strict=True):
        s, t = s.mean(1), t.mean(1)
        wanted = wanted + distiller_mi_alpha_loss(g(s), h(t), q(t).squeeze(1))
    torch.testing.assert_close(objective(*traces, batch), wanted)


def test_dominant_scores_lose_no_digits() -> None:
    """Where a pair's own score is far above the others, the mean without it is not a difference of equal numbers."""
    scores = torch.tensor([[40.0, 0.0, 1.0], [0.0, 40.0, 0.0], [0.5, 0.0, 40.0]])
    found = []
    for dtype in (torch.float32, torch.float64):
        student = scores.to(dtype).clone().requires_grad_()
        distiller_mi_alpha_loss(student, torch.eye(3, dtype=dtype), torch.zeros(3, dtype=dtype), alpha=0.5).backward()
        found.append(student.grad.double())
    others = ~torch.eye(3, dtype=torch.bool)
    assert found[1][others].abs().min() > 0.01
    torch.testing.assert_close(found[0][others], found[1][others], rtol=1e-5, atol=0)


def test_masked_samples_are_left_out() -> None:
    student, teacher, log_q = torch.randn(6, 3).double(), torch.randn(6, 3).double(), torch.randn(6).double()
    counts = torch.tensor([True, False, True, True, False, True])
    wanted = distiller_mi_alpha_loss(student[counts], teacher[counts], log_q[counts])
    torch.testing.assert_close(distiller_mi_alpha_loss(student, teacher, log_q, mask=counts), wanted)
    alone = torch.arange(6) == 2
    assert distiller_mi_alpha_loss(student, teacher, log_q, mask=alone).item() == 0.0


def test_a_student_comes_to_hold_more_of_the_teachers_state() -> None:
    """A linear probe reads the teacher's state out of a student trained with MI-alpha better than out of another."""
    torch.manual_seed(0)
    ids = torch.randn(256, 6, generator=torch.Generator().manual_seed(1))
    teacher = nn.Sequential(nn.Linear(6, 16), nn.Tanh())
    state = teacher(ids).detach()

    def unexplained(train: bool) -> float:
        torch.manual_seed(2)
        student = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
        objective = DistillerMIAlpha("out")
        objective.setup(Trace(None, {"out": student(ids)}), Trace(None, {"out": state}), Batch(ids), None)  # type: ignore[arg-type]
        optimizer = torch.optim.Adam([*student.parameters(), *objective.parameters()], lr=1e-2)
        for step in range(40 if train else 0):
            x, t = ids[:128].roll(step * 32, 0)[:32], state[:128].roll(step * 32, 0)[:32]
            loss = objective(Trace(None, {"out": student(x)}), Trace(None, {"out": t}), Batch(x))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        said = torch.cat([student(ids).detach(), torch.ones(256, 1)], dim=1)
        weights = torch.linalg.lstsq(said[:128], state[:128]).solution
        return (state[128:] - said[128:] @ weights).square().mean().item()

    assert unexplained(True) < 0.9 * unexplained(False)


def test_misuse_is_refused() -> None:
    x = torch.randn(3, 2)
    with pytest.raises(ConfigError, match="must lie"):
        distiller_mi_alpha_loss(x, x, torch.zeros(3), alpha=1.5)
    with pytest.raises(TensorError, match="log_baseline"):
        distiller_mi_alpha_loss(x, x, torch.zeros(2))

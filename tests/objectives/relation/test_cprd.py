from __future__ import annotations

from math import exp, log

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.errors import ConfigError, TensorError
from limbeck.objectives.relation.cprd import cprd_loss


def ranking(s: list[list[float]], t: list[list[float]], hard: int, easy: bool, threshold: float = -1e9) -> float:
    """One direction, by the card's four steps."""
    values = []
    for i, row in enumerate(s):
        negatives = sorted((j for j in range(len(row)) if j != i), key=lambda j: -row[j])
        top = sorted(negatives[:hard], key=lambda j: -t[i][j])
        rest = sum(exp(row[e]) for e in negatives[hard:]) if easy else 0.0
        ranked = [k for k, j in enumerate(top) if t[i][j] >= threshold]
        terms = [-log(exp(row[top[k]]) / (sum(exp(row[j]) for j in top[k:]) + rest)) for k in ranked]
        values.append(sum(terms) / max(len(terms), 1))
    return sum(values) / len(values)


def infonce(s: list[list[float]]) -> float:
    return sum(-log(exp(row[i]) / sum(exp(v) for v in row)) for i, row in enumerate(s)) / len(s)


@pytest.mark.parametrize("easy", [True, False])
@pytest.mark.parametrize(("size", "hard"), [(2, 16), (6, 3), (6, 5), (7, 1)])
def test_equals_the_steps_of_the_method(size: int, hard: int, easy: bool) -> None:
    s, t = torch.randn(size, size).double(), torch.randn(size, size).double()
    sides = [(s.tolist(), t.tolist()), (s.T.tolist(), t.T.tolist())]
    wanted = sum(0.7 * infonce(a) + 1.3 * ranking(a, b, hard, easy) for a, b in sides) / 2
    found = cprd_loss(s, t, hard=hard, easy=easy, contrast=0.7, ranking=1.3)
    assert found.item() == pytest.approx(wanted, rel=1e-9)
    ranked = sum(ranking(a, b, hard, easy, threshold=0.2) for a, b in sides) / 2
    found = cprd_loss(s, t, hard=hard, easy=easy, contrast=0.0, threshold=0.2)
    assert found.item() == pytest.approx(ranked, rel=1e-9, abs=1e-12)
    torch.testing.assert_close(cprd_loss(5 * s, t, hard=hard, temperature=5.0), cprd_loss(s, t, hard=hard))


@pytest.mark.parametrize(("teacher", "wanted"), [((5.0, 2.0), 0.1566), ((2.0, 5.0), 0.6566)])
def test_worked_example(teacher: tuple[float, float], wanted: float) -> None:
    """Two negatives scored 1 and 0 by the student, in the teacher's order and against it; the first row alone."""
    s, t = torch.zeros(3, 3), torch.zeros(3, 3)
    s[0, 1:], t[0, 1:] = torch.tensor([1.0, 0.0]), torch.tensor(teacher)
    both = 2 * cprd_loss(s, t, hard=2, contrast=0.0, reduction="none")[0]
    columns = 0.5 * log(2)  # the first column's two negatives are equal for the student
    assert both.item() - columns == pytest.approx(wanted, abs=5e-5)


def test_only_the_teachers_order_matters() -> None:
    s, t = torch.randn(6, 6), torch.randn(6, 6)
    torch.testing.assert_close(cprd_loss(s, t), cprd_loss(s, t.exp() * 3 + t))


def test_one_hard_negative_is_infonce_with_it_as_the_match() -> None:
    s, t = torch.randn(5, 5).double(), torch.randn(5, 5).double()

    def rows(a: Tensor) -> Tensor:
        others = a.masked_fill(torch.eye(5, dtype=torch.bool), float("-inf"))
        return nn.functional.cross_entropy(others, others.argmax(1))

    torch.testing.assert_close(cprd_loss(s, t, hard=1, contrast=0.0), (rows(s) + rows(s.T)) / 2)


def test_gradients_reach_hard_and_easy_negatives_alone() -> None:
    s, t = torch.randn(6, 6, requires_grad=True), torch.randn(6, 6, requires_grad=True)
    cprd_loss(s, t, hard=2, contrast=0.0).backward()
    assert not s.grad.diagonal().any()
    assert t.grad is None
    s.grad = None
    cprd_loss(s, t, hard=2, easy=False, contrast=0.0).backward()
    hard = torch.zeros(6, 6, dtype=torch.bool)
    others = s.detach().masked_fill(torch.eye(6, dtype=torch.bool), float("-inf"))
    hard.scatter_(1, others.topk(2, dim=1).indices, True)
    hard.T.scatter_(1, others.T.topk(2, dim=1).indices, True)
    assert not s.grad[~hard].any()
    assert s.grad[hard].any()


def test_masked_pairs_are_nobodys_negatives() -> None:
    s, t, counts = torch.randn(6, 6).double(), torch.randn(6, 6).double(), torch.arange(6) % 3 > 0
    wanted = cprd_loss(s[counts][:, counts], t[counts][:, counts], hard=2)
    torch.testing.assert_close(cprd_loss(s, t, hard=2, mask=counts), wanted)


def test_students_come_to_order_hard_negatives_as_the_teacher() -> None:
    """Kendall's tau of the ten highest negatives, trained with the contrast alone and with the ranking beside it."""
    size, generator = 32, torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, size, 8, generator=generator)
    teacher = images @ torch.randn(8, 8, generator=generator) @ texts.T + 20 * torch.eye(size)

    def tau(ranking: float) -> float:
        torch.manual_seed(1)
        towers = nn.ModuleList(nn.Linear(8, 16, bias=False) for _ in range(2))
        optimizer = torch.optim.Adam(towers.parameters(), lr=0.02)
        for _ in range(100):
            s = towers[0](images) @ towers[1](texts).T
            loss = cprd_loss(s, teacher, hard=10, ranking=ranking)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        s = s.detach()
        top = s.masked_fill(torch.eye(size, dtype=torch.bool), float("-inf")).topk(10, dim=1).indices
        signs = [(v.gather(1, top).unsqueeze(1) - v.gather(1, top).unsqueeze(2)).sign() for v in (s, teacher)]
        return float((signs[0] * signs[1]).sum() / (size * 90))

    assert tau(1.0) > tau(0.0) + 0.1


def test_misuse_is_refused() -> None:
    with pytest.raises(TensorError, match="no match scores"):
        cprd_loss(torch.randn(3, 4), torch.randn(3, 4))
    with pytest.raises(ConfigError, match="above zero"):
        cprd_loss(torch.eye(3), torch.eye(3), hard=0)

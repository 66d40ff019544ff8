from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from limbeck.core.errors import ConfigError, TensorError
from limbeck.objectives.response.topkd import TopKD, scale_top, topkd_loss
from tests.objectives import reference


def scaled(row: list[float], label: int, k: int, scale: float, delta: float) -> list[float]:
    order = sorted(range(len(row)), key=lambda c: -row[c])
    least, rest = min(row), [row[c] for c in order[k:]]
    shift = delta * (reference.mean([row[c] for c in order[:k]]) - reference.mean(rest))
    out = list(row)
    for rank, c in enumerate(order[:k]):
        out[c] = least + (1 + scale * (1 - rank / k)) * (row[c] - least) + shift
    out[label] = least + (1 + scale) * (row[label] - least) + shift
    return out


def cosine(a: list[float], b: list[float]) -> float:
    size = math.sqrt(reference.dot(a, a) * reference.dot(b, b))
    return reference.dot(a, b) / size if size else 0.0


def plain(student: Tensor, teacher: Tensor, labels: Tensor, k: int, alpha: float, beta: float, tau: float) -> float:
    s_rows, t_rows, values = student.tolist(), teacher.tolist(), []
    for i, (s, t, y) in enumerate(zip(s_rows, t_rows, labels.tolist(), strict=True)):
        goal = scaled(t, y, k, 1.0, 0.1)
        order = sorted(range(len(s)), key=lambda c: -goal[c])
        groups = order[:k], order[len(s) - k :], order[k : len(s) - k]
        top, low, rest = (cosine([s[c] for c in g], [goal[c] for c in g]) for g in groups)
        values.append(1 - alpha * top - beta * low - rest)
        for one, others in ((s, t_rows), (t, s_rows)):
            odds = [math.exp(cosine(one, other) / tau) for other in others]
            values[-1] -= 0.5 * math.log(odds[i] / sum(odds))
    return reference.mean(values)


@pytest.mark.parametrize(("k", "alpha", "beta", "tau"), [(2, 2.0, 1.0, 0.1), (3, 0.5, 3.0, 1.0), (1, 1.0, 0.0, 0.5)])
def test_equals_the_equations(k: int, alpha: float, beta: float, tau: float) -> None:
    student, teacher, labels = *3 * torch.randn(2, 6, 7).double(), torch.randint(0, 7, (6,))
    value = topkd_loss(student, teacher, labels, k=k, alpha=alpha, beta=beta, tau=tau)
    assert value.item() == pytest.approx(plain(student, teacher, labels, k, alpha, beta, tau), rel=1e-9)


def test_scaling_that_changes_nothing() -> None:
    logits, labels = torch.randn(1, 7).double(), torch.tensor([4])
    torch.testing.assert_close(scale_top(logits, labels, 3, scale=0.0, delta=0.0), logits)
    value = topkd_loss(logits, logits, labels, k=3, alpha=2.0, beta=0.5, scale=0.0, delta=0.0)
    assert value.item() == pytest.approx(1 - (2.0 + 0.5 + 1))


def test_scaling_leaves_the_others_alone_and_raises_the_label() -> None:
    logits, labels = torch.randn(20, 9).double(), torch.randint(0, 9, (20,))
    found = scale_top(logits, labels, 3)
    chosen = torch.zeros(20, 9, dtype=torch.bool).scatter(1, logits.topk(3).indices, True)
    chosen[torch.arange(20), labels] = True
    assert torch.equal(found[~chosen], logits[~chosen])
    assert (found[chosen] > logits[chosen]).all()
    raised = (found - logits)[torch.arange(20), labels]
    first = labels == logits.argmax(1)
    assert (raised[first] == (found - logits)[first].amax(1)).all()


def test_only_directions_within_a_group_matter() -> None:
    """The decoupled part does not change when a group of the student's logits is scaled."""
    student, teacher, labels = *torch.randn(2, 1, 8).double(), torch.tensor([0])  # one sample: no contrast
    order = scale_top(teacher, labels, 2).argsort(dim=1, descending=True)
    factors = torch.tensor([2.0, 2.0, 0.3, 0.3, 0.3, 0.3, 5.0, 5.0]).double()
    other = student * torch.empty_like(student).scatter(1, order, factors.unsqueeze(0))
    torch.testing.assert_close(topkd_loss(other, teacher, labels, k=2), topkd_loss(student, teacher, labels, k=2))


def test_places_without_a_label_take_no_part() -> None:
    student, teacher, labels = *torch.randn(2, 2, 3, 6).double(), torch.tensor([[1, -100, 2], [-1, 0, 3]])
    kept = labels >= 0
    torch.testing.assert_close(
        topkd_loss(student, teacher, labels), topkd_loss(student[kept], teacher[kept], labels[kept])
    )


def test_what_it_refuses() -> None:
    logits, labels = torch.randn(2, 6), torch.tensor([0, 1])
    assert topkd_loss(logits, logits, labels, k=3).isfinite()
    for k in (4, 0):
        with pytest.raises(ConfigError, match=f"k: .*found {k}"):
            topkd_loss(logits, logits, labels, k=k)
    with pytest.raises(ConfigError, match="tau"):
        TopKD(tau=0.0)
    with pytest.raises(TensorError, match="integer labels"):
        topkd_loss(logits, logits, logits.softmax(-1))

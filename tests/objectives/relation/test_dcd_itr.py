from __future__ import annotations

from math import exp, log

import pytest
import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError
from limbeck.core.trace import Trace
from limbeck.objectives import DCDITR
from limbeck.objectives.relation.dcd_itr import dcd_itr_loss


def softmax(row: list[float], temperature: float) -> list[float]:
    powers = [exp(v / temperature) for v in row]
    return [p / sum(powers) for p in powers]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * log(a / b) for a, b in zip(p, q, strict=True))


def direction(s: Tensor, t: Tensor, hard: int, difficulty: str, pace: float, a: float, b: float, tau: float) -> float:
    """One direction at T = 2, by loops."""
    matched, gaps, doubts = [], [], []
    for i, (own, other) in enumerate(zip(s.tolist(), t.tolist(), strict=True)):
        chosen = [i, *sorted((j for j in range(len(own)) if j != i), key=lambda j: -other[j])[:hard]]
        p, q = (softmax([row[j] for j in chosen], 2.0) for row in (other, own))
        matched.append(-log(softmax([own[j] for j in chosen], tau)[0]))
        gaps.append(kl(p, q))
        doubts.append(gaps[-1] if difficulty == "gap" else -sum(v * log(v) for v in p))
    easy = [exp(-d / pace) for d in doubts]
    weights = [e / sum(easy) * len(easy) for e in easy]
    return sum(a * m + b * 4 * w * g for m, g, w in zip(matched, gaps, weights, strict=True)) / len(gaps)


@pytest.mark.parametrize("difficulty", ["gap", "entropy"])
@pytest.mark.parametrize(("size", "hard"), [(2, 4), (6, 3), (5, 1)])
def test_equals_the_steps_of_the_method(size: int, hard: int, difficulty: str) -> None:
    s, t = torch.randn(size, size).double(), torch.randn(size, size).double()
    settings = (hard, difficulty, 0.7, 0.6, 1.4, 0.5)
    wanted = (direction(s, t, *settings) + direction(s.T, t.T, *settings)) / 2
    found = dcd_itr_loss(s, t, hard=hard, difficulty=difficulty, pace=0.7, contrast=0.6, distil=1.4, tau=0.5)  # type: ignore[arg-type]
    assert found.item() == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("pace", [0.1, 10.0])
def test_an_equal_student_has_nothing_to_learn_from_the_teacher(pace: float) -> None:
    s = torch.randn(6, 6)
    assert dcd_itr_loss(s, s, contrast=0.0, pace=pace).item() == pytest.approx(0.0, abs=1e-6)


def test_equal_difficulty_is_static_distillation() -> None:
    """A teacher equally sure of every match: all weights are 1, so the pace does not matter."""
    t, s = 3 * torch.eye(5), torch.randn(5, 5)
    found = [dcd_itr_loss(s, t, difficulty="entropy", pace=pace, contrast=0.0) for pace in (0.01, 100.0)]
    torch.testing.assert_close(found[0], found[1])


def test_hard_samples_come_to_count_as_training_goes_on() -> None:
    """The share of the gradient at the sample that the student has most wrong."""
    t = 4 * torch.eye(6)
    s = t + 0.1 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    s[0] = torch.tensor([-4.0, 1, 4, 0, 1, 0])
    shares = []
    for progress in (0.0, 0.5, 1.0):
        leaf = s.clone().requires_grad_()
        DCDITR(contrast=0.0)(
            Trace(None, {"logits": leaf}), Trace(None, {"logits": t}), Batch(s, progress=progress)
        ).backward()
        shares.append(float(leaf.grad[0].norm() / leaf.grad.norm()))
    assert shares[0] < shares[1] < shares[2]


def test_only_pairs_the_teacher_finds_hard_are_needed() -> None:
    """So the student's fusion encoder has to run on these pairs alone: B (1 + K) a direction, not B^2."""
    s, t = torch.randn(8, 8, requires_grad=True), torch.randn(8, 8)
    dcd_itr_loss(s, t, hard=2).backward()
    others = t.masked_fill(torch.eye(8, dtype=torch.bool), float("-inf"))
    needed = torch.eye(8, dtype=torch.bool)
    needed.scatter_(1, others.topk(2, dim=1).indices, True)
    needed.T.scatter_(1, others.T.topk(2, dim=1).indices, True)
    assert not s.grad[~needed].any()
    assert s.grad[needed].all()
    poisoned = torch.where(needed, s.detach(), 1e4)
    torch.testing.assert_close(dcd_itr_loss(poisoned, t, hard=2), dcd_itr_loss(s.detach(), t, hard=2))


def test_masked_pairs_are_nobodys_negatives() -> None:
    s, t, counts = torch.randn(6, 6).double(), torch.randn(6, 6).double(), torch.arange(6) % 3 > 0
    wanted = dcd_itr_loss(s[counts][:, counts], t[counts][:, counts], hard=2)
    torch.testing.assert_close(dcd_itr_loss(s, t, hard=2, mask=counts), wanted)


def test_the_teachers_hard_negatives_teach_more_than_random_ones() -> None:
    """Recall at 1 of a pair scorer, two negatives a match in both cases."""
    size, generator = 96, torch.Generator().manual_seed(3)
    images, mixing = torch.randn(size, 6, generator=generator), torch.randn(6, 6, generator=generator)
    texts = images @ mixing + 0.3 * torch.randn(size, 6, generator=generator)
    truth = -torch.cdist(images @ mixing, texts).square()

    def recall(seed: int, dynamic: bool) -> float:
        torch.manual_seed(seed)
        towers = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(2))
        optimizer = torch.optim.Adam(towers.parameters(), lr=0.02)
        for step in range(60):
            said = towers[0](images) @ towers[1](texts).T
            if dynamic:
                loss = dcd_itr_loss(said, truth, hard=2, pace=0.5 + 4.5 * step / 60)
            else:
                loss = dcd_itr_loss(said, torch.randn(size, size), hard=2, distil=0.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float((said.argmax(1) == torch.arange(size)).float().mean())

    assert sum(recall(seed, True) for seed in range(3)) > sum(recall(seed, False) for seed in range(3))


def test_misuse_is_refused() -> None:
    with pytest.raises(ConfigError, match="no such measure"):
        dcd_itr_loss(torch.eye(3), torch.eye(3), difficulty="age")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="above zero"):
        DCDITR(pace=0.0)

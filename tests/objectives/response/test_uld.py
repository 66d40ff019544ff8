from __future__ import annotations

import pytest
import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.trace import Trace
from limbeck.data.language.vocabulary import coping
from limbeck.objectives.parts.paired_tokens import Pairing
from limbeck.objectives.response.uld import ULD, uld_loss
from tests.objectives.reference import mean, softmax


def distance(student: list[float], teacher: list[float], temperature: float) -> float:
    """Both sorted, zeros beyond the smaller one."""
    q, p = (sorted(softmax(row, temperature), reverse=True) for row in (student, teacher))
    size = max(len(q), len(p))
    q, p = (row + [0.0] * (size - len(row)) for row in (q, p))
    return sum(abs(a - b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize(("own", "other"), [(5, 9), (9, 5), (6, 6)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_equals_the_paper(own: int, other: int, temperature: float) -> None:
    student, teacher = 3 * torch.randn(7, own).double(), 3 * torch.randn(7, other).double()
    wanted = [distance(s, t, temperature) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)]
    found = uld_loss(student, teacher, temperature=temperature, reduction="none")
    torch.testing.assert_close(found, torch.tensor(wanted).double())
    assert uld_loss(student, teacher, temperature=temperature).item() == pytest.approx(mean(wanted))


def test_the_mean_runs_over_a_samples_places_then_over_samples() -> None:
    student, teacher = torch.randn(3, 4, 5).double(), torch.randn(3, 4, 8).double()
    mask = torch.tensor([[True, True, True, True], [True, False, False, False], [False] * 4])
    each = uld_loss(student, teacher, reduction="none")
    found = uld_loss(student, teacher, mask=mask)
    torch.testing.assert_close(found, (each[0].mean() + each[1, 0]) / 2)


def test_only_how_sure_a_prediction_is_counts() -> None:
    teacher = 3 * torch.randn(4, 6).double()
    student = teacher[:, torch.tensor([3, 1, 5, 0, 2, 4])]
    assert uld_loss(student, teacher).item() == pytest.approx(0, abs=1e-12)
    wider = torch.cat([student, torch.full((4, 3), -torch.inf).double()], dim=1)
    assert uld_loss(wider, teacher).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("pairing", ["order", "text"])
def test_places_are_paired_before_they_are_compared(pairing: Pairing) -> None:
    student, teacher = torch.randn(2, 4, 5).double(), torch.randn(2, 6, 7).double()
    mask = torch.tensor([[False, True, True, True], [True, True, False, False]])
    teacher_mask = torch.tensor([[True, True, False, True, False, False], [False] * 5 + [True]])
    ends = torch.tensor([[1, 2, 4, 6], [3, 5, 6, 7]])
    other_ends = torch.tensor([[2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 6, 7]])
    spans = [torch.stack([e - 1, e], dim=2) for e in (ends, other_ends)]
    extras = {"teacher_mask": teacher_mask, "offsets": spans[0], "teacher_offsets": spans[1]}
    found = ULD(pairing)(Trace(student), Trace(teacher), Batch(student, mask=mask, extras=extras))
    pairs = {"order": [[(1, 0), (2, 1), (3, 3)], [(0, 5)]], "text": [[(1, 0)], []]}[pairing]

    def of(row: int) -> Tensor:
        rows = [uld_loss(student[row, i : i + 1], teacher[row, j : j + 1]) for i, j in pairs[row]]
        return torch.stack(rows).mean() if rows else torch.zeros(()).double()

    torch.testing.assert_close(found, (of(0) + of(1)) / 2)


def test_one_tokenizer_compares_each_place_with_itself() -> None:
    student, teacher = torch.randn(2, 2, 4, 5).double()
    mask = torch.rand(2, 4) < 0.7
    found = ULD("text")(Trace(student), Trace(teacher), Batch(student, mask=mask))
    torch.testing.assert_close(found, uld_loss(student, teacher, mask=mask))


def test_data_with_two_tokenizers_may_use_it() -> None:
    assert "uld" in coping()


def test_what_it_refuses() -> None:
    with pytest.raises(TensorError, match="teacher_logits"):
        uld_loss(torch.randn(2, 3, 4), torch.randn(2, 4, 5))
    with pytest.raises(ConfigError, match="temperature"):
        ULD(temperature=0.0)

from __future__ import annotations

from math import exp, log

import pytest
import torch
import torch.nn.functional as F

from limbeck.core.errors import TensorError
from limbeck.core.memory import NegativeSampler, update_bank
from limbeck.objectives.relation.crd import crd_bank_loss, crd_log_z, crd_loss
from tests.objectives import reference


@pytest.mark.parametrize("labels", [None, [0, 1, 0, 2, 1]])
def test_in_batch_equals_its_equation(labels: list[int] | None) -> None:
    student, teacher = torch.randn(2, 5, 4).double()
    classes = None if labels is None else torch.tensor(labels)
    value = crd_loss(student, teacher, classes, temperature=0.3)
    assert value.item() == pytest.approx(reference.crd_in_batch(student, teacher, 0.3, labels), rel=1e-9)


def test_in_batch_floor() -> None:
    """Orthonormal and equal: both directions give log(1 + (B - 1) exp(-1 / tau))."""
    value = crd_loss(torch.eye(6).double(), torch.eye(6).double(), temperature=0.5)
    assert value.item() == pytest.approx(2 * log(1 + 5 * exp(-2)), rel=1e-12)


def test_in_batch_without_negatives() -> None:
    student, teacher = torch.randn(2, 4, 5)
    assert crd_loss(student, teacher, torch.zeros(4, dtype=torch.long)).item() == pytest.approx(0.0, abs=1e-5)
    unlabelled = crd_loss(student, teacher, torch.full((4,), -1))
    torch.testing.assert_close(unlabelled, crd_loss(student, teacher))


def bank_case() -> tuple[torch.Tensor, ...]:
    student, teacher = torch.randn(2, 4, 6).double()
    banks = F.normalize(torch.randn(2, 30, 6).double(), dim=-1)
    return student, teacher, banks[0], banks[1], torch.tensor([3, 7, 0, 29]), torch.randint(0, 30, (4, 9))


def test_bank_loss_equals_the_paper() -> None:
    case = bank_case()
    value = crd_bank_loss(*case, log_z=torch.tensor([40.0, 55.0]).double().log(), temperature=0.2)
    assert value.item() == pytest.approx(reference.crd_bank(*case, (40.0, 55.0), 0.2), rel=1e-9)


def test_log_z_is_the_mean_over_all_rows_looked_at() -> None:
    student, teacher, student_bank, teacher_bank, index, negatives = bank_case()
    looked_at = torch.cat([index.unsqueeze(1), negatives], dim=1)
    scores = (F.normalize(student, dim=-1).unsqueeze(1) * teacher_bank[looked_at]).sum(-1) / 0.2
    log_z = crd_log_z(student, teacher, student_bank, teacher_bank, index, negatives, temperature=0.2)
    assert log_z[0].exp().item() == pytest.approx(30 * scores.exp().mean().item(), rel=1e-9)
    part = crd_log_z(*bank_slice(student, teacher, student_bank, teacher_bank, index, negatives, 3), temperature=0.2)
    masked = crd_log_z(
        student, teacher, student_bank, teacher_bank, index, negatives, temperature=0.2, mask=torch.arange(4) < 3
    )
    torch.testing.assert_close(part, masked)


def bank_slice(student, teacher, student_bank, teacher_bank, index, negatives, size):  # type: ignore[no-untyped-def]
    return student[:size], teacher[:size], student_bank, teacher_bank, index[:size], negatives[:size]


def test_a_very_low_temperature_stays_finite() -> None:
    student, teacher, *rest = (t.float() if t.is_floating_point() else t for t in bank_case())
    student.requires_grad_()
    log_z = crd_log_z(student, teacher, *rest, temperature=1e-3)
    value = crd_bank_loss(student, teacher, *rest, log_z=log_z, temperature=1e-3)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


def test_update_moves_only_the_samples_rows() -> None:
    bank = F.normalize(torch.randn(6, 4), dim=-1)
    before, embedding = bank.clone(), torch.randn(2, 4)
    update_bank(bank, torch.tensor([4, 1]), embedding, momentum=0.3)
    wanted = F.normalize(0.3 * before[[4, 1]] + 0.7 * F.normalize(embedding, dim=-1), dim=-1)
    torch.testing.assert_close(bank[[4, 1]], wanted)
    assert torch.equal(bank[[0, 2, 3, 5]], before[[0, 2, 3, 5]])


def test_update_of_a_padded_batch() -> None:
    """Padding repeats an index; the row of the sample that counts must move all the same."""
    bank, twin = torch.eye(4), torch.eye(4)
    embedding = torch.randn(3, 4)
    update_bank(bank, torch.tensor([2, 0, 0]), embedding, mask=torch.tensor([True, True, False]))
    update_bank(twin, torch.tensor([2, 0]), embedding[:2])
    assert torch.equal(bank, twin)


def test_negatives_are_of_other_classes() -> None:
    labels = torch.tensor([2, 0, 1, 0, 2, -1, -1, 0, 1, 2])
    sampler = NegativeSampler(10, labels)
    drawn = sampler(torch.arange(10), number=4000, step=3)
    assert drawn.shape == (10, 4000)
    for i in range(10):
        others = [j for j in range(10) if j != i and (labels[j] != labels[i] or labels[i] < 0)]
        values, counts = drawn[i].unique(return_counts=True)
        assert values.tolist() == others
        # Uniform: every count within five standard deviations of its expectation.
        share = 1 / len(others)
        assert ((counts - 4000 * share).abs() < 5 * (4000 * share * (1 - share)) ** 0.5).all()


def test_a_draw_depends_on_seed_step_and_sample_only() -> None:
    sampler = NegativeSampler(1000, seed=5)
    first = sampler(torch.tensor([3, 8, 500]), number=64, step=7)
    assert torch.equal(sampler(torch.tensor([500, 3]), number=64, step=7), first[[2, 0]])
    assert torch.equal(NegativeSampler(1000, seed=5)(torch.tensor([3]), number=64, step=torch.tensor(7)), first[:1])
    for other in (
        sampler(torch.tensor([3]), number=64, step=8),
        sampler(torch.tensor([4]), number=64, step=7),
        NegativeSampler(1000, seed=6)(torch.tensor([3]), number=64, step=7),
    ):
        assert (other == first[:1]).float().mean() < 0.1
    assert not sampler.state_dict()


def test_what_the_sampler_refuses() -> None:
    with pytest.raises(TensorError, match="one class"):
        NegativeSampler(3, torch.zeros(3, dtype=torch.long))
    with pytest.raises(TensorError, match=r"labels.*\[3\] integers"):
        NegativeSampler(3, torch.zeros(4, dtype=torch.long))
    with pytest.raises(TensorError, match="samples"):
        NegativeSampler(1)


def test_shapes_that_do_not_belong_together() -> None:
    student, teacher, student_bank, teacher_bank, index, negatives = bank_case()
    log_z = torch.zeros(2)
    with pytest.raises(TensorError, match=r"student_bank.*\[n, 6\]"):
        crd_bank_loss(student, teacher, student_bank[:, :5], teacher_bank[:, :5], index, negatives, log_z=log_z)
    with pytest.raises(TensorError, match=r"negatives.*\[4, K\]"):
        crd_bank_loss(student, teacher, student_bank, teacher_bank, index, negatives[:3], log_z=log_z)
    with pytest.raises(TensorError, match=r"index.*\[4\]"):
        crd_bank_loss(student, teacher, student_bank, teacher_bank, index[:3], negatives, log_z=log_z)
    with pytest.raises(TensorError, match="teacher_embedding"):
        crd_loss(student, teacher[:, :5])
    with pytest.raises(TensorError, match="labels"):
        crd_loss(student, teacher, torch.rand(4))

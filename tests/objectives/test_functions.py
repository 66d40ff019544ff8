"""What holds for every functional loss, whatever its method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from limbeck.core.errors import ConfigError, LimbeckError, TensorError
from limbeck.objectives.feature.at import at_loss
from limbeck.objectives.feature.fitnets import fitnets_loss
from limbeck.objectives.relation.crd import crd_bank_loss, crd_loss
from limbeck.objectives.relation.rkd import rkd_loss
from limbeck.objectives.response.cross_entropy import cross_entropy_loss
from limbeck.objectives.response.dist import dist_loss
from limbeck.objectives.response.dkd import dkd_loss
from limbeck.objectives.response.kd import kd_loss
from limbeck.objectives.response.label_smoothing import label_smoothing_loss

# Without the epsilon of its code DIST can be differentiated numerically where probabilities are small.
exact_dist = {"eps": 0.0}
BANKS = torch.nn.functional.normalize(
    torch.randn(2, 40, 5, generator=torch.Generator().manual_seed(1)).double(), dim=-1
)


def bank_loss(student: Tensor, teacher: Tensor, labels: Tensor | None = None, **options: Any) -> Tensor:
    """CRD with banks; index and negatives are read off the labels, so that they travel with the sample."""
    assert labels is not None
    index = labels % 40
    negatives = (index.unsqueeze(1) + torch.arange(1, 4)) % 40
    banks = BANKS.to(student.dtype if student.dtype == torch.float64 else torch.float32)
    log_z = torch.tensor([3.0, 3.5], dtype=banks.dtype)
    return crd_bank_loss(student, teacher, banks[0], banks[1], index, negatives, log_z=log_z, **options)


@dataclass
class Case:
    """A loss called as ``loss(student, teacher, labels, **options)``."""

    loss: Callable[..., Tensor]
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    teacher: bool = True
    labels: bool = False
    detaches: bool = True
    decomposes: bool = True
    places: int = 0  # how many dimensions after the batch a mask may have

    def call(self, student: Tensor, teacher: Tensor, labels: Tensor, **options: Any) -> Tensor:
        arguments = [student, *([teacher] if self.teacher else []), *([labels] if self.labels else [])]
        return self.loss(*arguments, **{**self.options, **options})

    def inputs(self, size: int = 6, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        student, teacher = torch.randn(2, size, *self.shape, generator=generator, dtype=torch.float64).to(dtype)
        labels = torch.randint(0, self.shape[-1], (size, *self.shape[: self.places]), generator=generator)
        return student, teacher, labels


CASES = {
    "cross_entropy": Case(cross_entropy_loss, (5,), teacher=False, labels=True),
    "cross_entropy_tokens": Case(cross_entropy_loss, (3, 5), teacher=False, labels=True, places=1),
    "label_smoothing": Case(label_smoothing_loss, (5,), teacher=False, labels=True),
    "kd": Case(kd_loss, (5,)),
    "kd_tokens": Case(kd_loss, (3, 5), places=1),
    "kd_two_classes": Case(kd_loss, (2,), {"temperature": 1.5}),
    "dkd": Case(dkd_loss, (5,), labels=True),
    "dkd_tokens": Case(dkd_loss, (3, 5), labels=True, places=1),
    "dkd_two_classes": Case(dkd_loss, (2,), labels=True),
    "dist": Case(dist_loss, (5,), exact_dist, decomposes=False),
    "dist_tokens": Case(dist_loss, (3, 5), exact_dist, decomposes=False, places=1),
    "fitnets_maps": Case(fitnets_loss, (3, 4, 4)),
    "fitnets_tokens": Case(fitnets_loss, (3, 5), places=1),
    "fitnets_vectors": Case(fitnets_loss, (7,)),
    "at_maps": Case(at_loss, (3, 4, 4)),
    "at_tokens": Case(at_loss, (3, 5)),
    "rkd": Case(rkd_loss, (4,), decomposes=False),
    "crd": Case(crd_loss, (5,), detaches=False, decomposes=False),
    "crd_classes": Case(crd_loss, (5,), labels=True, detaches=False, decomposes=False),
    "crd_bank": Case(bank_loss, (5,), labels=True, detaches=False),
}
everyone = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
some = st.sampled_from(list(CASES.values()))


@everyone
def test_gradient_is_the_derivative(case: Case) -> None:
    student, teacher, labels = case.inputs()
    assert torch.autograd.gradcheck(lambda s: case.call(s, teacher, labels), student.requires_grad_())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.teacher and case.detaches])
def test_teacher_gets_no_gradient(name: str) -> None:
    case = CASES[name]
    student, teacher, labels = case.inputs()
    case.call(student.requires_grad_(), teacher.requires_grad_(), labels).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["kd", "dkd", "dist", "fitnets_maps", "at_maps", "at_tokens", "rkd"])
def test_student_like_teacher_costs_nothing(name: str) -> None:
    student, _, labels = CASES[name].inputs()
    value = CASES[name].call(student.requires_grad_(), student.detach().clone(), labels)
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(student.grad, torch.zeros_like(student), atol=1e-7, rtol=0)


@given(
    case=some,
    size=st.integers(2, 7),
    left_out=st.integers(1, 4),
    seed=st.integers(0, 99),
    garbage=st.sampled_from([0.0, 1e6]),
)
def test_samples_left_out_change_nothing(case: Case, size: int, left_out: int, seed: int, garbage: float) -> None:
    student, teacher, labels = case.inputs(size + left_out, seed=seed)
    counts = torch.zeros(size + left_out, dtype=torch.bool)
    counts[torch.randperm(size + left_out, generator=torch.Generator().manual_seed(seed))[:size]] = True
    noisy = student.clone()
    noisy[~counts] = garbage
    noisy.requires_grad_()
    value = case.call(noisy, teacher, labels, mask=counts)
    wanted_from = student[counts].requires_grad_()
    wanted = case.call(wanted_from, teacher[counts], labels[counts])
    torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-12)
    value.backward()
    wanted.backward()
    torch.testing.assert_close(noisy.grad[counts], wanted_from.grad, rtol=1e-7, atol=1e-10)
    assert not noisy.grad[~counts].any()


@given(
    case=st.sampled_from([c for c in CASES.values() if c.places]), padding=st.integers(1, 3), seed=st.integers(0, 99)
)
def test_padding_changes_nothing(case: Case, padding: int, seed: int) -> None:
    student, teacher, labels = case.inputs(4, seed=seed)
    length = torch.tensor([3, 1, 2, 3])
    counts = torch.arange(3) < length.unsqueeze(1)
    value = case.call(student, teacher, labels, mask=counts)
    pad = torch.nn.functional.pad
    longer = [pad(x, (0, 0, 0, padding), value=7.0) for x in (student, teacher)]
    padded = case.call(*longer, pad(labels, (0, padding), value=-100), mask=pad(counts, (0, padding)))
    torch.testing.assert_close(padded, value, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(value, case.call(student, teacher, labels), rtol=1e-6)  # the mask does something


@given(case=some, size=st.integers(2, 7), seed=st.integers(0, 99))
def test_order_of_samples_does_not_matter(case: Case, size: int, seed: int) -> None:
    inputs = case.inputs(size, seed=seed)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    shuffled = case.call(*(x[order] for x in inputs))
    torch.testing.assert_close(shuffled, case.call(*inputs), rtol=1e-9, atol=1e-12)


@given(
    case=st.sampled_from([c for c in CASES.values() if c.decomposes]), cut=st.integers(1, 5), seed=st.integers(0, 99)
)
def test_mean_over_parts(case: Case, cut: int, seed: int) -> None:
    inputs = case.inputs(6, seed=seed)
    parts = cut * case.call(*(x[:cut] for x in inputs)) + (6 - cut) * case.call(*(x[cut:] for x in inputs))
    torch.testing.assert_close(parts / 6, case.call(*inputs), rtol=1e-9, atol=1e-12)


@everyone
def test_reductions_agree(case: Case) -> None:
    inputs = case.inputs()
    mean, total, each = (case.call(*inputs, reduction=r) for r in ("mean", "sum", "none"))
    assert each.shape[0] == 6
    torch.testing.assert_close(each.mean(), mean)
    torch.testing.assert_close(each.sum(), total)
    with pytest.raises(ConfigError, match="reduction"):
        case.call(*inputs, reduction="average")


@everyone
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_finite_at_any_size_and_precision(case: Case, dtype: torch.dtype, scale: float) -> None:
    student, teacher, labels = case.inputs(dtype=dtype)
    student = (student.sign() * scale if scale > 1 else student).requires_grad_()
    teacher = teacher.sign() * scale if scale > 1 else teacher
    value = case.call(student, teacher, labels)
    assert value.dtype == torch.float32
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


@everyone
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_full(case: Case, dtype: torch.dtype) -> None:
    student, teacher, labels = case.inputs(dtype=dtype)
    exact = case.call(student.double(), teacher.double(), labels)
    with torch.autocast("cpu", dtype=dtype):
        value = case.call(student, teacher, labels)
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-5)


@everyone
def test_batch_of_one(case: Case) -> None:
    student, teacher, labels = case.inputs(1)
    value = case.call(student.requires_grad_(), teacher, labels)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", ["rkd", "crd"])
def test_one_sample_has_no_relation(name: str) -> None:
    student, teacher, labels = CASES[name].inputs(1)
    value = CASES[name].call(student.requires_grad_(), teacher, labels)
    value.backward()
    assert value.item() == 0.0
    assert not student.grad.any()


@everyone
def test_nothing_counts(case: Case) -> None:
    student, teacher, labels = case.inputs()
    value = case.call(student.requires_grad_(), teacher, labels, mask=torch.zeros(6, dtype=torch.bool))
    value.backward()
    assert value.item() == 0.0
    assert not student.grad.any()


@everyone
def test_bad_tensors_are_named(case: Case) -> None:
    student, teacher, labels = case.inputs()
    with pytest.raises(TensorError, match="student_"):
        case.call(student.long(), teacher, labels)
    with pytest.raises(TensorError, match="mask"):
        case.call(student, teacher, labels, mask=torch.ones(5, dtype=torch.bool))
    with pytest.raises(TensorError, match=r"mask.*torch\.bool"):
        case.call(student, teacher, labels, mask=torch.ones(6))
    if case.teacher:
        with pytest.raises(TensorError, match="teacher_"):
            case.call(student, teacher[:5], labels)
    if case.labels:
        with pytest.raises(LimbeckError, match=r"labels|index"):
            case.call(student, teacher, labels[:5])


@pytest.mark.parametrize("option", ["temperature", "tau", "p"])
def test_settings_below_zero_are_refused(option: str) -> None:
    loss = {"temperature": "kd", "tau": "dist", "p": "at_maps"}[option]
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match=option):
            CASES[loss].call(*CASES[loss].inputs(), **{option: bad})

"""Reductions over the places that count, and the refusals of tensors that do not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.reduction import check_floating, check_logits, check_positive, check_same_shape, fit_mask, reduce

NAN, INF = float("nan"), float("inf")


def test_without_mask_it_is_torch() -> None:
    values = torch.randn(4, 3)
    assert torch.equal(reduce(values), values.mean())
    assert torch.equal(reduce(values, reduction="sum"), values.sum())
    assert torch.equal(reduce(values, reduction="none"), values)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_masked_places_contribute_nothing_whatever_they_hold(bad: float) -> None:
    values, mask = torch.tensor([1.0, bad, 3.0]), torch.tensor([True, False, True])
    assert reduce(values, mask).item() == 2.0
    assert reduce(values, mask, "sum").item() == 4.0
    assert reduce(values, mask, "none").tolist() == [1.0, 0.0, 3.0]


def test_masked_nan_leaves_the_gradient_finite() -> None:
    values = torch.tensor([1.0, NAN, 3.0], requires_grad=True)
    reduce(values, torch.tensor([True, False, True])).backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0.5, 0.0, 0.5]


def test_counted_nan_is_not_hidden() -> None:
    assert reduce(torch.tensor([1.0, NAN]), torch.tensor([False, True])).isnan()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_counted_gives_zero_with_zero_gradient(reduction: str) -> None:
    values = torch.tensor([[1.0, NAN]], requires_grad=True)
    loss = reduce(values, torch.zeros(1, 2, dtype=torch.bool), reduction)  # type: ignore[arg-type]
    loss.backward()
    assert loss.item() == 0.0
    assert values.grad is not None
    assert values.grad.tolist() == [[0.0, 0.0]]


def test_a_mask_over_samples_spreads_over_positions() -> None:
    values = torch.tensor([[1.0, 2.0], [30.0, 40.0]])
    assert reduce(values, torch.tensor([True, False])).item() == 1.5
    assert fit_mask(torch.tensor([True, False]), values).tolist() == [[True, True], [False, False]]


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=5))
def test_uneven_micro_batches_sum_to_the_whole(cuts: list[list[bool]]) -> None:
    mask = torch.tensor([flag for cut in cuts for flag in cut])
    values = torch.randn(len(mask), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    totals = {"positions": mask.sum()}
    sizes = [len(cut) for cut in cuts]
    parts = [
        reduce(v, m) * Batch(inputs=v, mask=m, totals=totals).share("positions")
        for v, m in zip(values.split(sizes), mask.split(sizes), strict=True)
        if mask.any()
    ]
    assert sum(parts, torch.zeros((), dtype=torch.float64)).item() == pytest.approx(reduce(values, mask).item())


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2), "found torch.float32; wanted torch.bool"),
        (torch.ones(3, dtype=torch.bool), r"found \[3\]; wanted \[2, 3\]"),
        (torch.ones(2, 3, 1, dtype=torch.bool), r"found \[2, 3, 1\]; wanted \[2, 3\]"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask: Tensor, message: str) -> None:
    with pytest.raises(TensorError, match=f"mask: .*{message}"):
        reduce(torch.zeros(2, 3), mask)


def test_unknown_reduction_is_refused() -> None:
    with pytest.raises(ConfigError, match="'average'.*'mean', 'sum' or 'none'"):
        reduce(torch.zeros(2), reduction="average")  # type: ignore[arg-type]


def test_check_logits_accepts_what_belongs_together() -> None:
    logits = torch.zeros(2, 5, 3)
    check_logits(logits, logits.half(), torch.zeros(2, 5, dtype=torch.long))
    check_logits(logits, labels=torch.zeros(2, 5, 3))


@pytest.mark.parametrize(
    ("student", "teacher", "labels", "where"),
    [
        (torch.zeros(3), None, None, "student_logits"),
        (torch.zeros(2, 3, dtype=torch.long), None, None, "student_logits"),
        ("logits", None, None, "student_logits"),
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int32), None, "teacher_logits"),
        (torch.zeros(2, 3), torch.zeros(2, 4), None, "teacher_logits"),
        (torch.zeros(2, 3), None, torch.zeros(3, dtype=torch.long), "labels"),
        (torch.zeros(2, 3), None, torch.zeros(2), "labels"),
        (torch.zeros(2, 3), None, torch.zeros(2, 3, dtype=torch.long), "labels"),
    ],
)
def test_check_logits_names_the_wrong_tensor(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None, where: str
) -> None:
    with pytest.raises(TensorError) as caught:
        check_logits(student, teacher, labels)
    assert caught.value.where == where


def test_other_checks_name_what_they_refuse() -> None:
    with pytest.raises(TensorError, match=r"feature: .*\[4\].*2 or more dimensions"):
        check_floating(torch.zeros(4), "feature", least=2)
    with pytest.raises(TensorError, match=r"b: a and b differ in shape; found \[3\]; wanted \[2\] as a"):
        check_same_shape(torch.zeros(2), torch.zeros(3), "a", "b")


@pytest.mark.parametrize("value", [0.0, -1.0, NAN])
def test_settings_above_zero(value: float) -> None:
    check_positive(0.1, "temperature")
    with pytest.raises(ConfigError, match="temperature: must be above zero"):
        check_positive(value, "temperature")

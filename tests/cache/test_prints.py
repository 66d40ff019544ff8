"""Fingerprints: what they tell apart, and what is nothing to them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from limbeck.cache.prints import describe_teacher, row_prints, weights_print
from limbeck.core.batch import Batch
from limbeck.core.errors import DataError
from limbeck.core.hashing import key


@pytest.mark.parametrize(
    "values",
    [
        torch.randn(6, 3, 4, 4),
        torch.randn(6, 9).double(),
        torch.randn(6, 9).half(),
        torch.randint(0, 255, (6, 3, 4, 4), dtype=torch.uint8),
        torch.randint(0, 9, (6, 12)),
    ],
    ids=["float32", "float64", "float16", "uint8", "int64"],
)
def test_any_changed_value_is_told_and_rows_stand_by_themselves(values):
    prints = row_prints(Batch(values))
    assert prints.dtype == torch.int32
    assert len(set(prints.tolist())) == 6
    assert torch.equal(row_prints(Batch(values[[4, 1]])), prints[[4, 1]])
    for place in range(values[0].numel()):
        other = values.clone().flatten(1)
        other[2, place] += 1
        changed = row_prints(Batch(other.view_as(values))) != prints
        assert changed.tolist() == [False, False, True, False, False, False]


def test_it_is_the_hash_of_its_definition():
    first, second = torch.randn(5, 2, 3), torch.randint(-9, 9, (5, 4))
    words = [first.flatten(1).view(torch.int32).tolist(), second.tolist()]
    factors = [[_mixed(j * 0x9E3779B97F4A7C15 + key(8, n)) | 1 for j in range(len(w[0]))] for n, w in enumerate(words)]
    wanted = [sum(a * w for n in (0, 1) for a, w in zip(factors[n], words[n][row], strict=True)) for row in range(5)]
    found = row_prints(Batch({"a": first, "b": second}))
    assert [value % (1 << 32) for value in found.tolist()] == [(value >> 32) % (1 << 32) for value in wanted]


def _mixed(state: int) -> int:
    """SplitMix64's finaliser, in whole numbers of any length."""
    state %= 1 << 64
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % (1 << 64)
    state = (state ^ state >> 27) * 0x94D049BB133111EB % (1 << 64)
    return state ^ state >> 31


def test_exchanged_values_and_layout():
    values = torch.randn(4, 3, 5, 5)
    other = values.flip(3)
    assert (row_prints(Batch(other)) != row_prints(Batch(values))).all()
    last = values.to(memory_format=torch.channels_last)
    assert torch.equal(row_prints(Batch(last)), row_prints(Batch(values)))
    zero = torch.zeros(2, 3)
    assert torch.equal(row_prints(Batch(-zero)), row_prints(Batch(zero)))


def test_padding_is_nothing_to_it():
    words = torch.randint(1, 50, (3, 5))
    mask = torch.arange(5) < torch.tensor([[5], [2], [4]])
    longer = torch.cat([words.where(mask, 77), torch.full((3, 4), 9)], 1)
    wide = torch.cat([mask, torch.zeros(3, 4, dtype=torch.bool)], 1)
    prints = row_prints(Batch(words, mask=mask))
    assert torch.equal(row_prints(Batch(longer, mask=wide)), prints)
    shorter = mask.clone()
    shorter[0, 4] = False
    assert (row_prints(Batch(words, mask=shorter)) != prints).tolist() == [True, False, False]


def test_several_tensors_and_the_teachers_own():
    first, second = torch.randn(4, 3), torch.randn(4, 2)
    both = row_prints(Batch({"a": first, "b": second}))
    assert (row_prints(Batch({"a": first, "b": second + 1})) != both).all()
    assert (row_prints(Batch((first[:, :2], second))) != row_prints(Batch((second, first[:, :2])))).all()
    assert torch.equal(row_prints(Batch(first, teacher_inputs=second)), row_prints(Batch(second)))
    with pytest.raises(DataError, match="no tensor with a row a sample"):
        row_prints(Batch({"name": "x"}, labels=torch.zeros(2)))


def test_a_teacher_is_told_by_every_value():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    same = copy.deepcopy(model)
    assert weights_print(same) == weights_print(model)
    for name in model.state_dict():
        other = copy.deepcopy(model)
        tensor = other.state_dict()[name]
        tensor.view(-1)[-1] += 1
        assert weights_print(other) != weights_print(model), name
    assert describe_teacher(model.half())["precision"] == "float16"

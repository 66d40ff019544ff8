"""Which student feature answers to which teacher feature."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck.core.errors import TapError
from limbeck.core.pairing import pair_features, pair_shapes


def maps(*sizes: int) -> list[tuple[int, ...]]:
    return [(2, 8, s, s) for s in sizes]


@pytest.mark.parametrize(
    ("student", "teacher", "wanted"),
    [
        (maps(32, 16, 8), maps(32, 16, 8), [(0, 0), (1, 1), (2, 2)]),
        (maps(16, 8), maps(32, 16, 8, 4), [(0, 1), (1, 2)]),
        (maps(32, 16, 8, 4), maps(16, 4), [(1, 0), (3, 1)]),
        (maps(16, 16, 8), maps(16, 8, 8), [(1, 0), (2, 2)]),  # of several at one resolution the deepest
        (maps(30, 15), maps(32, 16, 8, 4), [(0, 1), (1, 3)]),  # none agrees: by depth
        ([(2, 9, 8)] * 3, [(2, 9, 8)] * 12, [(0, 3), (1, 7), (2, 11)]),
        ([(2, 9, 8)] * 12, [(2, 9, 8)] * 3, [(3, 0), (7, 1), (11, 2)]),
        ([(2, 9, 8)] * 2, [(2, 9, 8)] * 3, [(0, 1), (1, 2)]),
        (maps(8), [(2, 65, 64)] * 4, [(0, 3)]),  # a map and token rows
    ],
)
def test_pairs(student: list[tuple[int, ...]], teacher: list[tuple[int, ...]], wanted: list[tuple[int, int]]) -> None:
    assert pair_shapes(student, teacher) == wanted


@given(st.integers(1, 30), st.integers(1, 30))
def test_by_depth_every_one_of_the_fewer_is_paired_in_order_and_the_last_meet(n: int, m: int) -> None:
    pairs = pair_shapes([(2, 5, 4)] * n, [(2, 5, 4)] * m)
    own, other = zip(*pairs, strict=True)
    assert len(pairs) == min(n, m)
    assert sorted(set(own)) == list(own)
    assert sorted(set(other)) == list(other)
    assert pairs[-1] == (n - 1, m - 1)
    assert pair_shapes([(2, 5, 4)] * m, [(2, 5, 4)] * n) == [(j, i) for i, j in pairs]


def test_features_are_paired_by_their_shapes() -> None:
    student, teacher = [torch.zeros(2, 4, 8, 8)], [torch.zeros(2, 9, 16, 16), torch.zeros(2, 9, 8, 8)]
    ((s, t),) = pair_features(student, teacher)
    assert (s is student[0], t is teacher[1]) == (True, True)


def test_nothing_to_pair_is_an_error() -> None:
    with pytest.raises(TapError, match="found 0 student and 2 teacher features"):
        pair_shapes([], maps(8, 4))

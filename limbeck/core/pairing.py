"""Which student feature answers to which teacher feature, told from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from limbeck.core.errors import ConfigError, TapError

Shape = Sequence[int]
Mapping = Literal["skip", "last"]


def pair_shapes(student: Sequence[Shape], teacher: Sequence[Shape]) -> list[tuple[int, int]]:
    """Pair features in order: those of the same resolution, or, where none agree, those of the same relative depth.

    A map ``[B, C, H, W]`` has resolution ``(H, W)``. Of several at one resolution the deepest counts. Anything else
    (token rows, vectors) is paired by depth: the i-th of n students with the teacher at ``ceil((i + 1) m / n)`` of m.

    >>> pair_shapes([(2, 8, 16, 16), (2, 8, 8, 8)], [(2, 64, 32, 32), (2, 64, 16, 16), (2, 64, 8, 8)])
    [(0, 1), (1, 2)]
    >>> pair_shapes([(2, 9, 8)] * 2, [(2, 9, 64)] * 6)
    [(0, 2), (1, 5)]
    """
    if not student or not teacher:
        raise TapError(
            "nothing to pair", where="taps", found=f"{len(student)} student and {len(teacher)} teacher features"
        )
    if all(len(s) == 4 for s in [*student, *teacher]):
        deepest = {tuple(s[2:]): i for i, s in enumerate(teacher)}
        own = {tuple(s[2:]): i for i, s in enumerate(student)}
        pairs = sorted((i, deepest[resolution]) for resolution, i in own.items() if resolution in deepest)
        if pairs:
            return pairs
    return pair_layers(len(student), len(teacher))


def pair_layers(student: int, teacher: int, mapping: Mapping = "skip") -> list[tuple[int, int]]:
    """Which of so many student layers answers to which of so many teacher layers, counted from 0.

    ``"skip"``: those of the same relative depth; ``"last"``: the last layers of the deeper model.

    >>> pair_layers(4, 12)
    [(0, 2), (1, 5), (2, 8), (3, 11)]
    >>> pair_layers(4, 12, "last")
    [(0, 8), (1, 9), (2, 10), (3, 11)]
    """
    if mapping not in ("skip", "last"):
        raise ConfigError("no such mapping", where="mapping", found=repr(mapping), wanted="'skip' or 'last'")
    n, m = min(student, teacher), max(student, teacher)
    deeper = [m - n + i for i in range(n)] if mapping == "last" else [-(-(i + 1) * m // n) - 1 for i in range(n)]
    return [(j, i) if student > teacher else (i, j) for i, j in enumerate(deeper)]


def pair_features(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """``pair_shapes`` on tensors."""
    pairs = pair_shapes([s.shape for s in student], [t.shape for t in teacher])
    return [(student[i], teacher[j]) for i, j in pairs]

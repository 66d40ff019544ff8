"""A student that begins as every second layer of its teacher."""

from __future__ import annotations

import re

import torch
from torch import nn

from limbeck.core.errors import ConfigError, ModelError
from limbeck.core.teacher import FrozenTeacher, Teacher

_NUMBER = re.compile(r"(.*?\.)(\d+)(\..*)")  # the first number in a name is its layer's


@torch.no_grad()
def start_from(student: nn.Module, teacher: Teacher) -> int:
    """Give a student the weights of a teacher built alike: its layer i those of layer i n, all else the same.

    n is how many times fewer layers the student has, 2 for one of half.

    Args:
        student: Its parameters and buffers are overwritten.
        teacher: A model at hand.

    Returns:
        n.

    Raises:
        ConfigError: The teacher is no model.
        ModelError: The two are not built alike.

    >>> layers = [nn.Sequential(*[nn.Sequential(nn.Linear(2, 2)) for _ in range(n)]) for n in (1, 2)]
    >>> start_from(nn.ModuleDict({"layer": layers[0]}), FrozenTeacher(nn.ModuleDict({"layer": layers[1]})))
    2
    """
    if not isinstance(teacher, FrozenTeacher):
        kind = type(teacher).__name__
        raise ConfigError("it begins as layers of a model", where="scheme.start", found=kind, remedy="start: false")
    own, other = student.state_dict(), teacher.model.state_dict()
    depth, theirs = (_depth(state) for state in (own, other))
    if not depth or theirs % depth:
        raise ModelError(
            "a student's layers are every n-th of its teacher's",
            where="scheme.start",
            found=f"{depth} layers of {theirs}",
            wanted="a whole part of them",
            remedy="start: false",
        )
    step = theirs // depth
    for name, value in own.items():
        match = _NUMBER.fullmatch(name)
        source = name if match is None else f"{match[1]}{int(match[2]) * step}{match[3]}"
        if source not in other or other[source].shape != value.shape:
            found = str(list(other[source].shape)) if source in other else "none"
            raise ModelError(
                "student and teacher are not built alike",
                where=name,
                found=f"{source}: {found}",
                wanted=list(value.shape),
                remedy="start: false",
            )
        value.copy_(other[source])
    return step


def _depth(state: dict[str, torch.Tensor]) -> int:
    """How many layers a model has, by the names of its weights."""
    return max((int(m[2]) + 1 for name in state if (m := _NUMBER.fullmatch(name))), default=0)

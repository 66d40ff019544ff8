"""Several teachers at once, each of which answers every batch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError
from limbeck.core.teacher import Teacher, as_teacher
from limbeck.core.trace import Trace


class SeveralTeachers:
    """Asks each of several teachers; ``trace.members`` are their answers, and the first's is the trace's own.

    Args:
        members: Modules (they are frozen) or teachers, in the order in which an objective wants them.
        logits: Where logits stand in the output of those given as modules (see ``logits_of``).

    Raises:
        ConfigError: There are none.

    >>> teacher = SeveralTeachers([nn.Linear(4, 3), nn.Linear(4, 3)])
    >>> batch = Batch(torch.randn(2, 4))
    >>> teacher.attach(("logits",), batch)
    >>> [member.logits.shape[1] for member in teacher(batch).members]
    [3, 3]
    """

    def __init__(self, members: Iterable[nn.Module | Teacher], *, logits: str | None = None) -> None:
        self.members = tuple(as_teacher(member, logits) for member in members)
        if not self.members:
            raise ConfigError("there are no teachers", where="members", found="none", wanted="one or more")

    def attach(self, taps: tuple[str, ...], batch: Batch) -> None:
        for member in self.members:
            member.attach(taps, batch)

    def __call__(self, batch: Batch) -> Trace:
        said = tuple(member(batch) for member in self.members)
        return Trace(None, said[0].taps, members=said)

    def to(self, device: torch.device | str) -> SeveralTeachers:
        for member in self.members:
            member.to(device)
        return self

    def shares_with(self, modules: Iterable[nn.Module]) -> bool:
        """Whether any of these modules is part of a teacher."""
        known = list(modules)
        return any(shares(known) for m in self.members if (shares := getattr(m, "shares_with", None)) is not None)

"""Teachers: whatever answers a batch with a trace. A frozen model is the usual one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import ModelError
from limbeck.core.taps import Listener
from limbeck.core.trace import Trace


@runtime_checkable
class Teacher(Protocol):
    """What a Distiller asks of a teacher. An ensemble, a cache or a server answers the same three calls."""

    def attach(self, taps: tuple[str, ...], batch: Batch) -> None:
        """Make ready to answer with these taps; ``batch`` is an example."""

    def __call__(self, batch: Batch) -> Trace:
        """What the teacher says about a batch."""

    def to(self, device: torch.device | str) -> object:
        """Move to a device."""


class FrozenTeacher:
    """A model that teaches and never learns: evaluation mode, no gradients, in nobody's ``parameters()``.

    Args:
        model: Any module. Its mode is set to evaluation; nothing else about it changes.
        logits: Where logits stand in its output (see ``logits_of``).
    """

    def __init__(self, model: nn.Module, *, logits: str | None = None) -> None:
        self.model, self.where = model, logits
        self.listener: Listener | None = None

    def attach(self, taps: tuple[str, ...], batch: Batch) -> None:
        self.model.eval()  # every part of it, also where the whole says that it is in evaluation mode already
        if self.listener is not None:
            self.listener.close()
        self.listener = Listener(self.model, taps, teacher_inputs(batch), logits=self.where)

    def __call__(self, batch: Batch) -> Trace:
        if self.listener is None:
            raise ModelError("not attached to any taps yet", where="teacher", remedy="call attach(taps, batch) first")
        if self.model.training:
            self.model.eval()
        with torch.no_grad():
            return self.listener(teacher_inputs(batch))

    def to(self, device: torch.device | str) -> FrozenTeacher:
        self.model.to(device)
        return self

    def shares_with(self, modules: Iterable[nn.Module]) -> bool:
        """Whether any of these modules is part of the teacher."""
        own = {id(m) for m in self.model.modules()}
        return any(id(m) in own for m in modules)


def teacher_inputs(batch: Batch) -> object:
    """What the teacher sees of a batch."""
    return batch.inputs if batch.teacher_inputs is None else batch.teacher_inputs


def teacher_mask(batch: Batch) -> Tensor | None:
    """Which positions of what the teacher sees count: its own, where it has inputs of its own that came with a mask."""
    return batch.extras.get("teacher_mask", batch.mask) if batch.teacher_inputs is not None else batch.mask


def as_teacher(teacher: nn.Module | Teacher, logits: str | None = None) -> Teacher:
    """A module as a frozen teacher; anything that already answers like one as it is."""
    if isinstance(teacher, nn.Module):
        return FrozenTeacher(teacher, logits=logits)
    if not isinstance(teacher, Teacher):
        raise ModelError(
            "not a teacher",
            where="teacher",
            found=type(teacher).__name__,
            wanted="a torch module, or an object with attach(taps, batch), __call__(batch) and to(device)",
        )
    return teacher

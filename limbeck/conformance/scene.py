"""What an objective is given, as plain tensors: traces cut off from their models, and the batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch, map_tensors
from limbeck.core.objective import Objective
from limbeck.core.trace import Trace

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Scene:
    """Two traces and a batch. Every change gives a new scene."""

    student: Trace
    teacher: Trace
    batch: Batch

    def change(self, student: Change | None = None, teacher: Change | None = None, **batch: Any) -> Scene:
        """Apply a function to every floating tensor of a side, and replace fields of the batch."""
        return Scene(
            self.student.map(_floating(student)) if student else self.student,
            self.teacher.map(_floating(teacher)) if teacher else self.teacher,
            self.batch.replace(**batch) if batch else self.batch,
        )

    def cast(self, dtype: torch.dtype) -> Scene:
        """The same in another precision; modules among the taps are copied."""
        other = self.change(lambda t: t.to(dtype), lambda t: t.to(dtype), labels=_cast(self.batch.labels, dtype))
        for trace in (other.student, other.teacher):
            held = {k: copy.deepcopy(v).to(dtype) for k, v in trace.taps.items() if isinstance(v, nn.Module)}
            trace.taps.update(held)
        return other

    def leaves(self, teacher: bool = False) -> Scene:
        """Fresh tensors that collect gradients: the student's, and the teacher's where asked."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().clone().requires_grad_()

        return self.change(leaf, leaf if teacher else lambda t: t.detach().clone())

    def take(self, rows: Tensor) -> Scene:
        """Some samples of it. What does not run over samples stays."""
        size = self.batch.size

        def pick(tensor: Tensor) -> Tensor:
            if tuple(tensor.shape) == (size, size):  # scores of each sample beside each other
                return tensor[rows][:, rows]
            return tensor[rows] if tensor.ndim and tensor.shape[0] == size else tensor

        batch = replace(
            self.batch,
            **{
                name: map_tensors(getattr(self.batch, name), pick)
                for name in ("inputs", "labels", "index", "mask", "teacher_inputs", "extras")
            },
        )
        return Scene(self.student.map(pick), self.teacher.map(pick), batch)


def tensors_of(trace: Trace) -> list[Tensor]:
    """Every floating tensor of a trace, each once."""
    found: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            found[id(tensor)] = tensor
        return tensor

    trace.map(note)
    return list(found.values())


@dataclass
class Outcome:
    """What one evaluation came to.

    Args:
        value: The loss, detached.
        student: The gradient at each of the student's tensors; zeros where there is none.
        teacher: The gradient at each of the teacher's tensors, ``None`` where there is none.
        own: The gradient at each of the objective's parameters, ``None`` where there is none.
        state: The objective's state afterwards.
    """

    value: Tensor
    student: list[Tensor]
    teacher: list[Tensor | None]
    own: dict[str, Tensor | None]
    state: dict[str, Tensor]


def evaluate(objective: Objective, scene: Scene, *, on_itself: bool = False, teacher: bool = False) -> Outcome:
    """The loss of a scene times its share of the step, and its gradients.

    Works on a copy of the objective, so that its state stays; ``on_itself`` lets it move on. The same random numbers
    are drawn each time.
    """
    objective = objective if on_itself else copy.deepcopy(objective)
    objective.zero_grad(set_to_none=True)
    scene = scene.leaves(teacher)
    with drawing(), torch.enable_grad():
        value = total(objective(scene.student, scene.teacher, scene.batch))
        value = value * scene.batch.share(objective.contract.normalizer)
        if value.requires_grad:
            value.backward()
    return Outcome(
        value.detach(),
        [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors_of(scene.student)],
        [t.grad for t in tensors_of(scene.teacher)],
        {name: p.grad for name, p in objective.named_parameters()},
        {name: t.detach().clone() for name, t in objective.state_dict().items()},
    )


@contextmanager
def drawing(seed: int = 0) -> Iterator[None]:
    """The same random numbers every time; the random state is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        reseed(seed)
        yield


def reseed(seed: int) -> None:
    """Seed what draws on the CPU; ``torch.manual_seed`` would queue calls for devices that are not in use."""
    torch.default_generator.manual_seed(seed)


def total(value: Tensor | dict[str, Tensor]) -> Tensor:
    """A loss of several parts as one number."""
    return sum(value.values(), torch.zeros(())) if isinstance(value, dict) else value


def _floating(change: Change) -> Change:
    return lambda tensor: change(tensor) if tensor.is_floating_point() else tensor


def _cast(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return value.to(dtype) if value is not None and value.is_floating_point() else value

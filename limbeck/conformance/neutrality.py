"""Checks that an objective makes its helpers in time and leaves the models as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.conformance.case import Case
from limbeck.conformance.check import Failure, check, require
from limbeck.conformance.scene import evaluate
from limbeck.core.errors import LimbeckError
from limbeck.core.teacher import FrozenTeacher


@check(once=True, after=("value", "helpers"))
def models_untouched(case: Case) -> None:
    """The student runs in the mode it was left in, the teacher in evaluation; both keep modes, weights and flags."""
    distiller = case.distiller()
    student = distiller.student
    teacher = distiller.teacher.model if isinstance(distiller.teacher, FrozenTeacher) else None
    student.train()
    kept = next(m for m in student.modules() if not list(m.children()))
    kept.eval()  # a user froze this layer's statistics
    next(iter(student.parameters())).requires_grad_(False)
    if teacher is not None:
        teacher.train()
        before = {k: v.clone() for k, v in teacher.state_dict().items()}
        flags = _flags(teacher)
    modes, own_flags = _modes(student), _flags(student)
    seen: dict[str, list[dict[str, bool]]] = {"student": [], "teacher": []}
    handles = [student.register_forward_pre_hook(lambda m, _: seen["student"].append(_modes(m)))]
    if teacher is not None:
        handles.append(teacher.register_forward_pre_hook(lambda m, _: seen["teacher"].append(_modes(m))))
    for step in range(2):
        distiller(case.batch(step)).total.backward()
    for handle in handles:
        handle.remove()
    require(all(s == modes for s in seen["student"]), "the student did not run in the mode it was left in")
    require(_modes(student) == modes, "the student's mode was changed")
    require(_flags(student) == own_flags, "requires_grad of the student's parameters was changed")
    if teacher is not None:
        require(not any(any(s.values()) for s in seen["teacher"]), "a part of the teacher ran in training mode")
        require(_flags(teacher) == flags, "requires_grad of the teacher's parameters was changed")
        require(all(p.grad is None for p in teacher.parameters()), "a parameter of the teacher got a gradient")
        after = teacher.state_dict()
        require(all(torch.equal(v, after[k]) for k, v in before.items()), "the teacher's weights or statistics moved")


@check(after=("value",))
def helpers(case: Case) -> None:
    """Projectors, heads and banks are made by setup, are all there is, and move with the objective."""
    scene = case.scene()
    objective = case.objective(scene)
    parameters, names = [id(p) for p in objective.parameters()], list(objective.state_dict())
    for _ in range(2):
        evaluate(objective, scene, on_itself=True)
    new = [n for n, p in objective.named_parameters() if id(p) not in parameters]
    require(not new, f"{', '.join(new)} came about in a forward, when the optimizer was already made")
    require(list(objective.state_dict()) == names, "a forward added to its state_dict")
    require(bool(evaluate(objective.float(), scene.cast(torch.float32)).value.isfinite()), "cast to float32 it fails")
    stray = [name for name, tensor in _stray(objective) if tensor.is_floating_point()]
    require(
        not stray, f"{', '.join(stray)} is a plain attribute: it neither moves to a device nor is saved; use a buffer"
    )
    objective.setup(*_float(scene), case.data)
    require(list(objective.state_dict()) == names, "a second setup changed what it holds")


@check(after=("value",))
def not_set_up(case: Case) -> None:
    """Before setup a forward works, or says what to do."""
    scene = case.scene()
    try:
        evaluate(case.subject.make().double(), scene)
    except LimbeckError:
        return
    except Exception as error:
        raise Failure(f"without setup: {type(error).__name__}: {str(error).splitlines()[0]}") from error


def _float(scene: Any) -> tuple[Any, Any, Any]:
    narrow = scene.cast(torch.float32)
    return narrow.student, narrow.teacher, narrow.batch


def _stray(objective: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in objective.named_modules():
        for name, value in vars(module).items():
            if name.startswith("_") and isinstance(value, dict):
                continue  # torch's own registers
            for item in (
                value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else (value,)
            ):
                if isinstance(item, Tensor):
                    yield f"{path}.{name}".lstrip("."), item


def _modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def _flags(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}

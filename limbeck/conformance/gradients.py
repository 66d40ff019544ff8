"""Checks of where gradients go, whether they are right, and that nothing else is touched."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError
from torch.autograd.gradcheck import gradcheck as gradcheck_of_torch

from limbeck.conformance.case import Case
from limbeck.conformance.check import Failure, check, require
from limbeck.conformance.scene import drawing, evaluate, tensors_of, total


@check(after=("value",))
def gradient_flow(case: Case) -> None:
    """Gradients reach the student and every parameter of the objective, and nothing of the teacher."""
    scene = case.scene()
    objective = case.objective(scene)
    outcome = evaluate(objective, scene, teacher=True)
    require(any(bool(g.any()) for g in outcome.student), "no gradient reaches the student")
    leaked = [g for g in outcome.teacher if g is not None and bool(g.any())]
    require(not leaked, f"a gradient reaches the teacher's tensor of shape {[list(g.shape) for g in leaked]}")
    trained = {name for name, p in objective.named_parameters() if p.requires_grad}
    idle = [name for name, grad in outcome.own.items() if grad is None and name in trained]
    require(not idle, f"no gradient reaches the objective's own {', '.join(idle)}: drop it, or freeze it")


@check(
    lambda case: "parts of it are declared constant" if case.contract.stop_gradient else None,
    after=("value", "gradient_flow"),
)
def gradcheck(case: Case) -> None:
    """In float64 the gradient is the derivative of the value."""
    scene = case.scene()
    objective = case.objective(scene)
    leaves = tensors_of(scene.student)

    def loss(*values: Tensor) -> Tensor:
        new = {id(old): value for old, value in zip(leaves, values, strict=True)}
        with drawing():
            student = scene.student.map(lambda t: new.get(id(t), t))
            return total(copy.deepcopy(objective)(student, scene.teacher, scene.batch))

    try:
        gradcheck_of_torch(loss, [_alive(t).requires_grad_() for t in leaves], fast_mode=True)
    except GradcheckError as error:
        raise Failure(" ".join(str(error).split())[:240]) from None


def _alive(tensor: Tensor) -> Tensor:
    """A copy with small numbers in place of zeros: what normalises a dead channel has no derivative there."""
    noise = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(6), dtype=tensor.dtype)
    return torch.where(tensor == 0, 0.01 + 0.1 * noise, tensor)


@check(after=("value",))
def inputs_untouched(case: Case) -> None:
    """Traces and batch are read, never written."""
    scene = case.scene()
    before = copy.deepcopy(scene)
    objective = case.objective(scene)
    with torch.no_grad():
        objective(scene.student, scene.teacher, scene.batch)
    for side in ("student", "teacher"):
        pairs = zip(tensors_of(getattr(before, side)), tensors_of(getattr(scene, side)), strict=True)
        require(all(torch.equal(a, b) for a, b in pairs), f"a tensor of the {side} was changed in place")
    for name in ("labels", "index"):
        old, new = getattr(before.batch, name), getattr(scene.batch, name)
        require(old is None or torch.equal(old, new), f"batch.{name} was changed in place")

"""The check that a compiled objective is the same objective."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from limbeck.conformance.case import Case
from limbeck.conformance.check import Failure, check, require
from limbeck.conformance.scene import Outcome, Scene, drawing, evaluate, tensors_of, total
from limbeck.core.objective import Objective


@check(once=True, after=("value", "helpers"))
def compiled(case: Case) -> None:
    """Compiled as one graph it gives the value and gradient of eager mode."""
    compare(case, "aot_eager")


def compare(case: Case, backend: str, **options: Any) -> None:
    """Two steps eager and compiled, so that what the objective remembers moves on in both.

    A compiler may round as much as eager mode does. How much that is, is told for each gradient by its distance from
    the one in float64, and by how far it moves where all that it is made from moves by its last bit.
    """
    scene = case.scene(dtype=torch.float32)
    if isinstance(scene.batch.progress, float):  # a number would be a new graph at every step
        scene = scene.change(progress=torch.tensor(scene.batch.progress))
    eager = case.objective(scene, dtype=torch.float32)
    other = copy.deepcopy(eager)

    def loss(scene_: Scene) -> Tensor:
        return total(other(scene_.student, scene_.teacher, scene_.batch))

    torch.compiler.reset()
    run = torch.compile(loss, fullgraph=True, backend=backend, **options)
    try:
        for step in range(2):
            before = copy.deepcopy(eager)
            wanted = evaluate(eager, scene, on_itself=True)
            fresh = scene.leaves()
            with drawing():
                found = run(fresh)
            found.backward()
            gap = float((found.detach() - wanted.value).abs())
            require(
                gap <= 1e-5 * max(1.0, float(wanted.value.abs())),
                f"step {step + 1}: compiled the loss is off by {gap:.2g}",
            )
            leaves = [*tensors_of(fresh.student), *other.parameters()]
            for i, (a, leaf) in enumerate(zip(_gradients(wanted), leaves, strict=True)):
                if a is None or not bool(a.any()):
                    continue
                size, off = float(a.abs().max()), float((a - (0 if leaf.grad is None else leaf.grad)).abs().max())
                if off > 3e-4 * size:
                    rounding = _roundings(before, scene)[i]
                    where = f"step {step + 1}: compiled the gradient is {off / size:.2%} off"
                    require(off <= 3 * rounding, f"{where}, eager {rounding / size:.2%}")
            other.zero_grad()
        for name, value in eager.state_dict().items():
            close = torch.allclose(value.double(), other.state_dict()[name].double(), rtol=1e-4, atol=1e-6)
            require(close, f"compiled it remembers another {name}")
    except torch._dynamo.exc.TorchDynamoException as error:
        raise Failure("it does not compile as one graph: " + " ".join(str(error).split())[:300]) from None
    finally:
        torch.compiler.reset()


def _gradients(outcome: Outcome) -> list[Tensor | None]:
    return [*outcome.student, *outcome.own.values()]


def _roundings(eager: Objective, scene: Scene) -> list[float]:
    """The most that each gradient moves; of several trials, since a single one may be near by chance."""
    known = _gradients(evaluate(eager, scene))
    trials = [_gradients(evaluate(copy.deepcopy(eager).double(), scene.cast(torch.float64)))]
    for seed in range(8):
        nudge = _Nudge(seed)
        trials.append(_gradients(evaluate(eager, scene.change(nudge, nudge))))
    return [
        max(0.0 if a is None or b is None else float((a - b).abs().max()) for b in moved)
        for a, *moved in zip(known, *trials, strict=True)
    ]


class _Nudge:
    """Moves every entry by its last bit, up or down."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, tensor: Tensor) -> Tensor:
        sign = torch.randint(0, 2, tensor.shape, generator=self.generator) * 2 - 1
        return tensor * (1 + torch.finfo(tensor.dtype).eps * sign)

"""The check that a compiled objective is the same objective."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from limbeck.conformance.case import Case
from limbeck.conformance.check import Failure, check, require
from limbeck.conformance.scene import Scene, drawing, evaluate, tensors_of, total
from limbeck.core.objective import Objective


@check(once=True, after=("value", "helpers"))
def compiled(case: Case) -> None:
    """Compiled as one graph it gives the value and gradient of eager mode."""
    compare(case, "aot_eager")


def compare(case: Case, backend: str, **options: Any) -> None:
    """Two steps eager and compiled, so that what the objective remembers moves on in both."""
    scene = case.scene(dtype=torch.float32)
    if isinstance(scene.batch.progress, float):  # a number would be a new graph at every step
        scene = scene.change(progress=torch.tensor(scene.batch.progress))
    eager = case.objective(scene, dtype=torch.float32)
    other = copy.deepcopy(eager)
    allowed = max(3e-4, 3 * _rounding(eager, scene))

    def loss(scene_: Scene) -> Tensor:
        return total(other(scene_.student, scene_.teacher, scene_.batch))

    torch.compiler.reset()
    run = torch.compile(loss, fullgraph=True, backend=backend, **options)
    try:
        for step in range(2):
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
            pairs: list[tuple[Tensor | None, Tensor | None]] = [
                (a, leaf.grad) for a, leaf in zip(wanted.student, tensors_of(fresh.student), strict=True)
            ]
            pairs += [(wanted.own[name], p.grad) for name, p in other.named_parameters()]
            for a, b in pairs:
                if a is not None and bool(a.any()):
                    off = float((a - (0 if b is None else b)).abs().max() / a.abs().max())
                    require(off <= allowed, f"step {step + 1}: compiled the gradient is {off:.1%} off")
            other.zero_grad()
        for name, value in eager.state_dict().items():
            close = torch.allclose(value.double(), other.state_dict()[name].double(), rtol=1e-4, atol=1e-6)
            require(close, f"compiled it remembers another {name}")
    except torch._dynamo.exc.TorchDynamoException as error:
        raise Failure("it does not compile as one graph: " + " ".join(str(error).split())[:300]) from None
    finally:
        torch.compiler.reset()


def _rounding(eager: Objective, scene: Scene) -> float:
    """How far the eager gradient in float32 is from that in float64: a compiler may round as much."""
    exact = evaluate(copy.deepcopy(eager).double(), scene.cast(torch.float64)).student
    pairs = zip(evaluate(eager, scene).student, exact, strict=True)
    return max((float((a - b).abs().max() / b.abs().max()) for a, b in pairs if bool(b.any())), default=0.0)

"""Checks in half precision, under autocast, and at values that models do reach."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.conformance.case import Case
from limbeck.conformance.check import check, require
from limbeck.conformance.scene import Outcome, Scene, evaluate

HALVES = (torch.float16, torch.bfloat16)


@check(after=("value",))
def large_values(case: Case) -> None:
    """Logits and features of +-1e4 give a finite loss and gradient."""
    scene = _scaled(case.scene(dtype=torch.float32), 1e4, to_largest=True)
    _finite(evaluate(case.objective(scene, dtype=torch.float32), scene), "values of +-1e4")


@check(after=("value",))
def dead_features(case: Case) -> None:
    """Zeros everywhere, or all the same, give a finite loss and gradient."""
    scene = case.scene(dtype=torch.float32)
    objective = case.objective(scene, dtype=torch.float32)
    for kind, changed in (
        ("zeros in one sample", _zeroed(scene, slice(0, 1))),
        ("zeros everywhere", _zeroed(scene, slice(None))),
        ("the same in student and every sample", _equal(scene)),
    ):
        _finite(evaluate(objective, changed), kind)


@check(after=("value", "large_values", "dead_features"))
def half(case: Case) -> None:
    """float16 and bfloat16 tensors give the value and gradient of the same numbers in float64, also small ones."""
    for dtype in HALVES:
        scene = case.scene(dtype=dtype)
        for kind, changed in (
            ("ordinary", scene),
            ("small", _scaled(scene, 2**-12)),
            ("large", _scaled(scene, 2**13)),
            ("zero in one sample", _zeroed(scene, slice(0, 1))),
        ):
            objective = case.objective(scene, dtype=torch.float32)
            found, where = evaluate(objective, changed), f"{dtype} tensors, {kind}"
            wanted = evaluate(objective.double(), changed.cast(torch.float64))
            require(bool(found.value.isfinite()), f"{where}: the loss is {found.value.item()}")
            largest = max(float(g.abs().max()) for g in wanted.student)
            if (
                largest < torch.finfo(dtype).max / 2
            ):  # else the format cannot hold the gradient, whatever the objective does
                _finite(found, where)
                _near(wanted, found, dtype, where)


@check(once=True, after=("value", "half"))
def autocast(case: Case) -> None:
    """Under autocast a whole step is finite and reaches the student."""
    for dtype in HALVES:
        distiller = case.distiller()
        with torch.autocast("cpu", dtype=dtype):
            losses = distiller(case.batch())
        losses.total.backward()
        grads = [p.grad for p in distiller.student.parameters() if p.grad is not None]
        require(bool(losses.total.isfinite()), f"{dtype}: the loss is {losses.total.item()}")
        require(all(bool(g.isfinite().all()) for g in grads), f"{dtype}: a gradient of the student is not finite")
        require(any(bool(g.any()) for g in grads), f"{dtype}: no gradient reaches the student")


def _finite(outcome: Outcome, where: str) -> None:
    require(bool(outcome.value.isfinite()), f"{where}: the loss is {outcome.value.item()}")
    grads = [*outcome.student, *(g for g in outcome.own.values() if g is not None)]
    require(all(bool(g.isfinite().all()) for g in grads), f"{where}: a gradient is not finite")


def _near(wanted: Outcome, found: Outcome, dtype: torch.dtype, where: str) -> None:
    loose = 0.02 if dtype == torch.float16 else 0.1
    require(
        torch.allclose(found.value.double(), wanted.value, rtol=loose, atol=1e-4),
        f"{where}: the loss is {found.value.item():.4g} instead of {wanted.value.item():.4g}",
    )
    for a, b in zip(wanted.student, found.student, strict=True):
        size = float(a.norm())
        info = torch.finfo(dtype)
        least = max(32 * info.smallest_normal * info.eps, 1e-10)  # below, the format or float32 has no digits left
        if size > least * a.numel() ** 0.5:
            gap = float((a - b.double()).norm()) / size
            require(
                gap < 5 * loose,
                f"{where}: the gradient is {gap:.0%} off (its norm {b.norm().item():.3g}, not {size:.3g})",
            )


def _scaled(scene: Scene, factor: float, to_largest: bool = False) -> Scene:
    """Every tensor scaled by a factor, or so that its largest value is the factor.

    Parameters of a model stay as they are: what goes through a layer may be large or small, its weights are not.
    """
    taps = [*scene.student.taps.items(), *scene.teacher.taps.items()]
    held = {id(value) for name, value in taps if name.partition("@")[2] in ("weight", "bias")}

    def scale(tensor: Tensor) -> Tensor:
        largest = tensor.abs().max()
        if id(tensor) in held or _shares(tensor):
            return tensor
        return tensor * (factor / largest if to_largest else factor / largest.clamp(min=1))

    return scene.change(scale, scale)


def _zeroed(scene: Scene, which: slice) -> Scene:
    size = scene.batch.size

    def zero(tensor: Tensor) -> Tensor:
        if _shares(tensor) or tensor.shape[:1] != (size,):
            return tensor
        tensor = tensor.clone()
        tensor[which] = 0
        return tensor

    return scene.change(zero, zero)


def _equal(scene: Scene) -> Scene:
    def ones(tensor: Tensor) -> Tensor:
        return tensor if _shares(tensor) else torch.ones_like(tensor)

    return scene.change(ones, ones)


def _shares(tensor: Tensor) -> bool:
    """Attention maps, whose rows sum to one whatever a model does."""
    rows = tensor.sum(dim=-1)
    return tensor.ndim == 4 and torch.allclose(rows, torch.ones_like(rows), atol=1e-2)

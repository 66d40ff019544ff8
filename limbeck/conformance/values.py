"""Checks of the loss's value: what it returns, where it is zero, how it scales."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from limbeck.conformance.case import Case
from limbeck.conformance.check import Failure, check, require
from limbeck.conformance.scene import Scene, evaluate
from limbeck.core.errors import LimbeckError, TapError


@check()
def value(case: Case) -> None:
    """The loss is one finite floating number, or several named ones whose sum is the loss."""
    scene = case.scene().leaves()
    result = case.objective()(scene.student, scene.teacher, scene.batch)
    parts = result if isinstance(result, dict) else {"loss": result}
    require(bool(parts), "it returned an empty dict")
    for name, part in parts.items():
        found = f"{list(part.shape)} {part.dtype}" if isinstance(part, Tensor) else type(part).__name__
        require(
            isinstance(part, Tensor) and part.ndim == 0 and part.is_floating_point(),
            f"{name} is {found}, not a 0-d floating tensor",
        )
        require(bool(part.isfinite()), f"{name} is {part.item()} on ordinary inputs")


def _no_number(case: Case) -> str | None:
    if case.teacherless:
        return "it listens to no teacher"
    return "it declares no value at student == teacher" if case.contract.at_equal is None else None


@check(_no_number, after=("value",))
def at_equal(case: Case) -> None:
    """Where student and teacher agree the loss has its declared value."""
    try:
        scene = case.scene(twins=True)
    except TapError:
        return  # given models may not have the teacher's taps in the student
    wanted, found = case.contract.at_equal, evaluate(case.objective(scene), scene).value.item()
    assert wanted is not None
    require(abs(found - wanted) <= 1e-4 * max(1.0, abs(wanted)), f"declared {wanted}, found {found:.6g}")


def _no_temperature(case: Case) -> str | None:
    return "it declares no scaling with temperature" if case.contract.temperature is None else None


@check(_no_temperature, after=("value",))
def temperature(case: Case) -> None:
    """The gradient scales with temperature as declared: kept ("squared"), or falling as 1/T^2 ("none")."""
    scene = _small(case.scene(), 0.1)
    norms = [_norm(evaluate(case.objective(scene, options={"temperature": t}), scene).student) for t in (20.0, 40.0)]
    wanted = {"squared": 1.0, "none": 4.0}[str(case.contract.temperature)]
    require(norms[1] > 0, "no gradient reaches the student at temperature 40")
    ratio = norms[0] / norms[1]
    require(
        abs(ratio / wanted - 1) < 0.1,
        f"declared {case.contract.temperature!r}, so the gradient at T=20 should be {wanted:g} times that at T=40; "
        f"it is {ratio:.3g} times",
    )


def _no_spare_class(case: Case) -> str | None:
    return None if case.contract.spare_class else "it does not declare that a spare class changes nothing"


@check(_no_spare_class, after=("value",))
def spare_class(case: Case) -> None:
    """A class in which neither student nor teacher believes changes neither value nor gradient."""
    scene = case.scene()
    before = evaluate(case.objective(scene), scene)
    for low in (-1e4, -torch.inf):

        def widen(logits: Tensor, low: float = low) -> Tensor:
            return torch.cat([logits, logits.new_full((*logits.shape[:-1], 1), low)], dim=-1)

        wide = scene.change(widen, widen)
        after = evaluate(case.objective(wide), wide)
        require(
            torch.allclose(before.value, after.value, rtol=1e-6, atol=1e-9),
            f"with a class of logit {low} the loss went from {before.value.item():.6g} to {after.value.item():.6g}",
        )
        for a, b in zip(before.student, after.student, strict=True):
            same = torch.allclose(a, b[..., :-1], rtol=1e-5, atol=1e-9)
            require(same, f"with a class of logit {low} the gradient at the other classes changed")


@check(lambda case: None if _bounded(case) else "it has no temperature", once=True)
def bad_temperature(case: Case) -> None:
    """A temperature that is not above zero is refused."""
    for name in _bounded(case):
        for bad in (0.0, -1.0):
            try:
                scene = case.scene()
                evaluate(case.objective(scene, options={name: bad}), scene)
            except LimbeckError:
                continue
            raise Failure(f"{name}={bad} was accepted")


def _bounded(case: Case) -> list[str]:
    made = case.subject.make()
    return [n for n in inspect.signature(type(made)).parameters if n in ("temperature", "tau")]


def _small(scene: Scene, factor: float) -> Scene:
    """Centred and scaled, so that softened predictions are nearly linear in them."""

    def scale(tensor: Tensor) -> Tensor:
        return factor * (tensor - tensor.mean(dim=-1, keepdim=True)) / tensor.std().clamp(min=1e-12)

    return scene.change(scale, scale)


def _norm(gradients: list[Tensor]) -> float:
    return float(torch.cat([g.flatten() for g in gradients]).norm())

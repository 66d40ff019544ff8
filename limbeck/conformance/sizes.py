"""Checks at the smallest sizes: one sample, two classes."""

from __future__ import annotations

import torch

from limbeck.conformance.case import Case
from limbeck.conformance.check import check, require
from limbeck.conformance.scene import evaluate
from limbeck.core.errors import LimbeckError


@check(after=("value",))
def one_sample(case: Case) -> None:
    """The smallest batch it declares works; a smaller one is refused clearly, or works too."""
    scene, least = case.scene(), case.contract.least_samples
    objective = case.objective(scene)
    for size in range(1, least + 1):
        try:
            outcome = evaluate(objective, scene.take(torch.arange(size)))
        except LimbeckError as error:
            require(size < least, f"a batch of {size} is refused: {error}")
            continue
        require(bool(outcome.value.isfinite()), f"with a batch of {size} the loss is {outcome.value.item()}")
        require(
            all(bool(g.isfinite().all()) for g in outcome.student), f"with a batch of {size} a gradient is not finite"
        )


@check(
    lambda case: None if case.setting.with_two_classes else "the given models have the classes they have",
    after=("value", "one_sample"),
)
def two_classes(case: Case) -> None:
    """Two classes work, or are refused clearly."""
    assert case.setting.with_two_classes is not None
    small = Case(case.subject, case.setting.with_two_classes())
    try:
        scene = small.scene()
        outcome = evaluate(small.objective(scene), scene)
    except LimbeckError:
        return
    require(bool(outcome.value.isfinite()), f"with two classes the loss is {outcome.value.item()}")
    require(all(bool(g.isfinite().all()) for g in outcome.student), "with two classes a gradient is not finite")

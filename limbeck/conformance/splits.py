"""The check that a step's gradient does not depend on how its batch was cut."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from limbeck.conformance.case import Case
from limbeck.conformance.check import check, require
from limbeck.conformance.scene import Outcome, Scene, evaluate
from limbeck.core.objective import Objective


def _whole_only(case: Case) -> str | None:
    return None if case.contract.decomposes else "it is declared not to decompose"


@check(_whole_only, after=("value", "mask", "unlabelled"))
def decomposes(case: Case) -> None:
    """Micro-batches and ranks, evenly cut or not, add up to the gradient of the whole batch."""
    for kind, scene in _scenes(case):
        objective = case.objective(scene)
        whole = evaluate(objective, scene)
        for sizes in _cuts(scene.batch.size, case.contract.least_samples):
            unit = case.contract.normalizer
            count = torch.as_tensor(scene.batch.count(unit), dtype=torch.float64)
            parts = [scene.take(rows) for rows in torch.arange(scene.batch.size).split(sizes)]
            _compare(whole, _in_turn(objective, parts, {unit: count}), sizes, f"{kind}, micro-batches of {sizes}")
            world = len(sizes)
            ranks = [evaluate(objective, part.change(totals={unit: count / world})) for part in parts]
            for rank in ranks:  # DDP averages gradients over ranks
                for grad in [rank.value, *rank.student, *(g for g in rank.own.values() if g is not None)]:
                    grad /= world
            _compare(whole, ranks, sizes, f"{kind}, ranks of {sizes}")


def _in_turn(objective: Objective, parts: list[Scene], totals: dict[str, Tensor]) -> list[Outcome]:
    """Micro-batches of one step: what the objective remembers moves on between them."""
    moving = copy.deepcopy(objective)
    return [evaluate(moving, part.change(totals=totals), on_itself=True) for part in parts]


def _compare(whole: Outcome, parts: list[Outcome], sizes: list[int], where: str) -> None:
    value = sum((p.value for p in parts), torch.zeros(()))
    require(
        torch.allclose(value, whole.value, rtol=1e-7, atol=1e-10),
        f"{where}: the loss is {value.item():.8g}, of the whole batch it is {whole.value.item():.8g}",
    )
    for i, wanted in enumerate(whole.student):
        if wanted.shape[:1] == (sum(sizes),):
            found = torch.cat([p.student[i] for p in parts])
            require(torch.allclose(found, wanted, rtol=1e-6, atol=1e-10), f"{where}: the gradient is another")
    for name, grad in whole.own.items():
        own = [p.own[name] for p in parts]
        if grad is not None:
            found = sum((g for g in own if g is not None), torch.zeros(()))
            require(torch.allclose(found, grad, rtol=1e-6, atol=1e-10), f"{where}: the gradient of {name} is another")


def _scenes(case: Case) -> Iterator[tuple[str, Scene]]:
    """The batch as it is, with a mask, and with places that have no label, as far as the objective honours them."""
    scene = case.scene()
    yield "whole batch", scene
    if case.contract.mask:
        yield "with a mask", scene.change(mask=case.mask)
    labels = scene.batch.labels
    if case.contract.normalizer == "labels" and labels is not None and not labels.is_floating_point():
        gone = torch.rand(labels.shape, generator=torch.Generator().manual_seed(5)) < 0.4
        gone[0] = False
        yield "with places that have no label", scene.change(labels=labels.masked_fill(gone, -100))


def _cuts(size: int, least: int) -> Iterator[list[int]]:
    """Uneven cuts of a batch into two and three parts, and the last sample alone (a mask leaves nothing of it)."""
    if size > least == 1:
        yield [size - 1, 1]
    generator = torch.Generator().manual_seed(1)
    for number in (2, 3):
        if size >= number * least:
            spare = torch.rand(number, generator=generator)
            extra = (spare / spare.sum() * (size - number * least)).int().tolist()
            sizes = [least + e for e in extra]
            sizes[-1] += size - sum(sizes)
            yield sizes

"""Checks that nothing is forgotten, and nothing left to chance."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from safetensors import torch as safetensors

from limbeck.conformance.case import Case
from limbeck.conformance.check import check, require
from limbeck.conformance.scene import drawing, reseed
from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller

STEPS = 3


@check(after=("value", "helpers"))
def state(case: Case) -> None:
    """All that moves its loss is in its state_dict: trained, saved, loaded into a fresh one, it goes on alike."""
    distiller = case.distiller()
    _train(distiller, case)
    saved = safetensors.save({k: v.contiguous() for k, v in _objective(distiller).state_dict().items()})
    fresh = case.distiller(seed=1)  # another student and batch than those it was first set up with
    fresh.student.load_state_dict(distiller.student.state_dict())
    _objective(fresh).load_state_dict(safetensors.load(saved))
    wanted, found = (_losses(d, case.batch(2), progress=0.5) for d in (distiller, fresh))
    require(wanted == found, f"the next two losses are {wanted}, after loading {found}")


@check(once=True, after=("value",))
def same_seed(case: Case) -> None:
    """The same seed gives the same numbers; and it leaves the random state to others."""
    runs, drawn = [], []
    for seed in (11, 11, 12):
        for start in (random.seed, np.random.seed, reseed):
            start(seed)
        distiller = case.distiller(seed)
        runs.append(_train(distiller, case))
        drawn.append(float(torch.rand(())))
    require(runs[0] == runs[1], f"losses of two equal runs: {runs[0]} and {runs[1]}")
    require(drawn[0] != drawn[2], "it sets the global random seed, so the rest of the program repeats itself")


def _train(distiller: Distiller, case: Case) -> list[float]:
    optimizer = torch.optim.Adam(distiller.parameters(), lr=1e-3)  # whose steps no loss can blow up
    losses = []
    for step in range(STEPS):
        total = distiller(case.batch(step).replace(progress=step / STEPS)).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    return losses


def _losses(distiller: Distiller, batch: Batch, **changes: Any) -> list[float]:
    distiller.student.eval()  # its dropout and batch norm are not the point here
    with drawing(5):
        return [distiller(batch.replace(**changes)).total.item() for _ in range(2)]


def _objective(distiller: Distiller) -> Any:
    return next(iter(distiller.loss))

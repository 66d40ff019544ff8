"""Any two methods in one recipe: two responses, two features or relations, one of each; and three."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from limbeck.core import catalogue
from limbeck.core.batch import Batch
from limbeck.core.distiller import Losses
from limbeck.core.objective import DataInfo
from limbeck.data.loader import Loader
from limbeck.recipes.build import Sizes, cast_of, fewer, model_of, scheme_of, source_of, train_loader
from limbeck.recipes.schema import Recipe

#: What needs other data than images with one class each, or gives the student another head, meets its like elsewhere.
_OTHER_DATA = {"multilabel", "regression", "retrieval", "aspects"}
_OTHER_TEACHERS = {"several teachers", "privacy"}
_TRANSFORMERS = {"cakd", "dskd", "minilm", "tinybert"}  # they compare what only such have


def _plain(key: str) -> bool:
    card = catalogue.get(key).card
    if key in _TRANSFORMERS or set(card.tasks) & _OTHER_TEACHERS:
        return False
    return bool(set(card.tasks) - _OTHER_DATA) and not getattr(card, "head", None) and "extras" not in card.needs


PLAIN = [key for key in catalogue.methods() if _plain(key)]
RESPONSES = [key for key in PLAIN if catalogue.get(key).card.knowledge == "response"]
FEATURES = [key for key in PLAIN if catalogue.get(key).card.knowledge in ("feature", "relation")]

PAIR = st.one_of(
    st.tuples(st.sampled_from(RESPONSES), st.sampled_from(RESPONSES)),
    st.tuples(st.sampled_from(FEATURES), st.sampled_from(FEATURES)),
    st.tuples(st.sampled_from(RESPONSES), st.sampled_from(FEATURES)),
)


def _meet(methods: Sequence[str]) -> bool:
    """MIX-KD mixes labels too, and says so to methods that want one class a sample."""
    return "mixkd_std" not in methods or not any(
        key != "mixkd_std" and "labels" in catalogue.get(key).card.needs for key in methods
    )


def recipe(methods: tuple[str, ...]) -> Recipe:
    loss: dict[str, Any] = {"cross_entropy": 1.0}
    for number, key in enumerate(methods):
        loss[f"{key}_{number}"] = {"method": key, "weight": 0.1}
    made = {
        "data": {"source": "digits", "samples": 60, "batch_size": 20},
        "student": {"model": "resnet8", "options": {"widths": [4, 4, 8, 16]}},
        "teacher": {"model": "resnet14", "untrained": True, "seed": 1},
        "loss": loss,
        "train": {"steps": 2},
    }
    return Recipe.model_validate(made)


@cache
def digits() -> tuple[Loader, Sizes, list[Batch]]:
    data = recipe(("kd",)).data
    loader = train_loader(data, fewer(source_of(data).train, data.samples), 0)
    return loader, Sizes.of(loader), list(loader.batches())[:2]


def train(methods: tuple[str, ...]) -> tuple[nn.Module, list[Losses]]:
    """Two steps of a recipe's stage, as the engine would take them."""
    made = recipe(methods)
    loader, sizes, batches = digits()
    assert made.teacher is not None
    student, teacher = model_of(made.student, sizes, 0), model_of(made.teacher, sizes, 1)
    (training,) = scheme_of(made.scheme).trainings(cast_of(made, sizes, student, teacher, loader))
    stage = training.stages[-1]
    info = DataInfo(loader.samples, loader.labels, loader.classes, batches=loader.plain)
    torch.manual_seed(0)
    distiller = stage.distiller.setup(loader.example(8), info)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-3)
    said = []
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        losses = distiller(batch.replace(progress=step / 2))
        losses.total.backward()
        optimizer.step()
        said.append(losses)
    distiller.close()
    return student, said


@given(PAIR)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_two_train_together(methods: tuple[str, str]) -> None:
    assume(_meet(methods))
    student, said = train(methods)
    for losses in said:
        assert bool(losses.total.isfinite()), methods
        terms = {name.partition("/")[0] for name in losses.terms}
        assert terms == {"cross_entropy", *(f"{key}_{number}" for number, key in enumerate(methods))}
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in student.parameters())


@given(st.lists(st.sampled_from(PLAIN), min_size=3, max_size=4, unique=True))
@settings(max_examples=10, deadline=None, derandomize=True)
def test_several_train_together(methods: list[str]) -> None:
    assume(_meet(methods))
    _, said = train(tuple(methods))
    assert all(bool(losses.total.isfinite()) for losses in said), methods


def test_the_sum_of_two_is_the_sum_of_each_alone() -> None:
    both = train(("dkd", "at"))[1][0]
    alone = [train((key,))[1][0] for key in ("dkd", "at")]
    found = 0.1 * sum(v for k, v in both.terms.items() if not k.startswith("cross"))
    wanted = sum(float(losses.total.detach() - losses.terms["cross_entropy"]) for losses in alone)
    assert float(found) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("first", PLAIN)
def test_every_method_beside_every_other(first: str) -> None:
    for second in (key for key in PLAIN if _meet((first, key))):
        _, said = train((first, second))
        assert all(bool(losses.total.isfinite()) for losses in said), (first, second)

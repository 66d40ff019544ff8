"""Every method of the catalogue against every check. A new method is covered the moment it is registered."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, get_args, get_origin

import pytest
import torch

import limbeck.objectives  # noqa: F401  registers the methods
from limbeck.conformance.case import Case
from limbeck.conformance.compiling import compare
from limbeck.conformance.scene import evaluate
from limbeck.conformance.suite import Suite
from limbeck.core import catalogue
from limbeck.core.errors import LimbeckError
from limbeck.testing import checks

# What says nothing new of a method's variants, or costs much.
DEFAULT_ONLY = ("card", "documented", "compiled", "autocast", "models_untouched")
# What a variant computes; what else it promises is seen in the slow tests.
OF_VARIANTS = ("value", "gradcheck", "mask", "bad_mask", "at_equal", "gradient_flow", "decomposes", "reductions")


def variants(key: str) -> list[dict[str, Any]]:
    """The other values of a method's switches: its boolean and literal options, one at a time."""
    found: list[dict[str, Any]] = []
    for name, field in catalogue.get(key).options.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        values: list[Any] = [v for k in kinds if get_origin(k) is Literal for v in get_args(k)]
        values += [True, False] if bool in kinds else []
        found += [{name: value} for value in values if value != field.default]
    return found


@cache
def suite(key: str, *options: tuple[str, Any]) -> Suite | None:
    """A method's suite, made once in a process; ``None`` where its constructor refuses these options."""
    try:
        catalogue.get(key).build(**dict(options))
    except LimbeckError:
        return None
    return Suite(key, options=dict(options))


KEYS = list(catalogue.methods())
CASES = [(key, ()) for key in KEYS] + [(key, tuple(o.items())) for key in KEYS for o in variants(key)]


def _id(case: tuple[str, tuple[tuple[str, Any], ...]]) -> str:
    key, options = case
    return "-".join([key, *(f"{n}={v}" for n, v in options)])


@pytest.mark.parametrize("case", CASES, ids=_id)
def test_it_works_somewhere(case: tuple[str, tuple[tuple[str, Any], ...]]) -> None:
    key, options = case
    made = suite(key, *options)
    if made is None:
        assert options, "its defaults are refused"
        pytest.skip(f"{key} refuses {dict(options)}")
    assert [r.status for r in made.report.results if r.check == "runs"] == ["passed"], str(made.report)


def promises() -> Iterator[Any]:
    """Every case with every check that says something of it."""
    for case in CASES:
        for check in checks():
            if case[1] and check.name in DEFAULT_ONLY:
                continue
            # To build backward graphs takes long; that there is one graph, and what it computes, is seen below.
            later = check.name == "compiled" or (case[1] and check.name not in OF_VARIANTS)
            yield pytest.param(case, check, id=f"{_id(case)}-{check.name}", marks=[pytest.mark.slow] * bool(later))


@pytest.mark.parametrize(("case", "check"), list(promises()))
def test_it_keeps_its_promises(case: tuple[str, tuple[tuple[str, Any], ...]], check: Any) -> None:
    key, options = case
    made = suite(key, *options)
    if made is None:
        pytest.skip(f"{key} refuses {dict(options)}")
    results = made.run(check)
    wrong = [r for r in results if r.status == "failed"]
    assert not wrong, "\n".join(map(str, wrong))
    if all(r.status == "skipped" for r in results):
        pytest.skip("; ".join({r.detail for r in results}))


@pytest.mark.parametrize("key", KEYS)
def test_one_graph_computes_the_same(key: str) -> None:
    made = suite(key)
    assert made is not None
    compare(made.cases[0], "eager")


def remembers(case: Case) -> bool:
    """Whether a forward moves the state: only there do later steps hang on how a graph orders its writes."""
    scene = case.scene()
    objective = case.objective(scene)
    before = copy.deepcopy(objective.state_dict())
    return any(not torch.equal(v, before[k]) for k, v in evaluate(objective, scene).state.items())


@pytest.mark.parametrize("key", KEYS)
def test_inductor_computes_the_same_where_a_method_remembers(key: str) -> None:
    made = suite(key)
    assert made is not None
    if not remembers(made.cases[0]):
        pytest.skip("it keeps no moving state")
    compare(made.cases[0], "inductor", options={"fallback_random": True})


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_inductor_computes_the_same(key: str) -> None:
    made = suite(key)
    assert made is not None
    compare(made.cases[0], "inductor", options={"fallback_random": True})

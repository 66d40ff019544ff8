"""How the house is kept: one short file a method, found by the method's name, and costs that are explained."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

import limbeck.functional
from limbeck.core import catalogue

ROOT = Path(__file__).resolve().parents[2]
OWN = {k: m for k, m in catalogue.methods().items() if m.cls.__module__.startswith("limbeck.")}
COSTS = ROOT / "benchmarks" / "results" / "method_cost.json"
#: Settings of another method's class need no file of their own.
FILES = {key: Path(inspect.getfile(method.cls)) for key, method in OWN.items()}


@pytest.mark.parametrize("key", OWN)
def test_a_method_is_found_by_its_name_in_one_short_file(key: str) -> None:
    path = FILES[key]
    assert len(path.read_text().splitlines()) <= 150
    assert path.stem == key or OWN[key].preset, f"{key} stands in {path.name}"
    assert path.parent.name in ("response", "feature", "relation")


@pytest.mark.parametrize("key", OWN)
def test_its_function_is_public(key: str) -> None:
    method = OWN[key]
    if method.function is not None and not method.preset:
        assert getattr(limbeck.functional, f"{key}_loss") is method.function


def test_there_are_many_and_most_have_numbers_of_the_authors() -> None:
    objectives = [m.card for m in OWN.values() if m.card.knowledge != "control"]
    assert len(objectives) >= 75
    assert sum(card.evidence == "parity" for card in objectives) >= 45


@pytest.mark.parametrize("key", OWN)
def test_what_costs_twice_as_much_as_kd_says_why(key: str) -> None:
    measured = json.loads(COSTS.read_text())["methods"]
    assert key in measured, "measure it: python benchmarks/method_cost.py --write --methods " + key
    if max(measured[key]["time"], measured[key]["memory"]) > 2:
        assert OWN[key].card.cost, f"{measured[key]} and the card gives no reason"

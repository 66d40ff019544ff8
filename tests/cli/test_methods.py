"""limbeck methods, show, recipes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from limbeck.core import catalogue
from tests.cli.conftest import Command

PLUGIN = """
from limbeck.core.catalogue import Card, register
from limbeck.core.objective import Objective

@register(Card("cli_plugged", "Mine", "My paper", 2030, "relation", "s - t", "Never.", tasks=("weather",)))
class CliPlugged(Objective):
    def __init__(self, power: float = 2.0) -> None:
        super().__init__()
        self.power = power
"""


def test_methods_lists_every_card(limbeck: Command) -> None:
    answer = limbeck("methods")
    assert answer.code == 0
    for method in catalogue.methods().values():
        if method.cls.__module__.startswith("limbeck."):
            assert re.search(rf"^{method.card.key} .*{method.card.evidence}", answer.out, re.MULTILINE)


def test_methods_by_kind(limbeck: Command) -> None:
    found = limbeck("methods", "--kind", "feature", "--json").json
    assert {m["knowledge"] for m in found} == {"feature"}
    assert {"fitnets", "at"} <= {m["key"] for m in found}


def test_methods_by_a_kind_that_is_none(limbeck: Command) -> None:
    answer = limbeck("methods", "--kind", "featur")
    assert answer.code == 2
    assert answer.out == ""
    assert "did you mean 'feature'?" in answer.err


def test_a_plug_in_is_listed_and_shown_at_once(limbeck: Command, tmp_path: Path) -> None:
    (tmp_path / "cli_plugged_method.py").write_text(PLUGIN)
    found = limbeck("methods", "--plugin", "cli_plugged_method.py", "--task", "weather", "--json").json
    assert [m["key"] for m in found] == ["cli_plugged"]
    answer = limbeck("show", "cli_plugged")
    assert "Never." in answer.out
    assert "from cli_plugged_method import CliPlugged" in answer.out


def test_a_plug_in_that_is_not_there(limbeck: Command) -> None:
    answer = limbeck("methods", "--plugin", "nowhere.py")
    assert answer.code == 2
    assert "no such file" in answer.err


@pytest.mark.parametrize("key", [k for k, m in catalogue.methods().items() if m.cls.__module__.startswith("limbeck.")])
def test_show_tells_all_about_a_method(limbeck: Command, key: str) -> None:
    card = catalogue.get(key).card
    answer = limbeck("show", key)
    assert answer.code == 0
    for text in (card.title, card.equation, card.evidence, card.use[:40], f"{key}:"):
        assert text in answer.out
    facts = limbeck("show", key, "--json").json
    assert facts["key"] == key
    assert set(facts["options"]) == set(catalogue.get(key).options.model_fields)


@pytest.mark.parametrize("key", ["kd", "dkd", "crd"])
def test_the_recipe_and_the_python_that_show_gives_work(limbeck: Command, key: str) -> None:
    from limbeck.core.objective import Terms
    from limbeck.recipes.build import loss_of
    from limbeck.recipes.document import parse
    from limbeck.recipes.load import load

    facts = limbeck("show", key, "--json").json
    loss = parse(facts["recipe"]).data["loss"]
    assert {"cross_entropy", key} == set(loss)
    recipe = load("digits", [f"loss={loss!r}".replace("'", "").replace("None", "null").replace("True", "true")])
    assert loss_of(recipe.loss).names == list(loss)
    *imports, call = [line.strip() for line in facts["python"].strip().splitlines()]
    names: dict[str, object] = {}
    exec("\n".join(imports), names)  # the text is our own
    expression = call.partition("data, ")[2].removesuffix(").student")
    assert isinstance(Terms.of(eval(expression, names)), Terms)


def test_show_an_unknown_method(limbeck: Command) -> None:
    answer = limbeck("show", "fitnet")
    assert (answer.code, answer.out) == (2, "")
    assert "did you mean 'fitnets'" in answer.err


def test_recipes_are_listed(limbeck: Command) -> None:
    from limbeck.recipes.load import shipped

    assert {r["name"] for r in limbeck("recipes", "--json").json} == set(shipped())
    assert "vgg13 teaches mobilenetv2" in limbeck("recipes").out

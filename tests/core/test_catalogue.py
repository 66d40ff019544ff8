"""Cards, the catalogue, plug-ins, and the options a constructor takes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from limbeck.core import catalogue
from limbeck.core.catalogue import Card, check_options, options_of, register
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Objective


@pytest.fixture(autouse=True)
def own_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone afterwards."""
    monkeypatch.setattr(catalogue, "_methods", dict(catalogue._methods))


@pytest.fixture
def own_modules() -> Iterator[None]:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def card(key: str = "mine") -> Card:
    return Card(key=key, name="Mine", title="On Mine", year=2026, knowledge="response", equation="x", use="Never.")


def mine_loss() -> None:
    """A pure function."""


def test_a_registered_class_is_in_the_catalogue_and_carries_its_card() -> None:
    @register(card(), mine_loss)
    class Mine(Objective):
        def __init__(self, temperature: float = 4.0) -> None:
            super().__init__()
            self.temperature = temperature

    method = catalogue.get("mine")
    assert (method.cls, method.function, Mine.card.key) == (Mine, mine_loss, "mine")
    assert "mine" in catalogue.methods()
    built = method.build(temperature=2)
    assert isinstance(built, Mine)
    assert (built.temperature, type(built.temperature)) == (2.0, float)


def test_one_class_may_serve_several_papers() -> None:
    @register(card("second"), mine_loss, temperature=9.0)
    @register(card("first"))
    class Shared(Objective):
        def __init__(self, temperature: float = 4.0) -> None:
            super().__init__()
            self.temperature = temperature

    assert Shared.card.key == "first"
    second = catalogue.get("second").build()
    assert (second.card.key, second.temperature) == ("second", 9.0)
    assert catalogue.get("second").build(temperature=1.0).temperature == 1.0
    assert catalogue.get("first").build().temperature == 4.0


def test_two_classes_cannot_share_a_key_but_one_may_be_loaded_twice() -> None:
    def define() -> type[Objective]:
        @register(card())
        class Again(Objective):
            pass

        return Again

    define()
    latest = define()
    assert catalogue.get("mine").cls is latest
    with pytest.raises(ConfigError, match="mine: two methods have this key"):

        @register(card())
        class Other(Objective):
            pass


def test_a_function_is_named_after_its_method() -> None:
    with pytest.raises(ConfigError, match="mine_loss: a method's function is named after it; wanted other_loss"):
        register(card("other"), mine_loss)(type("Other", (Objective,), {}))


def test_an_unknown_method_is_named_with_near_misses() -> None:
    register(card())(type("Mine", (Objective,), {}))
    with pytest.raises(ConfigError, match="loss: no such method; found 'mien'; did you mean 'mine'"):
        catalogue.get("mien", where="loss")


class Optioned:
    def __init__(
        self,
        tap: str = "layer1",
        weight: float = 1.0,
        memory: Literal["bank", "batch"] = "bank",
        count: int | None = None,
        flags: list[bool] | None = None,
        **_: Any,
    ) -> None:
        pass


def test_options_are_converted_where_that_loses_nothing() -> None:
    model = options_of(Optioned, "optioned")
    options = {"weight": 2, "count": 3.0, "memory": "batch", "flags": [True]}
    assert check_options(model, options, "loss") == {"weight": 2.0, "count": 3, "memory": "batch", "flags": [True]}
    assert check_options(model, {}, "loss") == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wieght": 1}, r"loss\.wieght: no such option; wanted one of tap, weight.*did you mean 'weight'"),
        ({"weight": "much"}, r"loss\.weight: .*number.*found 'much'"),
        ({"memory": "disk"}, r"loss\.memory: .*'bank' or 'batch'; found 'disk'"),
        ({"count": 2.5}, r"loss\.count.*found 2\.5"),
        ({"flags": [True, "perhaps"]}, r"loss\.flags\.1: .*found 'perhaps'"),
        ({"tap": None}, r"loss\.tap"),
        ({"tap": ["layer1"]}, r"loss\.tap: .*string"),
    ],
)
def test_a_wrong_option_is_one_readable_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_options(options_of(Optioned, "optioned"), options, "loss")


PLUGIN = """
from limbeck.core.catalogue import Card, register
from limbeck.core.objective import Objective

@register(Card(key={key!r}, name="P", title="P", year=2026, knowledge="response", equation="x", use="x"))
class P(Objective):
    pass
"""


@pytest.mark.usefixtures("own_modules")
def test_a_file_is_a_plug_in_also_when_it_is_called_like_a_module(tmp_path: Path) -> None:
    for name, key in (("my_method", "first"), ("json", "second"), ("torch", "third")):
        path = tmp_path / f"{name}.py"
        path.write_text(PLUGIN.format(key=key))
        catalogue.load_plugin(str(path))
        catalogue.load_plugin(str(path))
        assert key in catalogue.methods()
    assert sys.modules["json"].__name__ == "json"
    assert hasattr(sys.modules["torch"], "nn")


@pytest.mark.usefixtures("own_modules")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("1 / 0", "ZeroDivisionError"),
        ("def", "SyntaxError"),
    ],
)
def test_a_broken_plug_in_is_one_message_and_can_be_mended(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken_plugin.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"plugins: this plug-in cannot be imported: {message}"):
        catalogue.load_plugin(str(path))
    path.write_text(PLUGIN.format(key="mended"))
    catalogue.load_plugin(str(path))
    assert "mended" in catalogue.methods()


def test_plug_ins_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match=r"recipe\.plugins: no such file; found nowhere\.py"):
        catalogue.load_plugin("nowhere.py", where="recipe.plugins")
    with pytest.raises(ConfigError, match="No module named 'nowhere'"):
        catalogue.load_plugin("nowhere.at.all")

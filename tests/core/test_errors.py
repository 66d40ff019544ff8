"""Messages say what, where, what was found, what was wanted and what to do."""

from __future__ import annotations

import pytest

from limbeck.core.errors import ConfigError, LimbeckError, MissingExtra, did_you_mean


def test_message_holds_every_part_in_order() -> None:
    error = ConfigError("is too small", where="train.epochs", found=0, wanted="1 or more", remedy="train longer")
    assert str(error) == "train.epochs: is too small; found 0; wanted 1 or more; train longer"
    assert (error.message, error.where, error.found, error.wanted) == ("is too small", "train.epochs", 0, "1 or more")
    assert error.remedy == "train longer"


def test_parts_not_given_leave_no_trace() -> None:
    assert str(ConfigError("no recipe")) == "no recipe"
    assert str(ConfigError("no recipe", remedy="give one")) == "no recipe; give one"


def test_empty_finds_are_shown() -> None:
    assert str(ConfigError("is empty", where="methods", found=[])) == "methods: is empty; found []"


def test_missing_extra_tells_the_command() -> None:
    with pytest.raises(LimbeckError, match=r"'onnx'.*pip install 'limbeck\[export\]'"):
        raise MissingExtra("onnx", extra="export")


@pytest.mark.parametrize(
    ("name", "known", "wanted"),
    [
        ("epoch", ["seed", "epochs"], "did you mean 'epochs'?"),
        ("fitnet", ["kd", "fitnets"], "did you mean 'fitnets'?"),
        ("rate", ["learning_rate", "seed"], "did you mean 'learning_rate'?"),  # a part of the name, though not near it
        ("abc", ["abd", "abe"], "did you mean 'abe' or 'abd'?"),
        ("zzz", ["epochs", "seed"], None),
        ("", ["epochs", "seed"], None),
        ("epoch", [], None),
    ],
)
def test_did_you_mean(name: str, known: list[str], wanted: str | None) -> None:
    assert did_you_mean(name, known) == wanted


def test_did_you_mean_keeps_its_limit_and_takes_any_iterable() -> None:
    sentence = did_you_mean("tap", (f"tap{i}" for i in range(9)), limit=2)
    assert sentence is not None
    assert sentence.count("'tap") == 2

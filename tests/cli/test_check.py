"""limbeck check."""

from __future__ import annotations

import json
from pathlib import Path

from limbeck.recipes.json_schema import json_schema
from tests.cli.conftest import Command
from tests.recipes.test_check import EIGHT, GOOD


def test_a_good_recipe(limbeck: Command, tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)
    answer = limbeck("check", "good.yaml")
    assert (answer.code, answer.out) == (0, "")
    assert "nothing wrong" in answer.err
    assert limbeck("check", "good.yaml", "--json").json == {"recipe": "good.yaml", "ok": True, "problems": []}


def test_mistakes_as_json(limbeck: Command, tmp_path: Path) -> None:
    (tmp_path / "eight.yaml").write_text(EIGHT)
    answer = limbeck("check", "eight.yaml", "--json")
    assert answer.code == 2
    assert len(answer.json["problems"]) == 8
    assert {"where": "train.epochs", "line": 9}.items() <= answer.json["problems"][-2].items()


def test_settings_are_checked_too(limbeck: Command) -> None:
    answer = limbeck("check", "digits", "--set", "train.epoch=5")
    assert answer.code == 2
    assert "did you mean 'epochs'" in answer.err
    answer = limbeck("check", "digits", "--set", "loss.kd=1")
    assert answer.code == 2
    assert "set loss as a whole" in answer.err


def test_broken_yaml_has_line_and_column(limbeck: Command, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("data: {source: digits\nstudent: 1\n")
    answer = limbeck("check", "broken.yaml")
    assert answer.code == 2
    assert "broken.yaml: line 2, column 8: this is no YAML" in answer.err


def test_no_recipe(limbeck: Command) -> None:
    assert limbeck("check").code == 2
    assert "no such recipe" in limbeck("check", "nowhere.yaml").err


def test_the_published_schema_is_current(limbeck: Command) -> None:
    printed = limbeck("check", "--schema").json
    assert printed == json.loads(json.dumps(json_schema()))
    published = Path(__file__).resolve().parents[2] / "docs" / "recipe.schema.json"
    assert json.loads(published.read_text()) == printed, (
        "write it anew: limbeck check --schema > docs/recipe.schema.json"
    )

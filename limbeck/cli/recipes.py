"""``limbeck recipes`` and ``limbeck check``."""

from __future__ import annotations

from typing import Annotated

import typer

from limbeck.cli.methods import Json
from limbeck.cli.screen import print_json, print_table, say
from limbeck.core.errors import ConfigError

RecipeName = Annotated[
    str, typer.Argument(help="A YAML file, a shipped recipe's name, or a run's folder.", metavar="RECIPE")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Change a setting: train.epochs=5. May come several times; the value is YAML.",
        metavar="PLACE=VALUE",
    ),
]


def recipes(as_json: Json = False) -> None:
    """List the recipes that come with limbeck."""
    from limbeck.recipes.load import shipped

    if as_json:
        print_json([{"name": name, "about": about} for name, about in shipped().items()])
        return
    print_table(("name", "about"), shipped().items())
    say("\nlimbeck run NAME runs one; --set data.source=... gives it other data.")


def check(
    recipe: Annotated[
        str | None, typer.Argument(help="A YAML file, a shipped name, or a run's folder.", metavar="RECIPE")
    ] = None,
    settings: Set = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the recipe's JSON schema for editors instead.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Find every mistake in a recipe before anything is trained."""
    if schema:
        from limbeck.recipes.json_schema import json_schema

        print_json(json_schema())
        return
    if recipe is None:
        raise ConfigError("there is no recipe to check", where="RECIPE", remedy="limbeck check my_recipe.yaml")
    from limbeck.recipes.check import check as find

    problems = find(recipe, settings or ())
    if as_json:
        print_json({"recipe": recipe, "ok": not problems, "problems": [p.as_dict() for p in problems]})
    else:
        for problem in problems:
            say(f"{recipe}: {problem}")
        mistakes = "one mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        say(f"{recipe}: {mistakes}; nothing was trained" if problems else f"{recipe}: nothing wrong with it")
    if problems:
        raise typer.Exit(2)

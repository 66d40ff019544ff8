"""Recipes by file, by shipped name or by run folder, with settings changed on the way."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from limbeck.core.errors import ConfigError, did_you_mean
from limbeck.recipes.document import Document, parse, parse_value
from limbeck.recipes.problem import Key, Problem, RecipeError, dotted
from limbeck.recipes.schema import Recipe
from limbeck.recipes.validate import problems_of, sections

_SHIPPED = resources.files("limbeck.recipes") / "shipped"
_PAIRS = "cifar10_pairs"


def load(recipe: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """A typed recipe.

    Args:
        recipe: A YAML file, a shipped recipe's name, or the folder of a run.
        overrides: Settings to change, such as ``"train.epochs=5"``.

    Raises:
        RecipeError: With everything that is wrong with its form. What only its models and data can tell, and its
            methods' options, :func:`limbeck.recipes.check` finds.

    >>> load("digits", ["train.epochs=3"]).train.epochs
    3
    """
    return typed(read(recipe, overrides))


def typed(document: Document) -> Recipe:
    """The recipe in a document, or an error with everything that is wrong with its form."""
    usable, problems = sections(document)
    if problems:
        raise RecipeError(problems, document.name)
    try:
        return Recipe(**usable)
    except ValidationError as error:  # the teacher's training with what it takes over from the student's
        raise RecipeError(problems_of(error, (), Recipe, document), document.name) from None


def read(recipe: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Document:
    """A recipe as it was written, with settings changed.

    Raises:
        RecipeError: It is no YAML, or no recipe can be written so.
        ConfigError: There is no such recipe, or a setting cannot be made.
    """
    name = os.fspath(recipe)
    path = Path(name)
    if path.is_dir() and (path / "recipe.yaml").is_file():
        path /= "recipe.yaml"
    if path.is_file():
        document = _file(path)
    elif name in shipped():
        document = _shipped(name)
    else:
        remedy = did_you_mean(name, shipped()) or "limbeck recipes lists the shipped ones"
        raise ConfigError(
            "there is no such recipe", where=name, wanted="a file, a shipped name or a run's folder", remedy=remedy
        )
    for setting in overrides:
        change(document, setting)
    return document


def change(document: Document, setting: str) -> None:
    """Make one setting, ``"train.epochs=5"``; the value is read as YAML.

    Raises:
        ConfigError: It has no ``=``, or its place cannot be.
    """
    place, equals, text = setting.partition("=")
    steps: list[str | int] = [int(s) if s.isdigit() else s for s in place.strip().split(".")]
    if not equals or "" in steps:
        raise ConfigError(
            "a setting has the form place=value", where=f"--set {setting}", wanted="such as train.epochs=5"
        )
    value = parse_value(text, f"--set {setting}")
    target: Any = document.data
    for depth, step in enumerate(steps):
        last = depth == len(steps) - 1
        if isinstance(target, dict) and isinstance(step, str):
            if not last and target.get(step) is None:
                target[step] = {}
        elif not (isinstance(target, list) and isinstance(step, int) and step < len(target)):
            raise ConfigError(
                f"{dotted(tuple(steps[:depth])) or 'the recipe'} has no {step!r} to be set",
                where=f"--set {setting}",
                found=repr(target),
                remedy=f"set {'.'.join(map(str, steps[:depth]))} as a whole",
            )
        if not last:
            target = target[step]
    target[steps[-1]] = value
    made = tuple(steps)
    document.lines = {key: line for key, line in document.lines.items() if key[: len(made)] != made}
    document.lines[made] = None


def shipped() -> dict[str, str]:
    """Shipped recipes: name and what it is, in a line.

    >>> shipped()["digits"]
    'A teacher and a tiny student on scikit-learn digits: the demo'
    """
    names = {"digits": _title(_text("digits"))}
    for name, settings in _pairs().items():
        teacher, student = (s.partition("=")[2] for s in settings[:2])
        names[name] = f"{teacher} teaches {student} on CIFAR-10, as in the CRD benchmark"
    return names


def _shipped(name: str) -> Document:
    pairs = _pairs()
    document = parse(_text("cifar10" if name in pairs else name), name)
    for setting in [f"name={name}", *pairs.get(name, ())]:
        change(document, setting)
    return document


@cache
def _pairs() -> dict[str, list[str]]:
    return parse(_text(_PAIRS), _PAIRS).data


def _text(name: str) -> str:
    return (_SHIPPED / f"{name}.yaml").read_text(encoding="utf-8")


def _title(text: str) -> str:
    return text.partition("\n")[0].removeprefix("# ").rstrip(".")


def _file(path: Path) -> Document:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes().count(b"\n", 0, error.start) + 1
        problem = Problem("this is no text in UTF-8", line=line, remedy="save the recipe as UTF-8")
        raise RecipeError([problem], str(path)) from None
    except OSError as error:
        raise ConfigError("this recipe cannot be read", where=str(path), found=error.strerror) from error
    document = parse(text, str(path))
    stem = path.parent.name if path.name == "recipe.yaml" else path.stem
    key: Key = ("name",)
    if "name" not in document.data and stem.replace("-", "a").replace("_", "a").replace(".", "a").isalnum():
        document.data["name"] = stem
        document.lines[key] = None
    return document

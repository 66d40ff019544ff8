"""From plain values to a typed recipe, section by section: a mistake in one does not hide those in the others."""

from __future__ import annotations

import copy
import types
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from limbeck.core import catalogue
from limbeck.core.errors import LimbeckError, did_you_mean
from limbeck.recipes.document import Document, steps_within
from limbeck.recipes.problem import Key, Problem, dotted
from limbeck.recipes.schema import Recipe, usual_scheme

_LONGEST = 60


def sections(document: Document) -> tuple[dict[str, Any], list[Problem]]:
    """The sections of a recipe that can be used, and every problem of form.

    A section with mistakes is read again without the keys at fault, so that what is left of it can be looked into.
    """
    problems = _plugins(document)
    for name in document.data:
        if name not in Recipe.model_fields:
            problems.append(_unknown((name,), Recipe, document))
    usable: dict[str, Any] = {}
    for name, info in Recipe.model_fields.items():
        if name not in document.data:
            if info.is_required():
                problems.append(Problem("this is missing", name, remedy=info.description or f"say what {name} is"))
            else:
                scheme = name == "scheme"
                usable[name] = (
                    usual_scheme(document.data.get("loss")) if scheme else info.get_default(call_default_factory=True)
                )
            continue
        kind: Any = Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation
        adapter: TypeAdapter[Any] = TypeAdapter(kind)
        raw = copy.deepcopy(document.data[name])
        for _ in range(3):  # what is found behind the first mistakes may be wrong too
            try:
                usable[name] = adapter.validate_python(raw, strict=True)
                break
            except ValidationError as error:
                details = error.errors(include_url=False)
                problems += _collect(details, (name,), info.annotation, document)
                pruned = [_prune(raw, detail["loc"]) for detail in details]
                if not all(pruned):
                    break
    return usable, problems


def _plugins(document: Document) -> list[Problem]:
    """Import the recipe's plug-ins: what follows may name their methods."""
    problems = []
    names = document.data.get("plugins")
    for i, name in enumerate(names if isinstance(names, list) else ()):
        if isinstance(name, str):
            try:
                catalogue.load_plugin(name, dotted(("plugins", i)))
            except LimbeckError as error:
                problems.append(Problem.of(error, dotted(("plugins", i)), document.line(("plugins", i))))
    return problems


def problems_of(error: ValidationError, key: Key, model: Any, document: Document) -> list[Problem]:
    """What pydantic found, as problems of the place ``key``."""
    return _collect(error.errors(include_url=False), key, model, document)


def _collect(details: list[ErrorDetails], key: Key, model: Any, document: Document) -> list[Problem]:
    """One problem a place: the branches of a union are alternatives of what was wanted."""
    by_place: dict[Key, list[ErrorDetails]] = {}
    for detail in details:
        *outer, last = detail["loc"] or ("",)
        missing = detail["type"] == "missing"
        data = _at(document.data, key)
        # pydantic puts the names of a union's branches among the steps
        inside = (*steps_within(data, tuple(outer)), last) if missing else steps_within(data, detail["loc"])
        place = (*key, *inside)
        if missing and place in document:
            continue  # it was there, and was taken out for another mistake
        by_place.setdefault(place, []).append(detail)
    problems = []
    for place, found in by_place.items():
        if any(place != other and other[: len(place)] == place for other in by_place):
            continue  # a union's other branch: the one that came further tells more
        problems.append(_problem(place, key, found, model, document))
    return problems


def _problem(place: Key, key: Key, details: list[ErrorDetails], model: Any, document: Document) -> Problem:
    first, where, line = details[0], dotted(place), document.line(place)
    if first["type"] == "missing":
        return Problem("this is missing", where, line)
    if first["type"] == "extra_forbidden":
        return _unknown(place, model, document, depth=len(key))
    inner = (first.get("ctx") or {}).get("error")
    if isinstance(inner, LimbeckError):
        return Problem.of(inner, where, line)
    if first["type"] == "value_error":
        return Problem(first["msg"].removeprefix("Value error, "), where, line)
    wanted = " or ".join(dict.fromkeys(d["msg"].removeprefix("Input should be ") for d in details))
    return Problem("this cannot be", where, line, found=show(first.get("input")), wanted=wanted)


def _unknown(place: Key, model: Any, document: Document, depth: int = 0) -> Problem:
    known = _keys_at(model, place[depth:-1])
    name = str(place[-1])
    near = did_you_mean(name, known)
    remedy = near or (f"there are {', '.join(known)}" if known else "drop it")
    return Problem("no such key", dotted(place), document.line(place), remedy=remedy)


def _keys_at(model: Any, path: Key) -> list[str]:
    """Keys that a model knows at a place inside of it."""
    models = _models(model)
    for step in path:
        inner: list[type[BaseModel]] = []
        for m in models:
            if isinstance(step, str) and step in m.model_fields:
                inner += _models(m.model_fields[step].annotation)
        # a key of a dict, or an index of a list: the models are those of its values
        models = inner or models
    return list(dict.fromkeys(name for m in models for name in m.model_fields))


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated, dict, list, tuple):
        return [m for a in get_args(annotation) for m in _models(a)]
    return []


def _at(data: Any, key: Key) -> Any:
    for step in key:
        data = data[step]
    return data


def _prune(data: Any, loc: Key) -> bool:
    """Take out what stands at a place; whether there was something to take."""
    place = steps_within(data, loc)
    if not place:
        return False
    *path, last = place
    for step in path:
        data = data[step]
    if isinstance(data, dict):
        del data[last]
    else:
        data[last] = None  # what follows keeps its place
    return True


def show(value: Any) -> str:
    """A value for a message: short, and printable whatever it holds."""
    text = repr(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 4] + " ..."

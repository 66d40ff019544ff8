"""``limbeck taps``: the places in a model one can listen to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from limbeck.cli.methods import Json
from limbeck.cli.screen import print_json, print_table, print_text
from limbeck.core.errors import ConfigError, LimbeckError, TapError

if TYPE_CHECKING:
    from torch import nn

    from limbeck.core.survey import Place


def taps(
    model: Annotated[
        str, typer.Argument(help="A zoo name, package.module:callable, a transformers folder, hf:NAME ...")
    ],
    inputs: Annotated[
        str | None,
        typer.Option("--input", help="What it takes: 3x32x32 for images, 64 for vectors, tokens:16 for texts."),
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="A second model: the pairs with its places are proposed.")] = None,
    classes: Annotated[int, typer.Option(min=1, help="Number of classes the models are built for.")] = 10,
    leaves: Annotated[bool, typer.Option("--all", help="List the innermost modules too.")] = False,
    as_json: Json = False,
) -> None:
    """List a model's places with their shapes, what each role resolves to, and pairs with a teacher's."""
    facts = describe(model, inputs, classes)
    if teacher is not None:
        facts["teacher"] = describe(teacher, inputs, classes)
        facts["pairs"] = pairs(facts, facts["teacher"])
    if as_json:
        print_json(facts)
        return
    for one in (facts, facts.get("teacher")):
        if one:
            _print(one, leaves)
    for role, found in facts.get("pairs", {}).items():
        if found:
            print_table((f"{role} of {model}", "", f"of {teacher}", ""), found, title=f"\npairs proposed for {role}")


def describe(model: str, inputs: str | None, classes: int) -> dict[str, Any]:
    """Every place of a model, and where its roles lie."""
    from limbeck.core.roles import ROLES, resolve
    from limbeck.core.survey import survey

    built, example = _build(model, inputs, classes)
    try:
        places = survey(built, example)
    except LimbeckError:
        raise
    except Exception as error:  # whatever a stranger's model raises on inputs it does not take
        first = str(error).strip().splitlines()[:1]
        raise ConfigError(
            f"the model does not take these inputs: {''.join(first)}",
            where="--input",
            found=inputs or "3x32x32",
            remedy="say what it takes: --input 3x32x32, --input 64 or --input tokens:16",
        ) from error
    roles: dict[str, Any] = {}
    for role in ROLES:
        try:
            found = resolve(role, places)
        except TapError as error:
            roles[role] = {"missing": error.message}
            continue
        spots = found if isinstance(found, list) else [found]
        roles[role] = {
            "taps": [{"tap": _tap(s, places[s.module]), "shape": _shape(s, places[s.module])} for s in spots]
        }
    return {"model": model, "places": [_place(p) for p in places.values()], "roles": roles}


def pairs(student: dict[str, Any], teacher: dict[str, Any]) -> dict[str, list[tuple[str, str, str, str]]]:
    """The places of two models that would be paired, by role: tap and shape of each."""
    from limbeck.core.pairing import pair_shapes

    found: dict[str, list[tuple[str, str, str, str]]] = {}
    for role in student["roles"]:
        own, other = student["roles"][role].get("taps"), teacher["roles"][role].get("taps")
        if own and other:
            chosen = pair_shapes([t["shape"] for t in own], [t["shape"] for t in other])
            found[role] = [
                (own[i]["tap"], _text(own[i]["shape"]), other[j]["tap"], _text(other[j]["shape"])) for i, j in chosen
            ]
    return found


def _build(model: str, inputs: str | None, classes: int) -> tuple[nn.Module, Any]:
    import torch

    from limbeck.models import load_model

    kind, _, rest = (inputs or "").partition(":")
    if kind == "tokens" and (rest or "16").isdigit():
        built = load_model(model, num_classes=classes)
        words = getattr(getattr(built, "config", None), "vocab_size", 100)
        return built, {"input_ids": torch.arange(int(rest or 16)).unsqueeze(0) % words}
    sizes = (inputs or "3x32x32").split("x")
    if not all(s.isdigit() and 0 < int(s) < 1_000_000 for s in sizes):
        raise ConfigError("this is no size", where="--input", found=inputs, wanted="such as 3x32x32, 64 or tokens:16")
    shape = [int(s) for s in sizes]
    channels, size = (shape[0], shape[1]) if len(shape) == 3 else (None, None)
    built = load_model(model, num_classes=classes, in_channels=channels, image_size=size)
    example = getattr(built, "dummy_inputs", None)
    if inputs is None and isinstance(example, dict):  # a transformers model knows what it takes
        return built, {k: v for k, v in example.items() if v is not None}
    return built, torch.zeros(2, *shape)


def _place(place: Place) -> dict[str, Any]:
    return {
        "name": place.name,
        "module": place.module,
        "calls": place.calls,
        "parameters": place.parameters,
        "leaf": place.leaf,
        "input": place.inputs,
        "outputs": place.outputs,
        "attention": place.probabilities,
    }


def _tap(spot: Any, place: Place) -> str:
    """A spot in the words of a recipe."""
    element = "" if spot.element is None else f"[{spot.element}]"
    call = f"#{spot.call}" if place.calls > 1 else ""
    return f"{spot.module}{element}{'@in' if spot.side == 'in' else ''}{call}"


def _shape(spot: Any, place: Place) -> tuple[int, ...] | None:
    if spot.side == "in":
        return place.inputs
    return place.shape if spot.element is None else place.outputs[spot.element]


def _text(shape: Any) -> str:
    """A shape as papers write it; its first number is only that of the dry run."""
    return f"[{', '.join(('B', *map(str, shape[1:])))}]" if shape else ""


def _print(facts: dict[str, Any], leaves: bool) -> None:
    places = [p for p in facts["places"] if leaves or not p["leaf"] or p["name"].count(".") == 0]
    rows = [
        (p["name"], p["module"], _text(next((o for o in p["outputs"] if o), None)), f"{p['parameters']:,}")
        for p in places
    ]
    print_table((f"places of {facts['model']}", "module", "output", "parameters"), rows)
    roles = [
        (
            role,
            taps.get("missing") or "\n".join(t["tap"] for t in taps["taps"]),
            "\n".join(_text(t["shape"]) for t in taps.get("taps", ())),
        )
        for role, taps in facts["roles"].items()
    ]
    print_text("")
    print_table(("role", "is", "shape"), roles)
    print_text("")

"""``limbeck methods`` and ``limbeck show``: the catalogue."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from limbeck.cli.screen import print_json, print_table, print_text, say
from limbeck.core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from limbeck.core.catalogue import Method

Plugins = Annotated[
    list[str] | None,
    typer.Option("--plugin", help="A module or file that registers methods of your own; may come several times."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")]


def methods(
    kind: Annotated[
        str | None, typer.Option(help="Only of this knowledge: response, feature, relation, control, scheme.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Only for this task, such as classification.")] = None,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """List the methods: what each transfers and how it is known to be right."""
    known = _catalogue(plugin)
    chosen = list(known.values())
    for field, wanted, of in (("kind", kind, lambda c: [c.knowledge]), ("task", task, lambda c: c.tasks)):
        if wanted is None:
            continue
        names = sorted({name for m in known.values() for name in of(m.card)})
        chosen = [m for m in chosen if wanted in of(m.card)]
        if wanted not in names:
            raise ConfigError(
                f"no method is of this {field}",
                where=f"--{field}",
                found=repr(wanted),
                wanted=f"one of {', '.join(names)}",
                remedy=did_you_mean(wanted, names),
            )
    if as_json:
        print_json([_facts(m) for m in chosen])
        return
    print_table(
        ("key", "name", "year", "transfers", "evidence", "title"),
        [(m.card.key, m.card.name, m.card.year, m.card.knowledge, m.card.evidence, m.card.title) for m in chosen],
    )
    found = Counter(m.card.evidence for m in chosen)
    counts = ", ".join(f"{found[kind]} {kind}" for kind in ("parity", "formula", "reading") if found[kind])
    say(f"\n{len(chosen)} methods; evidence: {counts}. limbeck show KEY tells all about one.")


def show(
    key: Annotated[str, typer.Argument(help="A method's key, see limbeck methods.", metavar="METHOD")],
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Show one method: equation, use, evidence, options with their sources, a recipe and Python."""
    from limbeck.core import catalogue

    known = _catalogue(plugin)
    facts = _facts(known[key] if key in known else catalogue.get(key, "METHOD"))
    if as_json:
        print_json(facts)
        return
    source = ", ".join(
        str(part) for part in (facts["title"], facts["year"], facts["arxiv"] and f"arXiv {facts['arxiv']}") if part
    )
    print_text(f"{facts['name']} ({facts['key']})\n{source}")
    if facts["code"]:
        print_text(f"Authors' code: {facts['code']}")
    print_text(f"\n{facts['use']}\n\n  L = {facts['equation']}\n" if facts["equation"] else f"\n{facts['use']}\n")
    what = "Any loss" if facts["knowledge"] == "scheme" else f"Transfers: {facts['knowledge']}"
    needs = f"; needs {', '.join(facts['needs'])}" if facts["needs"] else ""
    needs += f"; the student has the head {facts['head']}" if facts["head"] else ""
    who = "" if facts["knowledge"] == "scheme" else f"; scheme {facts['scheme']}"
    print_text(f"{what}; for {', '.join(facts['tasks'])}{who}{needs}")
    note = f": {facts['evidence_note']}" if facts["evidence_note"] else ""
    print_text(f"Evidence: {facts['evidence']}{note}")
    for choice in facts["choices"]:
        print_text(f"  - {choice}")
    if facts["options"]:
        print_text("")
        rows = [(name, o["type"], o["default"], o["source"]) for name, o in facts["options"].items()]
        print_table(("option", "type", "default", "where the default comes from"), rows)
    print_text(f"\nIn a recipe:\n\n{facts['recipe']}\nIn Python:\n\n{facts['python']}")


def _catalogue(plugins: list[str] | None) -> dict[str, Method]:
    import limbeck.objectives  # noqa: F401  registers the methods
    from limbeck import schemes
    from limbeck.core import catalogue

    for plugin in plugins or ():
        catalogue.load_plugin(plugin, where="--plugin")
    return {**catalogue.methods(), **schemes.carded()}


def _facts(method: Method) -> dict[str, Any]:
    """A card, its options and examples as plain values."""
    card = method.card
    options = {
        name: {
            "type": _type(info.annotation),
            "default": repr(method.preset.get(name, info.get_default())) if not info.is_required() else None,
            "source": card.defaults.get(name, ""),
        }
        for name, info in method.options.model_fields.items()
    }
    return {
        **dataclasses.asdict(card),
        "class": f"{method.cls.__module__}.{method.cls.__name__}",
        "function": method.function and f"limbeck.functional.{method.function.__name__}",
        "options": options,
        "recipe": _recipe(method),
        "python": _python(method),
    }


def _type(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def _recipe(method: Method) -> str:
    """The usual sum as a recipe's lines, with every option of the method that can be written there."""
    from limbeck.recipes.document import dump
    from limbeck.recipes.schema import usual

    card = method.card
    shown: dict[str, Any] = {}
    if card.knowledge == "scheme":
        shown = {name: info.get_default() for name, info in method.options.model_fields.items()}
        plain = {"loss": "kd", "scheme": {card.key: shown} if shown else card.key}
        return "".join(f"  {line}\n" for line in dump(plain).splitlines())
    for name, info in method.options.model_fields.items():
        default = method.preset.get(name, None if info.is_required() else info.get_default())
        if isinstance(default, (bool, int, float, str)):
            shown[name] = default
    terms: dict[str, Any] = {key: weight for key, weight in card.with_labels.items() if key != card.key}
    own = usual(card.key)[card.key]
    own = own if isinstance(own, dict) else {"weight": own}
    terms[card.key] = {**own, **shown} if shown or len(own) > 1 else own["weight"]
    return "".join(f"  {line}\n" for line in dump({"loss": terms}).splitlines())


def _python(method: Method) -> str:
    from limbeck.core import catalogue
    from limbeck.core.schedules import Schedule

    card = method.card
    if card.knowledge == "scheme":
        return f'  student = limbeck.distill(teacher, student, data, "kd", scheme="{card.key}").student\n'
    cls = method.cls.__name__
    sums = [f"{weight} * {catalogue.get(k).cls.__name__}()" for k, weight in card.with_labels.items() if k != card.key]
    preset = ", ".join(f"{k}={v!r}" for k, v in method.preset.items())
    schedule = type(card.weight).__name__ if isinstance(card.weight, Schedule) else None
    weight = repr(card.weight)
    own = f"{cls}({preset})" if card.weight == 1 else f"{weight} * {cls}({preset})"
    names = sorted({cls, *(catalogue.get(k).cls.__name__ for k in card.with_labels)})
    module = "limbeck.objectives" if method.cls.__module__.startswith("limbeck.") else method.cls.__module__
    first = f"  from limbeck import {schedule}\n" if schedule else ""
    return (
        f"{first}  from {module} import {', '.join(names)}\n"
        f"  student = limbeck.distill(teacher, student, data, {' + '.join([*sums, own])}).student\n"
    )

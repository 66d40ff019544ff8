"""What a comparison compares: methods as they are written on a command line, and controls."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from limbeck.core import catalogue
from limbeck.core.catalogue import check_options
from limbeck.core.errors import ConfigError, did_you_mean
from limbeck.core.teacher import teacher_inputs
from limbeck.models.describe import flops
from limbeck.recipes.build import Sizes, fewer, model_of, source_of, teacher_sizes, train_loader
from limbeck.recipes.document import parse_value
from limbeck.recipes.schema import Named, Recipe, Term, Weighted, usual_head, usual_terms
from limbeck.schemes.scheme import carded, options, schemes

#: Controls by name: what people call them, the method whose usual loss they train with, and what they hold against one.
CONTROLS: dict[str, tuple[str, str, str]] = {
    "no_teacher": ("No teacher", "cross_entropy", "cross entropy alone"),
    "label_smoothing": ("Label smoothing", "label_smoothing", "soft labels that know nothing"),
    "random_teacher": ("Random teacher", "kd", "KD from a teacher with random weights"),
    "tuned_kd": ("Tuned KD", "kd", "KD at the best of several temperatures, chosen on validation data"),
    "same_budget": ("Same budget", "cross_entropy", "cross entropy for as many operations as distillation takes"),
}
#: The same for data whose samples may have any number of labels.
MULTILABEL_CONTROLS: dict[str, tuple[str, str, str]] = {
    "no_teacher": ("No teacher", "binary_cross_entropy", "binary cross entropy alone"),
    "label_smoothing": (
        "Label smoothing",
        "binary_cross_entropy:label_smoothing=0.1",
        "soft labels that know nothing",
    ),
    "random_teacher": ("Random teacher", "mld", "MLD from a teacher with random weights"),
    "tuned_kd": ("Tuned MLD", "mld", "MLD at the best of several weights, chosen on validation data"),
    "same_budget": (
        "Same budget",
        "binary_cross_entropy",
        "binary cross entropy for as many operations as distillation takes",
    ),
}
#: Controls that run where they are named alone: KD from a teacher that knows a part of what the recipe's does.
PARTIAL_CONTROLS: dict[str, tuple[str, str, str]] = {
    "kd_pt": ("KD-pt", "understanding_kd:part=pt", "KD from how sure the teacher is of each sample"),
    "kd_sim": ("KD-sim", "understanding_kd:part=sim", "KD from how alike classes are to the teacher"),
    "kd_topk": ("KD-topk", "understanding_kd:part=topk", "KD from the teacher's first guesses"),
}
_BY_TASK = {"classification": CONTROLS, "multilabel": MULTILABEL_CONTROLS, "language": CONTROLS}
_NEEDS_TEACHER = ("random_teacher", "tuned_kd", "same_budget", *PARTIAL_CONTROLS)
TEMPERATURES = (1, 2, 4, 8)  # that tuned_kd tries
WEIGHTS = (0.25, 1, 4, 16)  # that it tries of MLD, which has no temperature
_VARIANTS = {
    "classification": [f"kd:temperature={t}" for t in TEMPERATURES],
    "multilabel": [f"mld:weight={w}" for w in WEIGHTS],
}
_VARIANTS["language"] = _VARIANTS["classification"]
_ALSO_METHODS = ("no_teacher", "label_smoothing")  # cross_entropy and label_smoothing, were they listed as methods


@dataclass(frozen=True)
class Entry:
    """One line of a comparison.

    Args:
        entry: As it was written: ``"kd:temperature=2"``, or a control's name.
        name: What people call it.
        role: ``"method"`` or ``"control"``.
        key: The method it trains with.
        loss: Its terms; empty where it trains with the recipe's own.
        scheme: Who teaches whom.
        options: The scheme's.
        head: What its student has in the place of the last linear layer.
        about: What a control is.
        rival: Its teacher is a random one, not the recipe's.
        steps: So many steps, where that differs from the recipe's.
        variants: What it chooses from; it is then no run of its own.
    """

    entry: str
    name: str
    role: str
    key: str
    loss: dict[str, Term]
    scheme: str = "offline"
    options: dict[str, Any] = field(default_factory=dict)
    head: Named | None = None
    about: str = ""
    rival: bool = False
    steps: int | None = field(default=None, compare=False)
    variants: tuple[Entry, ...] = ()

    @property
    def runs(self) -> tuple[Entry, ...]:
        """What is run for it: itself, or its variants."""
        return self.variants or (self,)

    @property
    def slug(self) -> str:
        """A name for folders."""
        return re.sub(r"[^A-Za-z0-9_.+-]", "-", self.entry).strip("-.+")

    def recipe(self, base: Recipe, seed: int) -> Recipe:
        """The recipe of one of its runs."""
        said = base.scheme.options if base.scheme.name == self.scheme else {}
        scheme = Named(name=self.scheme, options={**said, **self.options})
        changes: dict[str, Any] = {"name": f"{self.slug}-seed{seed}", "scheme": scheme, "seed": seed}
        if self.loss:
            changes["loss"] = self.loss
        head, own = self.head if self.loss else usual_head(base.loss), base.student.head
        if head is not None and own is not None and own.name == head.name:
            head = Named(name=head.name, options={**own.options, **head.options})
        changes["student"] = base.student.model_copy(update={"head": head})
        if self.rival and base.teacher is not None:
            spec = base.teacher
            ready = spec.model.startswith(("hf:", "timm:", "torchvision:")) or Path(spec.model).is_dir()
            random = {"untrained": True, "weights": None, "train": None, "cache": None, "seed": seed}
            changes["teacher"] = spec.model_copy(update={**random, "pretrained": False if ready else None})
        if self.scheme != "offline" and schemes()[self.scheme].own_teacher == "only":
            changes |= {"teacher": None, "teachers": {}}
        if self.steps is not None:
            changes["train"] = base.train.model_copy(update={"epochs": None, "steps": self.steps})
        return base.model_copy(update=changes)

    def facts(self) -> dict[str, Any]:
        """For ``compare.json``."""
        loss = {name: term.model_dump(mode="json", exclude_none=True) for name, term in self.loss.items()}
        plain = {"entry": self.entry, "name": self.name, "role": self.role, "key": self.key, "about": self.about}
        head = {} if self.head is None else {"head": self.head.written()}
        options = {"scheme_options": self.options} if self.options else {}
        return {**plain, "loss": loss, "scheme": self.scheme, **options, **head}


def split_methods(text: str) -> list[str]:
    """Methods from one text, commas between them; a piece that is but an option belongs to the method before it.

    >>> split_methods("kd:temperature=2,weight=0.5,dkd,orc:peers=[a,b]")
    ['kd:temperature=2,weight=0.5', 'dkd', 'orc:peers=[a,b]']
    """
    found: list[str] = []
    for piece in _pieces(text):
        if found and "=" in piece and ":" not in piece.partition("=")[0]:
            found[-1] += f",{piece}"
        else:
            found.append(piece)
    return found


def _pieces(text: str) -> list[str]:
    """Split at commas that stand in no brackets."""
    pieces, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth <= 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    return [piece.strip() for piece in pieces if piece.strip()]


def controls_for(task: str) -> dict[str, tuple[str, str, str]]:
    """The controls of a task.

    Raises:
        ConfigError: There are none, so methods cannot be compared on such data.
    """
    if task not in _BY_TASK:
        wanted = " or ".join(_BY_TASK)
        raise ConfigError("there are no controls for this task yet", where="data.source", found=task, wanted=wanted)
    return _BY_TASK[task]


def method(text: str, task: str = "classification") -> Entry:
    """A method or a scheme as it is written: its key, and its options behind a colon; a loss may follow a scheme.

    The loss is a method, for its usual one, or all of its terms as a recipe has them, in braces.

    Args:
        text: Such as ``"kd:temperature=2"``, ``"mutual:peers=2"`` or ``"mutual/dkd"``.
        task: What the data's labels mean.

    Raises:
        ConfigError: No such method or scheme, or an option that is none.

    >>> method("kd:temperature=2").loss["kd"].options
    {'temperature': 2}
    >>> method("mutual/dkd").scheme, [*method("mutual/dkd").loss]
    ('mutual', ['cross_entropy', 'dkd'])
    >>> method("funmatch/{kd: {temperature: 2}}").loss["kd"].options
    {'temperature': 2}
    """
    first, slash, second = (part.strip() for part in text.partition("/"))
    key, _, rest = first.partition(":")
    if key not in carded():
        if slash:
            wanted = f"a scheme before the slash: {', '.join(carded())}"
            raise ConfigError("no such scheme", where="methods", found=repr(text), wanted=wanted)
        return _method(key, rest, text, task)
    card, given = carded()[key].card, _options(rest, text)
    check_options(options(key), given, f"methods: {key}")
    name = card.name if not rest else f"{card.name} ({rest})"
    if not slash:
        return Entry(text.strip(), name, "method", key, {}, key, given)
    if second.startswith("{"):
        loss = _whole_loss(second)
        return Entry(text.strip(), f"{name}, {second}", "method", key, loss, key, given, usual_head(loss))
    by = method(second, task)
    if by.scheme != "offline":
        raise ConfigError("this one has a scheme of its own", where="methods", found=second, wanted="a plain method")
    return replace(by, entry=text.strip(), name=f"{name}, {by.name}", role="method", key=key, scheme=key, options=given)


def _method(key: str, rest: str, text: str, task: str) -> Entry:
    card = catalogue.get(key, "methods").card
    terms = {name: term.model_dump(exclude_none=True) for name, term in usual_terms(key, task).items()}
    given = _options(rest, text)
    if "method" in given:
        raise ConfigError("the method is said before the colon", where="methods", found=text)
    terms[key].update(given)
    loss = {name: Term(**term) for name, term in terms.items()}
    role = "control" if card.knowledge == "control" else "method"
    name = card.name if not rest else f"{card.name} ({rest})"
    return Entry(text.strip(), name, role, key, loss, card.scheme, {}, usual_head(loss))


def _whole_loss(text: str) -> dict[str, Term]:
    value = parse_value(text, "methods")
    if not isinstance(value, dict) or not value:
        raise ConfigError("a loss has terms", where="methods", found=text, wanted="such as {kd: {temperature: 1}}")
    for name, term in value.items():
        catalogue.get((isinstance(term, dict) and term.get("method")) or str(name), "methods")
    try:
        return {str(name): TypeAdapter(Weighted).validate_python(term) for name, term in value.items()}
    except ValidationError as wrong:
        reason = wrong.errors()[0]["msg"]
        raise ConfigError(f"no such loss: {reason}", where="methods", found=text) from wrong


def _options(rest: str, text: str) -> dict[str, Any]:
    """What stands behind the colon."""
    found = {}
    for part in _pieces(rest):
        name, equals, value = (p.strip() for p in part.partition("="))
        if not equals or not name:
            raise ConfigError(
                "an option has the form name=value", where="methods", found=text, wanted="kd:temperature=2"
            )
        found[name] = parse_value(value, text)
    return found


def control(name: str, task: str = "classification") -> Entry:
    """A control by its name, for data of a task."""
    known = {**controls_for(task), **(PARTIAL_CONTROLS if task == "classification" else {})}
    if name not in known:
        raise ConfigError(
            "no such control",
            where="controls",
            found=repr(name),
            wanted=", ".join(known),
            remedy=did_you_mean(name, known),
        )
    title, text, about = known[name]
    trains = method(text, task)
    made = replace(trains, entry=name, name=title, role="control", about=about, rival=name == "random_teacher")
    if name == "tuned_kd":
        made = replace(made, variants=tuple(method(variant, task) for variant in _VARIANTS[task]))
    return made


def controls_of(controls: bool | Sequence[str], teacher: bool, task: str = "classification") -> list[str]:
    """The controls asked for: all that can be run, none, or those named."""
    if isinstance(controls, bool):
        return [name for name in controls_for(task) if teacher or name not in _NEEDS_TEACHER] if controls else []
    for name in controls:
        control(name, task)
        if name in _NEEDS_TEACHER and not teacher:
            raise ConfigError("this control needs a teacher, and the recipe has none", where="controls", found=name)
    return list(controls)


def entries_of(methods: Sequence[str], controls: Sequence[str], task: str = "classification") -> list[Entry]:
    """Controls, then methods; a method that is a control already stands once.

    Args:
        methods: As they are written.
        controls: By name.
        task: What the data's labels mean.

    Raises:
        ConfigError: No method, an unknown one, or one that is written twice.
    """
    found = [control(name, task) for name in controls]
    for text in methods:
        entry = method(text, task)
        same = (entry.loss, entry.scheme, entry.options)
        alike = [e for e in found if e.entry in _ALSO_METHODS and (e.loss, e.scheme, e.options) == same]
        twin = next((e for e in found if e.entry == entry.entry or e in alike), None)
        if twin is None:
            found.append(entry)
        elif twin.role == "method":
            raise ConfigError("this method stands here twice", where="methods", found=text, wanted="each once")
    if not methods:
        raise ConfigError("there is no method to compare", where="methods", wanted="such as kd,dkd")
    if len({e.slug for e in found}) != len(found):
        raise ConfigError("two of these would share a folder", where="methods", found=", ".join(e.entry for e in found))
    return found


def with_budget(recipe: Recipe, entries: list[Entry], most: float | None = None) -> tuple[list[Entry], dict[str, str]]:
    r"""Give ``same_budget`` its steps.

    Operations of one step: forward and backward of the student, the latter taken as two forwards, and one forward of
    the teacher. A run without a teacher may take :math:`(3 F_s + F_t) / 3 F_s` times the steps for the same.

    Args:
        recipe: What all runs do.
        entries: The lines of the comparison.
        most: Leave the control out where it would take more than so many times the steps.

    Returns:
        The lines, and which were left out and why.
    """
    if not any(entry.entry == "same_budget" for entry in entries) or recipe.teacher is None:
        return entries, {}
    source = source_of(recipe.data)
    loader = train_loader(recipe.data, fewer(source.train, recipe.data.samples), recipe.seed)
    example = loader.example(1)
    sizes = Sizes.of(loader, example)
    own = flops(model_of(recipe.student, sizes, 0, weights=False), example.inputs)
    teacher = model_of(recipe.teacher, teacher_sizes(source.train, sizes), 0, weights=False)
    other = flops(teacher, teacher_inputs(example))
    times = (3 * own + other) / (3 * own) if own else 1.0
    if most is not None and times > most:
        rest = [entry for entry in entries if entry.entry != "same_budget"]
        return rest, {"same_budget": f"it would take {times:.3g} times the steps of the others"}
    steps = round(times * recipe.train.total_steps(loader.steps_per_epoch))
    alone = control("same_budget", source.task).about.partition(" for ")[0]
    about = f"{alone} for {times:.3g} times the steps: as many operations as KD takes, teacher included"
    return [replace(e, steps=steps, about=about) if e.entry == "same_budget" else e for e in entries], {}

"""Cards: what is known about each published method, kept beside its code."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from limbeck.core.errors import ConfigError, did_you_mean
from limbeck.core.objective import Objective
from limbeck.core.schedules import Schedule

Knowledge = Literal["response", "feature", "relation", "control", "scheme"]
Evidence = Literal["parity", "formula", "reading"]


@dataclass(frozen=True)
class Card:
    """One method's entry in the catalogue. The command line, docs, tests and leaderboards all read it.

    Args:
        key: The name in recipes, the file's name, and the prefix of its function ``<key>_loss``.
        name: The name people say.
        title, year, arxiv, code: The paper, and the authors' repository (``owner/name``).
        knowledge: What is transferred; ``scheme`` where the method is who learns from whom, by any loss.
        equation: The loss, in LaTeX.
        use: When to reach for it and what to combine it with, in a sentence or two.
        defaults: Where each default comes from, by option.
        evidence: ``parity`` (equal to the authors' numbers), ``formula`` (equal to the paper's equations, computed
            independently), ``reading`` (the text left details open; ``choices`` says which were made and why).
        evidence_note: What was compared, with repository and commit.
        choices: Decisions the paper leaves open or where its code and text differ.
        needs: What a batch or data set must provide beyond inputs: ``labels``, ``index``, ``samples``.
        tasks: What it was made for.
        with_labels: The usual weights beside it: what ``compare`` and a bare method name add, as ``{key: weight}``.
        weight: Its own usual weight in that sum; a schedule where the paper's runs have one, such as a warm-up.
        scheme: Who teaches whom in the paper.
        cost: Why a step takes more than twice the time or memory of one of plain KD, where it does.
        head: What the student needs in the place of its last linear layer, by name; see ``limbeck.models.put_head``.
    """

    key: str
    name: str
    title: str
    year: int
    knowledge: Knowledge
    equation: str
    use: str
    arxiv: str | None = None
    code: str | None = None
    defaults: dict[str, str] = field(default_factory=dict)
    evidence: Evidence = "reading"
    evidence_note: str = ""
    choices: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ("classification",)
    with_labels: dict[str, float] = field(default_factory=dict)
    weight: float | Schedule = 1.0
    scheme: str = "offline"
    cost: str = ""
    head: str | None = None


@dataclass(frozen=True)
class Method:
    """A card with the code it describes."""

    card: Card
    cls: type[Objective]
    function: Callable[..., Any] | None
    preset: dict[str, Any]

    @cached_property
    def options(self) -> type[BaseModel]:
        """The constructor's options as a strict model: what a recipe may say, with types and defaults."""
        return options_of(self.cls, self.card.key)

    def build(self, where: str | None = None, **options: Any) -> Objective:
        """Make the objective; a wrong option is one readable error."""
        checked = check_options(self.options, {**self.preset, **options}, where or self.card.key)
        objective = self.cls(**checked)
        objective.card = self.card  # type: ignore[misc]  # a second card of one class names itself
        return objective


_methods: dict[str, Method] = {}
C = TypeVar("C", bound=type[Objective])


def register(card: Card, function: Callable[..., Any] | None = None, **preset: Any) -> Callable[[C], C]:
    """Put a method into the catalogue. From then on it is in the command line, the docs and the conformance suite.

    Args:
        card: Its card.
        function: Its pure function, published as ``limbeck.functional.<key>_loss``.
        preset: Options that differ from the class's own defaults, where one class serves several papers.

    >>> from limbeck.core import catalogue
    >>> import limbeck.objectives
    >>> catalogue.get("kd").card.year
    2015
    """

    def add(cls: C) -> C:
        known = _methods.get(card.key)
        if known is not None and (known.cls.__module__, known.cls.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(
                "two methods have this key", where=card.key, found=f"{known.cls.__module__} and {cls.__module__}"
            )
        if function is not None and function.__name__ != f"{card.key}_loss" and not preset:
            raise ConfigError(
                "a method's function is named after it", where=function.__name__, wanted=f"{card.key}_loss"
            )
        _methods[card.key] = Method(card, cls, function, preset)
        if "card" not in cls.__dict__:
            cls.card = card
        return cls

    return add


def methods() -> dict[str, Method]:
    """Every registered method, by key."""
    return dict(sorted(_methods.items()))


def get(key: str, where: str = "method") -> Method:
    """The method of this key, or an error that names near misses."""
    if key not in _methods:
        raise ConfigError(
            "no such method",
            where=where,
            found=repr(key),
            remedy=did_you_mean(key, _methods) or "limbeck methods lists them",
        )
    return _methods[key]


def discover(package: ModuleType) -> None:
    """Import every module below a package, so that each registers what it holds."""
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)


def load_entry_points(group: str = "limbeck.methods") -> None:
    """Import what installed packages offer under this entry point group."""
    for entry in metadata.entry_points(group=group):
        load_plugin(entry.module, where=f"entry point {entry.name}")


def load_plugin(name: str, where: str = "plugins") -> None:
    """Import a module (``package.module``) or a file (``my_method.py``) that registers methods.

    Raises:
        ConfigError: It is not there, or fails while it is imported.
    """
    try:
        if name.endswith(".py"):
            path = Path(name).resolve()
            if not path.is_file():
                raise ConfigError("no such file", where=where, found=name)
            _load_file(path)
        else:
            importlib.import_module(name)
    except ConfigError:
        raise
    except Exception as error:  # whatever a stranger's module raises is theirs to read, as one message
        raise ConfigError(
            f"this plug-in cannot be imported: {type(error).__name__}: {error}", where=where, found=name
        ) from error


def _load_file(path: Path) -> None:
    """Run a file as a module, once. Where a module of its name is there already, it goes by its whole path."""
    free = path.stem not in sys.modules or getattr(sys.modules[path.stem], "__file__", None) == str(path)
    name = path.stem if free else str(path)
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def options_of(function: Callable[..., Any], name: str) -> type[BaseModel]:
    """A strict pydantic model of a callable's keyword options, from its signature."""
    fields: dict[str, Any] = {}
    annotations = inspect.get_annotations(
        function.__init__ if inspect.isclass(function) else function,
        eval_str=True,
    )
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (annotations.get(parameter.name, Any), default)
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())
    return create_model(f"{name}_options", __config__=config, **fields)


def check_options(model: type[BaseModel], options: dict[str, Any], where: str) -> dict[str, Any]:
    """Options as the model wants them, or one error for the first that is wrong."""
    try:
        checked = model.model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            raise ConfigError(
                "no such option",
                where=f"{where}.{name}",
                wanted=f"one of {', '.join(model.model_fields)}" if model.model_fields else "no options",
                remedy=did_you_mean(name, model.model_fields),
            ) from None
        raise ConfigError(
            first["msg"][0].lower() + first["msg"][1:],
            where=".".join([where, *map(str, first["loc"])]),
            found=repr(first.get("input")),
        ) from None
    return {name: getattr(checked, name) for name in model.model_fields if name in checked.model_fields_set}

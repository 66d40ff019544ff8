"""A recipe's file as plain values that know their lines.

Recipes are plain YAML: mappings, lists, texts, numbers, true, false and null, as YAML 1.2 reads them (``1e-4`` is a
number, ``on`` a text). Tags, anchors and repeated keys are refused, and so is whatever could not be written again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import yaml

from limbeck.recipes.problem import Key, Problem, RecipeError, dotted

_MOST_CHARACTERS = 256_000
_DEEPEST = 16
_LARGEST = 2**63
# Two ASCII control characters are allowed in texts: tab and newline.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


class _Words:
    """How plain words are read: YAML 1.2's core schema, without its octal and hexadecimal numbers."""

    yaml_implicit_resolvers: ClassVar[dict[str | None, list[tuple[str, re.Pattern[str]]]]] = {}


class _Loader(_Words, yaml.SafeLoader):
    pass


class _Dumper(_Words, yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    for _letter in _first:
        _rule = (f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"))
        _Words.yaml_implicit_resolvers.setdefault(_letter, []).append(_rule)

_SCALARS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": lambda text: float(re.sub(r"\.(?=[a-z])", "", text.lower())),
    "bool": lambda text: text.lower() == "true",
    "null": lambda text: None,
}


@dataclass
class Document:
    """A recipe as it was written.

    Args:
        data: Its values.
        name: File or shipped name, for messages.
        lines: Line of every value, by place; ``None`` for one that was set otherwise.
    """

    data: dict[str, Any]
    name: str = "recipe"
    lines: dict[Key, int | None] = field(default_factory=dict)

    def __contains__(self, key: Key) -> bool:
        """Whether something stands at a place."""
        return steps_within(self.data, key) == key

    def line(self, key: Key) -> int | None:
        """Where a place was written; that of what surrounds it where it was not."""
        while key not in self.lines and key:
            key = key[:-1]
        return self.lines.get(key) if key else None


def steps_within(data: Any, key: Key) -> Key:
    """The steps of a place that lead somewhere in these values; others are passed over.

    >>> steps_within({"a": [1, {"b": 2}]}, ("a", "list", 1, "b", "c"))
    ('a', 1, 'b')
    """
    found: list[str | int] = []
    for step in key:
        if step in data if isinstance(data, dict) else isinstance(data, list) and step in range(len(data)):
            found.append(step)
            data = data[step]
    return tuple(found)


def parse(text: str, name: str = "recipe") -> Document:
    """Read a recipe's text.

    Raises:
        RecipeError: It is no YAML, no mapping, or says things a recipe cannot; with all problems of the last kind.

    >>> parse("train:\\n  epochs: 1e1").data
    {'train': {'epochs': 10.0}}
    """
    node = _compose(text, name)
    if node is None:
        raise RecipeError([Problem("the recipe is empty", remedy="limbeck recipes lists complete ones")], name)
    reader = _Reader()
    data = reader.value(node, ())
    if not isinstance(data, dict):
        found = Problem("a recipe is a mapping of names to values", line=1, found=type(data).__name__)
        raise RecipeError([found], name)
    if reader.problems:
        raise RecipeError(reader.problems, name)
    return Document(data, name, reader.lines)


def parse_value(text: str, name: str) -> Any:
    """Read one value, as it may stand behind a key."""
    node = _compose(text, name)
    reader = _Reader()
    value = None if node is None else reader.value(node, ())
    if reader.problems:
        raise RecipeError(reader.problems, name)
    return value


def dump(data: Any) -> str:
    """Plain values as YAML that :func:`parse` reads back alike."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)


def _compose(text: str, name: str) -> yaml.Node | None:
    """The tree of nodes; its size and depth are looked at before it is built, since building recurses."""
    if len(text) > _MOST_CHARACTERS:
        raise RecipeError([Problem("too long for a recipe", found=f"{len(text)} characters")], name)
    try:
        depth = documents = 0
        for event in yaml.parse(text, Loader=_Loader):
            mark = event.start_mark
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                raise _error("anchors and aliases are not read", mark, name, remedy="write the values out")
            tag = getattr(event, "tag", None)
            if tag is not None:
                raise _error("tags are not read", mark, name, found=tag, remedy="write the plain value")
            documents += isinstance(event, yaml.DocumentStartEvent)
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST or documents > 1:
                raise _error(
                    "nested too deeply" if documents < 2 else "a file holds one recipe, not several", mark, name
                )
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        message = "; ".join(part for part in (error.context, error.problem) if part)
        raise _error(f"this is no YAML: {message}", error.problem_mark or error.context_mark, name) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = Problem("this character cannot stand in YAML", line=line, found=ascii(text[error.position]))
        raise RecipeError([problem], name) from None
    except (ValueError, OverflowError) as error:  # a character by a number that names none
        raise RecipeError([Problem(f"this is no YAML: {error}")], name) from None


def _error(message: str, mark: Any, name: str, **facts: str) -> RecipeError:
    line, column = (mark.line + 1, mark.column + 1) if mark is not None else (None, None)
    return RecipeError([Problem(message, line=line, column=column, **facts)], name)


class _Reader:
    """Turns nodes into values, noting lines and problems."""

    def __init__(self) -> None:
        self.lines: dict[Key, int | None] = {}
        self.problems: list[Problem] = []

    def value(self, node: yaml.Node, key: Key) -> Any:
        """The value of a node that stands at this place."""
        self.lines.setdefault(key, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(child, (*key, i)) for i, child in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            values: dict[str, Any] = {}
            for name_node, child in node.value:
                name = self._name(name_node, key, values)
                if name is not None:
                    self.lines[(*key, name)] = name_node.start_mark.line + 1
                    values[name] = self.value(child, (*key, name))
            return values
        return self._scalar(node, key)

    def _name(self, node: yaml.Node, key: Key, taken: dict[str, Any]) -> str | None:
        line = node.start_mark.line + 1
        if not isinstance(node, yaml.ScalarNode) or _UNPRINTABLE.search(node.value):
            self.problems.append(Problem("a key is a plain word", dotted(key), line, found=ascii(node.value)[:80]))
            return None
        if node.value in taken:
            first = self.lines[(*key, node.value)]
            place = dotted((*key, node.value))
            self.problems.append(Problem("this key stands here twice", place, line, found=f"first on line {first}"))
            return None
        return str(node.value)

    def _scalar(self, node: yaml.Node, key: Key) -> Any:
        kind = node.tag.rpartition(":")[2]
        try:
            value = _SCALARS[kind](node.value)
        except ValueError:  # a whole number of thousands of digits
            value = math.inf
        unfit = None
        if isinstance(value, str) and _UNPRINTABLE.search(value):
            unfit = "a text holds no control characters"
        elif isinstance(value, (int, float)) and not abs(value) < _LARGEST:
            unfit = "not a number of any use here"
        if unfit:
            line = node.start_mark.line + 1
            self.problems.append(Problem(unfit, dotted(key), line, found=ascii(node.value)[:80]))
        return value

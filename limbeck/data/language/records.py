"""Records: texts, prompts with their completions, and conversations, read from rows of any table."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from limbeck.core.errors import ConfigError, DataError, did_you_mean

Message = Mapping[str, Any]
Place = tuple[str, str, int]  # file or set, "line" or "row", and its number: where a record stands, for messages

_FORMS = {"messages": ("messages",), "prompt": ("prompt", "completion"), "text": ("text",)}
ASSISTANT = "assistant"  # the role whose turns are learned


@dataclass(frozen=True, slots=True)
class Record:
    """One thing to learn from: plain pieces of text, or a conversation.

    Args:
        pieces: Texts that follow each other, each with whether it is learned; empty for a conversation.
        messages: Of a conversation.
        first: Turns of the assistant before this message belong to the prompt.
        tag: Its domain, for routing; ``None``: none.
        place: Where it was found.
    """

    pieces: tuple[tuple[str, bool], ...] = ()
    messages: tuple[Message, ...] = ()
    first: int = 0
    tag: str | None = None
    place: Place = ("data", "row", 0)

    @property
    def texts(self) -> list[str]:
        """Everything written in it, for training a tokenizer."""
        return [text for text, _ in self.pieces] or [str(m.get("content") or "") for m in self.messages]


@dataclass(frozen=True)
class Fields:
    """Which columns of a table are what; ``None``: the column of that name, if it is there.

    A column is a name, or text with names in braces: ``"{instruction}\\n\\n{input}"``.

    Args:
        text: Plain text, all of it learned.
        prompt, completion: A completion is learned, its prompt is not. Both texts, or lists of messages.
        messages: A conversation: a list of ``{"role": ..., "content": ...}``. Every turn of the assistant is learned.
        tag: The domain of a record.
        split: ``train``, ``validation`` or ``test``, where one table holds several.
        chat: Write a prompt and its completion as a conversation of two messages.
    """

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    tag: str | None = None
    split: str | None = None
    chat: bool = False

    def form(self, columns: Sequence[str], where: str) -> Form:
        """The form of records in a table with these columns.

        Raises:
            ConfigError: Options name two forms.
            DataError: None of the forms is there, or several are and no option chooses.
        """
        pair = self.prompt is not None or self.completion is not None
        said = {"text": self.text is not None, "prompt": pair, "messages": self.messages is not None}
        chosen = [kind for kind, named in said.items() if named]
        if len(chosen) > 1:
            raise ConfigError(f"records are {' or '.join(chosen)}", where=f"data.options.{chosen[0]}", found="both")
        if not chosen:
            chosen = [kind for kind, names in _FORMS.items() if set(names) <= set(columns)]
            if len(chosen) != 1:
                raise DataError(
                    "records can be read in several ways" if chosen else "these are no records of text",
                    where=where,
                    found=f"columns {', '.join(map(str, columns))}" if columns else "no columns",
                    wanted="text, or prompt and completion, or messages",
                    remedy="name the column: text: NAME, or prompt: NAME and completion: NAME, or messages: NAME",
                )
        kind = chosen[0]
        read = {name: column(getattr(self, name) or name, columns, where) for name in _FORMS[kind]}
        if self.tag is not None or "tag" in columns:
            read["tag"] = column(self.tag or "tag", columns, where)
        return Form(kind, read, self.chat)


@dataclass(frozen=True)
class Column:
    """How a field is read from a row: one column's value, or several filled into a text."""

    names: tuple[str, ...]
    text: str | None = None

    def __call__(self, row: Mapping[str, Any], place: Place) -> Any:
        for name in self.names:
            if name not in row:
                raise DataError(
                    "there is no such field",
                    where=said(place),
                    found=", ".join(map(str, row)) or "an empty record",
                    wanted=repr(name),
                    remedy=did_you_mean(name, map(str, row)),
                )
        if self.text is None:
            return row[self.names[0]]
        values = {name: "" if row[name] is None else row[name] for name in self.names}
        return self.text.format_map({name: text_of(value, place, name) for name, value in values.items()})


def column(spec: str, columns: Sequence[str], where: str) -> Column:
    """Read how a field is named: a column, or a text with columns in braces.

    >>> column("{a}: {b}", ["a", "b"], "x")({"a": "1", "b": "2"}, ("x", "row", 0))
    '1: 2'

    Raises:
        DataError: There is no such column.
        ConfigError: The braces hold something else than a name.
    """
    names: tuple[str, ...] = (spec,)
    text = None
    if spec not in columns and "{" in spec:
        try:
            found = [(name, form, conversion) for _, name, form, conversion in string.Formatter().parse(spec)]
        except ValueError as error:
            raise ConfigError(f"cannot be read: {error}", where="data.options", found=repr(spec)) from error
        names, text = tuple(dict.fromkeys(name for name, _, _ in found if name is not None)), spec
        odd = [n for n, form, conversion in found if n is not None and (not n.isidentifier() or form or conversion)]
        if odd or not names:
            raise ConfigError("braces hold the name of a column", where="data.options", found=repr(spec))
    for name in names:
        if name not in columns:
            raise DataError(
                "there is no such column",
                where=where,
                found=", ".join(map(str, columns)),
                wanted=repr(name),
                remedy=did_you_mean(name, map(str, columns)),
            )
    return Column(names, text)


@dataclass(frozen=True)
class Form:
    """One way to read records: its kind, and the columns of its fields."""

    kind: str
    columns: Mapping[str, Column]
    chat: bool

    def __call__(self, row: Mapping[str, Any], place: Place) -> Record:
        """Read one row.

        Raises:
            DataError: A field is missing, or is of another kind; the message names file, line and field.
        """
        tag = self.columns["tag"](row, place) if "tag" in self.columns else None
        known: dict[str, Any] = {"tag": None if tag is None else str(tag), "place": place}
        if self.kind == "text":
            return Record(((text_of(self.columns["text"](row, place), place, "text"), True),), **known)
        if self.kind == "messages":
            return Record(messages=conversation(self.columns["messages"](row, place), place, "messages"), **known)
        prompt, completion = (self.columns[name](row, place) for name in ("prompt", "completion"))
        if self.chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, str):
            told = text_of(prompt, place, "prompt"), text_of(completion, place, "completion")
            return Record(((told[0], False), (told[1], True)), **known)
        before = conversation(prompt, place, "prompt", answered=False)
        if isinstance(completion, str):
            completion = [{"role": ASSISTANT, "content": completion}]
        after = conversation(completion, place, "completion")
        return Record(messages=before + after, first=len(before), **known)


def text_of(value: Any, place: Place, field: str) -> str:
    """A text, or an error that says where something else stands."""
    if not isinstance(value, str):
        raise DataError(
            "this is no text",
            where=f"{said(place)}, field {field!r}",
            found="nothing" if value is None else type(value).__name__,
            wanted="a string",
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            "this text is broken: half of a surrogate pair",
            where=f"{said(place)}, field {field!r}",
            found=repr(value[max(0, error.start - 10) : error.start + 10]),
            remedy="write the file as UTF-8 again",
        ) from error
    return value


def conversation(value: Any, place: Place, field: str, *, answered: bool = True) -> tuple[Message, ...]:
    """Messages, or an error that says which of them is none.

    Args:
        value: What stands in the field.
        place: Where it stands.
        field: Its name.
        answered: At least one must be the assistant's.
    """

    def wrong(problem: str, found: object, wanted: str, number: int | None = None) -> DataError:
        message = "" if number is None else f", message {number + 1}"
        return DataError(problem, where=f"{said(place)}, field {field!r}{message}", found=found, wanted=wanted)

    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or not len(value):
        found = "an empty list" if isinstance(value, Sequence) and not len(value) else type(value).__name__
        raise wrong("this is no conversation", found, 'a list of {"role": ..., "content": ...}')
    for number, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise wrong("this is no message", type(message).__name__, '{"role": ..., "content": ...}', number)
        if not isinstance(message.get("role"), str):
            raise wrong("a message has a role", f"keys {', '.join(map(str, message))}", '"role": a string', number)
        content = message.get("content")
        if content is not None or message["role"] != ASSISTANT or not message.get("tool_calls"):
            text_of(content, place, f"{field}[{number}].content")
    if answered and not any(message["role"] == ASSISTANT for message in value):
        roles = ", ".join(dict.fromkeys(message["role"] for message in value))
        raise wrong("nobody answers", f"roles {roles}", f"a message of role {ASSISTANT!r}")
    return tuple({key: item for key, item in message.items() if item is not None} for message in value)


def said(place: Place) -> str:
    """A place in words.

    >>> said(("a.jsonl", "line", 3))
    'a.jsonl, line 3'
    """
    return f"{place[0]}, {place[1]} {place[2]}"

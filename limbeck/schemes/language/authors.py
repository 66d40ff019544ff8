"""Who writes for a scheme: a teacher behind an endpoint, or a model at hand; each answers once and keeps it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from torch import nn

from limbeck.core.errors import ConfigError
from limbeck.core.plain import canonical
from limbeck.data.language.corpus import encode
from limbeck.data.language.records import ASSISTANT, Record
from limbeck.data.language.rewritten import Ids, marked
from limbeck.data.language.tokens import Tokens
from limbeck.engine.identity import digest
from limbeck.models.generating import Decoding, endings
from limbeck.teachers.answers import Answer
from limbeck.teachers.questions import Prompt
from limbeck.teachers.routed import RoutedTeacher, TextTeacher
from limbeck.teachers.served import ServedTeacher
from limbeck.teachers.writer import ModelWriter

WRITTEN = "written"  # the folder in a run's folder that keeps what was written


class ModelAuthor:
    """A language model at hand that answers prompts as a ``ServedTeacher`` does; see :class:`ModelWriter`.

    Args:
        model: Of transformers.
        tokens: Its tokenizer.
        folder: Where answers are kept; ``None``: nowhere.
        chat: Prompts are put to it as a user's message, in its chat template; else it goes on with them as they stand.
        batch_size: Texts that are written at a time.
        seed: Of drawing, where a call names none.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: Tokens,
        *,
        folder: Path | None = None,
        chat: bool = False,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        self.model, self.tokens, self.folder = model, tokens, folder
        self.chat, self.batch_size, self.seed = chat, batch_size, seed
        self.asked = 0

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int,
        temperature: float = 1.0,
        n: int = 1,
        seed: int | None = None,
        **_: Any,
    ) -> list[list[Answer]]:
        """``n`` answers to each prompt, in the prompts' order; where chance has no part, so many times the same."""
        decoding = Decoding(max_tokens, float(temperature))
        writer = ModelWriter(
            self.model,
            decoding,
            ends=endings(self.tokens, self.model),
            pad=self.tokens.pad,
            folder=self.folder,
            identity=digest(self.model),
            batch_size=self.batch_size,
            seed=self.seed if seed is None else seed,
            decode=self.tokens.decode,
            draws=n if decoding.draws else 1,
        )
        found = writer.write([asked(self.tokens, prompt, self.chat) for prompt in prompts])
        self.asked += writer.asked
        times = 1 if decoding.draws else n
        return [
            [Answer(w.text or "", finish_reason="stop" if w.finished else "length") for w in row] * times
            for row in found
        ]

    def each(self, prompts: Sequence[Prompt], **settings: Any) -> Iterator[tuple[int, list[Answer]]]:
        """As :meth:`generate`, all at once."""
        yield from enumerate(self.generate(prompts, **settings))

    def stop(self) -> None:
        """There is nothing under way in other threads."""


def asked(tokens: Tokens, prompt: Prompt, chat: bool = False) -> Ids:
    """The tokens of a prompt as a model is asked with it.

    Args:
        tokens: Of the model.
        prompt: A text, or messages; with the last, if it is the assistant's, the answer is begun.
        chat: A text is put as a user's message, in the chat template.

    >>> from limbeck.data.language import ByteTokens
    >>> tokens = ByteTokens()
    >>> tokens.decode(asked(tokens, "Hi", chat=True)), tokens.decode(asked(tokens, "Hi"))
    ('user: Hiassistant: ', 'Hi')
    >>> tokens.decode(asked(tokens, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Oh,"}]))
    'user: Hiassistant: Oh,'
    """
    if isinstance(prompt, str) and not chat:
        return marked(tokens, prompt)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    begun = str(messages.pop()["content"]) if messages and messages[-1]["role"] == ASSISTANT else ""
    whole = Record(messages=(*messages, {"role": ASSISTANT, "content": "."}), first=len(messages))
    corpus = encode([whole], tokens)
    ids = corpus.ids[~corpus.learned.cummax(dim=0).values].tolist()
    return (*ids, *(tokens.continued([begun])[0][0].tolist() if begun else ()))


@contextlib.contextmanager
def author_of_texts(writer: Any, folder: Path | None, where: str = "scheme.writer") -> Iterator[TextTeacher]:
    """Who answers with texts: as given, or served teachers made of their arguments, and closed again.

    Args:
        writer: A ``TextTeacher``; the arguments of a ``ServedTeacher``; or ``{teachers: {TAG: ARGUMENTS}, default:
            TAG}``, which makes a ``RoutedTeacher`` of several.
        folder: Of the run; a served teacher keeps its record there unless its arguments say where.
        where: The option, for messages.

    Raises:
        ConfigError: No such options, or no place for the record.
    """
    if not isinstance(writer, Mapping):
        yield check_author(writer, where)
        return
    kept = None if folder is None else folder / WRITTEN
    with contextlib.ExitStack() as stack:
        several = writer.get("teachers")
        if not isinstance(several, Mapping):
            yield stack.enter_context(_served(writer, kept, where))
            return
        for option in writer.keys() - {"teachers", "default"}:
            raise ConfigError("no such option of several teachers", where=f"{where}.{option}", wanted="default")
        made = dict[str, Any]()
        for tag, options in several.items():
            place = None if kept is None else kept / quote(str(tag), safe="")
            made[tag] = stack.enter_context(_served(options, place, f"{where}.teachers.{tag}"))
        yield RoutedTeacher(made, writer.get("default"))


def _served(options: Any, folder: Path | None, where: str) -> Any:
    """A served teacher, made of its arguments."""
    if not isinstance(options, Mapping):
        raise ConfigError("these make no served teacher", where=where, found=type(options).__name__, wanted="arguments")
    if "record" not in options and folder is None:
        raise ConfigError(
            "what is paid for has to be kept somewhere",
            where=f"{where}.record",
            found="none, and the run has no folder",
            remedy="give out=..., or a folder for the record",
        )
    try:
        return ServedTeacher(**{"record": "" if folder is None else folder, **options})
    except TypeError as error:
        raise ConfigError("no such option of a served teacher", where=where, found=str(error)) from error


def told(
    author: TextTeacher, prompts: Sequence[Prompt], tags: Sequence[str | None] | None = None, **settings: Any
) -> list[list[Answer]]:
    """Answers to each prompt, in order; of several teachers the one answers that a prompt's tag names.

    Args:
        author: Who answers.
        prompts: What is asked; those that are equal, tag included, are asked once.
        tags: One for each prompt; ``None``: there are none.
        settings: ``max_tokens`` and more.
    """
    routed = isinstance(author, RoutedTeacher)
    named: Sequence[str | None] = tags if routed and tags is not None else [None] * len(prompts)
    rows = dict[str, int]()  # of each different question its first
    keys = [
        canonical([prompt if isinstance(prompt, str) else list(map(dict, prompt)), tag]).decode()
        for prompt, tag in zip(prompts, named, strict=True)
    ]
    for row, key in enumerate(keys):
        rows.setdefault(key, row)
    firsts = list(rows.values())
    asked_for = [prompts[row] for row in firsts]
    if isinstance(author, RoutedTeacher):
        found = author.generate(asked_for, [named[row] for row in firsts], **settings)
    else:
        found = author.generate(asked_for, **settings)
    answers = dict(zip(rows, found, strict=True))
    return [answers[key] for key in keys]


def check_author(writer: Any, where: str = "scheme.writer") -> Any:
    """An author as it is, or an error where it is none.

    Raises:
        ConfigError: It does not answer as a served teacher does.
    """
    if not isinstance(writer, (Mapping, TextTeacher)):
        wanted = "a ServedTeacher or its like, or its arguments"
        raise ConfigError("no such writer", where=where, found=type(writer).__name__, wanted=wanted)
    return writer

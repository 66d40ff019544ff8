"""Several teachers that answer with text, each for its part of the data."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from limbeck.core.errors import ConfigError, DataError, did_you_mean
from limbeck.teachers.answers import Answer
from limbeck.teachers.desk import terminable
from limbeck.teachers.questions import Prompt


@runtime_checkable
class TextTeacher(Protocol):
    """Anything that answers prompts as ``ServedTeacher`` does."""

    def generate(self, prompts: Sequence[Prompt], *, max_tokens: int, **settings: Any) -> list[list[Answer]]:
        """Answers to each prompt, in order."""

    def each(
        self, prompts: Sequence[Prompt], *, max_tokens: int, **settings: Any
    ) -> Iterator[tuple[int, list[Answer]]]:
        """The same as they come."""

    def stop(self) -> None:
        """End calls that run in other threads."""


class RoutedTeacher:
    """Gives each prompt to the teacher that its tag names; all teachers work at the same time.

    Args:
        teachers: A teacher for each tag; one teacher may stand under several.
        default: The tag whose teacher gets the prompts with other tags, or with none; ``None`` refuses them.

    Raises:
        ConfigError: There are no teachers, or the default is none of them.

    >>> class Fixed:
    ...     def __init__(self, text):
    ...         self.text = text
    ...     def each(self, prompts, *, max_tokens, **settings):
    ...         yield from ((place, [Answer(f"{self.text} {p}")]) for place, p in enumerate(prompts))
    ...     def generate(self, prompts, *, max_tokens, **settings):
    ...         return [found for _, found in self.each(prompts, max_tokens=max_tokens)]
    ...     def stop(self):
    ...         pass
    >>> teacher = RoutedTeacher({"math": Fixed("sum"), "code": Fixed("def")})
    >>> answers = teacher.generate(["a", "b", "c"], ["code", "math", "code"], max_tokens=4)
    >>> [answer.text for (answer,) in answers]
    ['def a', 'sum b', 'def c']
    """

    def __init__(self, teachers: Mapping[str, TextTeacher], default: str | None = None) -> None:
        if not teachers:
            raise ConfigError("there are no teachers", where="teachers", wanted="a teacher for each tag")
        for tag, teacher in teachers.items():
            if not isinstance(teacher, TextTeacher):
                raise ConfigError(
                    "not a teacher that answers with text",
                    where=f"teachers[{tag!r}]",
                    found=type(teacher).__name__,
                    wanted="an object with generate, each and stop, such as a ServedTeacher",
                )
        if default is not None and default not in teachers:
            raise ConfigError(
                "no such teacher",
                where="default",
                found=repr(default),
                wanted=" or ".join(map(repr, teachers)),
                remedy=did_you_mean(default, teachers),
            )
        self.teachers, self.default = dict(teachers), default

    def generate(
        self, prompts: Sequence[Prompt], tags: Sequence[str | None] | None = None, **settings: Any
    ) -> list[list[Answer]]:
        """Answers to each prompt, in the prompts' order.

        Args:
            prompts: As the teachers take them.
            tags: One for each prompt; ``None``: none has one, so that the default answers all of them.
            settings: Handed to every teacher: ``max_tokens`` and more.

        Raises:
            DataError: A tag names no teacher.
            LimbeckError: What a teacher raises ends the call; the others keep what is under way.
        """
        answers: list[list[Answer]] = [[] for _ in prompts]
        for place, found in self.each(prompts, tags, **settings):
            answers[place] = found
        return answers

    def each(
        self, prompts: Sequence[Prompt], tags: Sequence[str | None] | None = None, **settings: Any
    ) -> Iterator[tuple[int, list[Answer]]]:
        """As :meth:`generate`, but yields (place, answers) of each prompt as they come."""
        routes = self._routes(prompts, [None] * len(prompts) if tags is None else tags)
        return self._run({tag: (rows, [prompts[row] for row in rows]) for tag, rows in routes.items()}, settings)

    def stop(self) -> None:
        """End calls that run in other threads."""
        for teacher in self.teachers.values():
            teacher.stop()

    def _routes(self, prompts: Sequence[Prompt], tags: Sequence[str | None]) -> dict[str, list[int]]:
        if len(prompts) != len(tags):
            raise DataError("every prompt needs a tag", where="tags", found=len(tags), wanted=len(prompts))
        routes: dict[str, list[int]] = {}
        for row, tag in enumerate(tags):
            route = tag if tag is not None and tag in self.teachers else self.default
            if route is None:
                near = None if tag is None else did_you_mean(tag, self.teachers)
                raise DataError(
                    "no teacher has this tag",
                    where=f"tags[{row}]",
                    found=repr(tag),
                    wanted=" or ".join(map(repr, self.teachers)),
                    remedy=near or "name a default to take all other prompts",
                )
            routes.setdefault(route, []).append(row)
        return routes

    def _run(
        self, routes: dict[str, tuple[list[int], list[Prompt]]], settings: dict[str, Any]
    ) -> Iterator[tuple[int, list[Answer]]]:
        said: queue.Queue[tuple[int, list[Answer]] | BaseException | None] = queue.Queue(maxsize=256)

        def drive(tag: str) -> None:
            rows, prompts = routes[tag]
            try:
                for place, answers in self.teachers[tag].each(prompts, **settings):
                    said.put((rows[place], answers))
                said.put(None)
            except BaseException as error:
                said.put(error)

        threads = [threading.Thread(target=drive, args=(tag,), name=f"limbeck-{tag}") for tag in routes]
        running = len(threads)
        with terminable():
            try:
                for thread in threads:
                    thread.start()
                while running:
                    item = said.get()
                    if isinstance(item, BaseException):
                        raise item
                    if item is None:
                        running -= 1
                    else:
                        yield item
            finally:
                self._end(threads, said)

    def _end(self, threads: list[threading.Thread], said: queue.Queue[Any]) -> None:
        """Stop the teachers that still work, and await what is under way."""
        while any(thread.is_alive() for thread in threads):
            self.stop()
            while not said.empty():
                said.get_nowait()
            for thread in threads:
                if thread.ident is not None:
                    thread.join(0.02)

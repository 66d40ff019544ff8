"""A teacher that labels texts by what it writes: asked once, read by a parser, and believed by a share of its votes."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from limbeck.core.errors import ConfigError
from limbeck.core.reduction import check_inside
from limbeck.data.language.loader import LanguageLoader
from limbeck.schemes.language.authors import WRITTEN, ModelAuthor, author_of_texts, told
from limbeck.schemes.language.writing import author_of
from limbeck.schemes.scheme import Cast
from limbeck.teachers.routed import TextTeacher

Item = TypeVar("Item")


class Asks:
    """How a teacher is asked.

    Args:
        writer: Who answers: a ``ServedTeacher`` or its like, or its arguments; ``None``: the teacher, a model at hand.
        samples: Answers to each prompt.
        agree: An item is believed where so large a share of the answers has it.
        temperature: Of several samples; one is the likeliest.
        tokens: Of an answer at most.
        chat: A teacher at hand is asked in its chat template.
        batch_size: Texts that a teacher at hand writes at a time.

    Raises:
        ConfigError: Numbers that cannot be.
    """

    def __init__(
        self,
        writer: Any = None,
        samples: int = 1,
        agree: float = 0.5,
        temperature: float = 1.0,
        tokens: int = 256,
        chat: bool = False,
        batch_size: int = 16,
    ) -> None:
        for name, value in (("samples", samples), ("tokens", tokens), ("batch_size", batch_size)):
            if value < 1:
                raise ConfigError("must be 1 or more", where=f"scheme.{name}", found=value)
        check_inside(agree, "scheme.agree", closed=True)
        self.writer, self.samples, self.agree, self.tokens = writer, samples, agree, tokens
        self.temperature, self.chat, self.batch_size = temperature if samples > 1 else 0.0, chat, batch_size

    def check(self, cast: Cast) -> None:
        """Refuse a teacher that cannot write."""
        if self.writer is None:
            author_of(cast.need_teacher("texts are annotated by"), "teacher")

    @contextlib.contextmanager
    def author(self, cast: Cast, loader: LanguageLoader) -> Iterator[TextTeacher]:
        """Who answers."""
        if self.writer is not None:
            with author_of_texts(self.writer, cast.folder) as author:
                yield author
            return
        model = author_of(cast.need_teacher("texts are annotated by"), "teacher").to(loader.device)
        yield ModelAuthor(
            model,
            loader.split.teacher_tokens or loader.split.tokens,
            folder=None if cast.folder is None else cast.folder / WRITTEN,
            chat=self.chat,
            batch_size=self.batch_size,
            seed=cast.seed,
        )

    def items(
        self, author: TextTeacher, prompts: Sequence[str], read: Callable[[str], Sequence[Item] | None], seed: int = 0
    ) -> list[list[Item] | None]:
        """What is believed of the answers to each prompt, in the order in which it was said first.

        Args:
            author: Who answers.
            prompts: What is asked.
            read: Items of an answer; ``None`` where it cannot be read.
            seed: Of drawing.

        Returns:
            Items, which may be none; ``None`` where no answer could be read.
        """
        settings: dict[str, Any] = {"max_tokens": self.tokens, "temperature": self.temperature, "n": self.samples}
        answers = told(author, prompts, seed=seed, **settings)
        return [believed([read(answer.text) for answer in several], self.agree) for several in answers]


def believed(answers: Sequence[Sequence[Item] | None], agree: float) -> list[Item] | None:
    """Items that a large enough share of those answers has that could be read.

    >>> believed([["a", "b"], ["a"], ["a", "c"], None], 0.5), believed([None], 0.5)
    (['a'], None)
    """
    readable = [list(dict.fromkeys(answer)) for answer in answers if answer is not None]
    if not readable:
        return None
    votes = Counter(item for answer in readable for item in answer)
    return [item for item, count in votes.items() if count >= agree * len(readable)]

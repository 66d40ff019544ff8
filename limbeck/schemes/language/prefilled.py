"""Texts of a kind that data lack, by a writer whose answer has been begun for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from limbeck.core.errors import ConfigError
from limbeck.core.reduction import check_positive
from limbeck.schemes.language.authors import told
from limbeck.teachers.questions import Prompt
from limbeck.teachers.routed import TextTeacher

#: With these vLLM and its like go on with the last message, where they would begin a new one.
GOES_ON = {"continue_final_message": True, "add_generation_prompt": False}


@dataclass(frozen=True)
class Prefilled:
    """How texts are asked for.

    Args:
        ask: What the writer is asked.
        prefix: How its answer begins; it goes on from there.
        chat: Ask in messages, the last of which is begun; else in one text.
        number: Of texts that are drawn.
        temperature: At which.
        tokens: Of a text at most.
        extra: Fields of a request to a served teacher that make it go on with a message that is begun.

    Raises:
        ConfigError: Numbers that cannot be.
    """

    ask: str
    prefix: str = ""
    chat: bool = True
    number: int = 1000
    temperature: float = 1.0
    tokens: int = 128
    extra: dict[str, Any] = field(default_factory=lambda: dict(GOES_ON))

    def __post_init__(self) -> None:
        for name in ("number", "tokens"):
            if getattr(self, name) < 1:
                raise ConfigError("must be 1 or more", where=f"scheme.{name}", found=getattr(self, name))
        check_positive(self.temperature, "scheme.temperature")
        if not self.ask.strip():
            raise ConfigError("nothing is asked", where="scheme.ask", found=repr(self.ask))

    @property
    def prompt(self) -> Prompt:
        """What is sent."""
        if not self.chat:
            return f"{self.ask}\n{self.prefix}"
        begun = [{"role": "assistant", "content": self.prefix}] if self.prefix else []
        return [{"role": "user", "content": self.ask}, *begun]

    def texts(self, author: TextTeacher, seed: int = 0) -> tuple[list[str], dict[str, int]]:
        """What was written, each text once, and how many were left out.

        Args:
            author: Who writes.
            seed: Of drawing.
        """
        settings: dict[str, Any] = {"max_tokens": self.tokens, "temperature": self.temperature, "seed": seed}
        if self.chat and self.prefix:
            settings["extra"] = dict(self.extra)
        (answers,) = told(author, [self.prompt], n=self.number, **settings)
        said = [answer.text.strip().removeprefix(self.prefix).strip() for answer in answers]
        full = [text for text in said if text]
        kept = list(dict.fromkeys(full))
        return kept, {"drawn": len(said), "empty": len(said) - len(full), "twice": len(full) - len(kept)}


def responses(author: TextTeacher, texts: Sequence[str], template: str, tokens: int, seed: int = 0) -> list[str]:
    """What is answered to each text, drawn at temperature 1.

    Args:
        author: Who answers.
        texts: To what.
        template: The prompt, with ``{text}``.
        tokens: Of an answer at most.
        seed: Of drawing.
    """
    prompts = [template.replace("{text}", text) for text in texts]
    found = told(author, prompts, max_tokens=tokens, temperature=1.0, seed=seed) if prompts else []
    return [answer.text.strip() for (answer, *_) in found]

"""A question as it is sent, and the key under which its answer is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from limbeck.core.errors import ConfigError

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]
Api = Literal["chat", "completions"]

_FORMAT = 1
_TEMPLATE, _PER_MESSAGE = 256, 16  # tokens that a chat template may add: once (a system prompt of its own), per message
_OURS = ("model", "messages", "prompt", "n", "stream", "echo", "best_of", "logprobs", "top_logprobs", "seed")


@dataclass(frozen=True)
class Question:
    """One request for one answer.

    Args:
        api: The endpoint it goes to.
        request: All that determines the answer: the api, the body of the request, the model's revision and which
            sample it is. Its hash is the key.
        prompt_tokens: The most tokens its prompt can have.
        max_tokens: The most tokens its answer can have.
        scored: The text whose tokens are scored, where nothing is generated.
    """

    api: Api
    request: dict[str, Any]
    prompt_tokens: int
    max_tokens: int
    scored: str | None = None

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        return self.request["body"]

    @property
    def key(self) -> str:
        """Names the answer: the first half of the SHA-256 of the request."""
        text = json.dumps(self.request, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode("ascii")).hexdigest()[:32]


@dataclass(frozen=True)
class Asking:
    """How a teacher turns prompts into questions.

    Args:
        model: The model's name.
        api: Where prompts go.
        revision: Tells two models apart that are served under one name.
        length_option: What the endpoint calls the most tokens of an answer.
        count_tokens: Gives the most tokens that a prompt can have.
    """

    model: str
    api: Api
    revision: str = ""
    length_option: str = "max_tokens"
    count_tokens: Callable[[Prompt], int] | None = None

    def questions(
        self,
        prompt: Prompt,
        *,
        n: int,
        max_tokens: int,
        temperature: float,
        top_p: float,
        stop: str | Sequence[str] | None,
        top_logprobs: int | None,
        seed: int | None,
        extra: Mapping[str, Any] | None,
    ) -> list[Question]:
        """The ``n`` questions that a prompt comes to, one for each sample."""
        body: dict[str, Any] = {"model": self.model, **self._said(prompt)}
        body |= {self.length_option: max_tokens, "temperature": float(temperature), "top_p": float(top_p)}
        if stop is not None:
            body["stop"] = [stop] if isinstance(stop, str) else list(stop)
        if top_logprobs is not None:
            body |= (
                {"logprobs": True, "top_logprobs": top_logprobs} if self.api == "chat" else {"logprobs": top_logprobs}
            )
        body |= extra or {}
        size = self.size(prompt)
        return [
            Question(
                api=self.api,
                request=self._request(body if seed is None else {**body, "seed": seed + sample}, sample),
                prompt_tokens=size,
                max_tokens=max_tokens,
            )
            for sample in range(n)
        ]

    def scoring(self, text: str, top_logprobs: int) -> Question:
        """The question what the model makes of a given text."""
        body = {"model": self.model, "prompt": text, "max_tokens": 0, "echo": True, "logprobs": top_logprobs}
        # Some servers generate one token all the same, and charge for it.
        return Question("completions", self._request(body, 0), self.size(text), 1, scored=text)

    def size(self, prompt: Prompt) -> int:
        """The most tokens a prompt can have.

        No tokenizer in use makes more tokens than a text has bytes, save for those that a template adds.

        >>> Asking("m", "completions").size("abc")
        19
        """
        if self.count_tokens is not None:
            return int(self.count_tokens(prompt))
        if isinstance(prompt, str):
            length = len(prompt.encode())
            return length + (_PER_MESSAGE if self.api == "completions" else _TEMPLATE + _PER_MESSAGE)
        texts = "".join(json.dumps(dict(message), ensure_ascii=False) for message in prompt)
        return len(texts.encode()) + _TEMPLATE + _PER_MESSAGE * len(prompt)

    def _said(self, prompt: Prompt) -> dict[str, Any]:
        if isinstance(prompt, str):
            alone = [{"role": "user", "content": prompt}]
            return {"messages": alone} if self.api == "chat" else {"prompt": prompt}
        if self.api == "completions":
            raise ConfigError(
                "messages cannot be completed",
                where="prompts",
                found="a list of messages",
                wanted="texts",
                remedy="set api='chat', or apply the tokenizer's chat template first",
            )
        return {"messages": [dict(message) for message in prompt]}

    def _request(self, body: dict[str, Any], sample: int) -> dict[str, Any]:
        return {"format": _FORMAT, "revision": self.revision, "sample": sample, "body": body}


def check_prompt(prompt: object, index: int) -> None:
    """A prompt is a text or a list of messages.

    Raises:
        ConfigError: It is not.
    """
    if isinstance(prompt, str):
        _check_text(prompt, index)
        return
    listed = isinstance(prompt, Sequence) and bool(prompt)
    if not listed or not all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in prompt):  # type: ignore[attr-defined]
        raise ConfigError(
            "not a prompt",
            where=f"prompts[{index}]",
            found=repr(prompt)[:80],
            wanted="a text, or a list of messages such as {'role': 'user', 'content': 'Hello'}",
        )
    try:
        text = json.dumps([dict(m) for m in prompt], allow_nan=False, ensure_ascii=False)  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "a message holds what JSON cannot", where=f"prompts[{index}]", found=str(error), wanted="texts and numbers"
        ) from error
    _check_text(text, index)


def _check_text(text: str, index: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            "a text that cannot be sent",
            where=f"prompts[{index}]",
            found=f"half of a surrogate pair, {text[error.start]!a}",
            remedy="decode the data with errors='replace'",
        ) from error


def check_settings(settings: Mapping[str, Any], length_option: str) -> None:
    """Sampling settings are in their ranges.

    Raises:
        ConfigError: One is not.
    """
    bounds: dict[str, tuple[float, float]] = {
        "n": (1, float("inf")),
        "max_tokens": (1, float("inf")),
        "temperature": (0, float("inf")),
        "top_p": (1e-12, 1),
        "top_logprobs": (0, float("inf")),
    }
    whole = ("n", "max_tokens", "top_logprobs", "seed")
    for name, value in settings.items():
        least, most = bounds.get(name, (-float("inf"), float("inf")))
        if name in ("stop", "extra") or (value is None and name in ("top_logprobs", "seed")):
            continue
        wrong = isinstance(value, bool) or not isinstance(value, int if name in whole else (int, float))
        if wrong or not least <= value <= most or value == float("inf"):
            kind = "a whole number" if name in whole else "a number"
            high = "" if most == float("inf") else f", at most {most:g}"
            low = "" if least == -float("inf") else f", at least {least:g}" if least >= 1 or not least else ", above 0"
            raise ConfigError("out of range", where=name, found=repr(value), wanted=f"{kind}{low}{high}")
    extra = settings.get("extra") or {}
    taken = [name for name in extra if name in (*_OURS, length_option, "temperature", "top_p", "stop")]
    if taken:
        raise ConfigError(
            "this option is not an extra one",
            where=f"extra.{taken[0]}",
            found=repr(extra[taken[0]]),
            remedy="use the argument of the call; several samples come with n",
        )
    try:
        json.dumps(dict(extra), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "JSON cannot hold this", where="extra", found=str(error), wanted="texts and numbers"
        ) from error

"""A teacher that vLLM runs in this process: the face of ``ServedTeacher`` without server, price or record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from limbeck.core.errors import ConfigError, MissingExtra
from limbeck.teachers.answers import Answer, Token, Usage
from limbeck.teachers.questions import Api, Prompt, check_prompt, check_settings


class VllmTeacher:
    """Answers prompts with a model that vLLM loads here.

    Args:
        model: A folder or a name on the hub.
        api: ``"chat"`` (the tokenizer's chat template is applied) or ``"completions"``.
        batch: How many prompts are handed to vLLM at a time; it plans among them itself.
        engine: Arguments of ``vllm.LLM``, such as ``tensor_parallel_size=2``. ``max_logprobs`` there bounds
            ``top_logprobs``.

    Raises:
        MissingExtra: vLLM is not installed.
    """

    def __init__(self, model: str, *, api: Api = "chat", batch: int = 1024, **engine: Any) -> None:
        if api not in ("chat", "completions"):
            raise ConfigError("no such endpoint", where="api", found=repr(api), wanted="'chat' or 'completions'")
        try:
            import vllm
        except ImportError as error:
            raise MissingExtra("vllm", extra="vllm") from error
        self.model, self.api, self.batch, self.asked = model, api, batch, 0
        self._vllm, self._engine = vllm, vllm.LLM(model=model, **engine)

    def generate(self, prompts: Sequence[Prompt], *, max_tokens: int, **settings: Any) -> list[list[Answer]]:
        """``n`` answers to each prompt, in order; settings as in ``ServedTeacher.generate``."""
        return [answers for _, answers in self.each(prompts, max_tokens=max_tokens, **settings)]

    def each(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        n: int = 1,
        stop: str | Sequence[str] | None = None,
        top_logprobs: int | None = None,
        seed: int | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Iterator[tuple[int, list[Answer]]]:
        """As :meth:`generate`, but yields (place, answers); they come batch by batch."""
        settings = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "n": n, "seed": seed}
        check_settings({**settings, "top_logprobs": top_logprobs, "extra": extra}, "max_tokens")
        for index, prompt in enumerate(prompts):
            check_prompt(prompt, index)
            if self.api == "completions" and not isinstance(prompt, str):
                raise ConfigError(
                    "messages cannot be completed", where=f"prompts[{index}]", wanted="a text, or api='chat'"
                )
        options = self._vllm.SamplingParams(**settings, stop=stop, logprobs=top_logprobs, **(extra or {}))
        for first in range(0, len(prompts), self.batch):
            part = prompts[first : first + self.batch]
            if self.api == "chat":
                talks = [[{"role": "user", "content": p}] if isinstance(p, str) else list(p) for p in part]
                replies = self._engine.chat(talks, options, use_tqdm=False)
            else:
                replies = self._engine.generate(list(part), options, use_tqdm=False)
            for place, reply in enumerate(replies, first):
                self.asked += len(reply.outputs)
                size = len(reply.prompt_token_ids or ())
                yield place, [_answer(output, size, top_logprobs, self.model) for output in reply.outputs]

    def stop(self) -> None:
        """Nothing: a batch that vLLM works on cannot be stopped."""


def _answer(output: Any, prompt_tokens: int, top: int | None, model: str) -> Answer:
    tokens = None
    if top is not None and output.logprobs is not None:
        tokens = tuple(_token(i, row, top) for i, row in zip(output.token_ids, output.logprobs, strict=True))
    usage = Usage(prompt_tokens, len(output.token_ids))
    return Answer(output.text, tokens, output.finish_reason, usage, model=model)


def _token(chosen: int, row: Mapping[int, Any], top: int) -> Token:
    """vLLM names the likeliest tokens, and the chosen one where it is none of them."""
    likeliest = sorted(row.values(), key=lambda entry: -entry.logprob)[:top]
    rivals = tuple(Token(entry.decoded_token or "", entry.logprob) for entry in likeliest)
    return Token(row[chosen].decoded_token or "", row[chosen].logprob, rivals)

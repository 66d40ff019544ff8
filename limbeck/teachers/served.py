"""A teacher behind an OpenAI-compatible endpoint.

Every answer is on disk before it is handed out, and none is asked twice:

>>> import http.server, json, tempfile, threading
>>> class Loud(http.server.BaseHTTPRequestHandler):
...     def do_POST(self):
...         request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
...         message = {"content": request["messages"][0]["content"].upper()}
...         reply = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()
...         self.send_response(200)
...         self.send_header("Content-Length", str(len(reply)))
...         self.end_headers()
...         self.wfile.write(reply)
...     def log_message(self, *_):
...         pass
>>> server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Loud)
>>> threading.Thread(target=server.serve_forever, daemon=True).start()
>>> folder = tempfile.TemporaryDirectory()
>>> teacher = ServedTeacher(f"http://127.0.0.1:{server.server_port}/v1", "loud", record=folder.name, key_env=None)
>>> [answer.text for (answer,) in teacher.generate(["hello", "world"], max_tokens=8)]
['HELLO', 'WORLD']
>>> server.shutdown()
>>> server.server_close()
>>> [answer.text for (answer,) in teacher.generate(["world"], max_tokens=8)]  # the server is gone, the record is not
['WORLD']
>>> teacher.asked, teacher.reused
(2, 1)
>>> teacher.close()
>>> folder.cleanup()
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from types import TracebackType
from typing import Any

from limbeck.core.errors import ConfigError
from limbeck.teachers.answers import Answer
from limbeck.teachers.desk import Counts, Desk, Progress
from limbeck.teachers.endpoint import Endpoint
from limbeck.teachers.limits import Limits, Money, Patience, check_amount
from limbeck.teachers.questions import Api, Asking, Prompt, Question, check_prompt, check_settings
from limbeck.teachers.record import Record
from limbeck.teachers.rounds import Round


class ServedTeacher:
    """Answers prompts by asking an endpoint, and never asks what its record can answer.

    One request is sent for each sample, since few servers but OpenAI's know ``n``. Answers are kept under a hash of
    all that determines them: the request's body (model, prompt, settings, seed), the sample's number and ``revision``.
    The address is left out, so a server may move; two models that are served under one name need a ``revision`` each.

    Several processes may use one record at once (see ``Record`` for what is guaranteed); rate limits hold for each
    teacher, the cap for the record. After Ctrl-C or SIGTERM, answers that are under way are awaited and kept.

    Args:
        base_url: Such as ``"https://api.openai.com/v1"`` or ``"http://localhost:8000/v1"``.
        model: The name the server knows it by.
        record: Folder that keeps the answers. It holds prompts and answers as plain text, and no key.
        key_env: Name of the environment variable with the API key; ``None`` for a server that needs none.
        api: ``"chat"`` (a text becomes one user message) or ``"completions"`` (a text is gone on with as it stands).
        requests_per_minute: The server's limit; by default none.
        tokens_per_minute: The same for tokens of prompts and answers together.
        concurrency: How many requests are under way at a time.
        cap: The most the record may cost, in the currency of ``prices``, all its runs and processes together. Before a
            request is sent the most it can cost is set aside, and connections that broke count with the most they can
            have cost, so it is not exceeded.
        prices: For a million tokens of prompts, and of answers.
        timeout: Seconds to wait for a connection, and for each next piece of a reply.
        attempts: The most attempts for one prompt. Made again: no connection, no reply in time, replies cut short,
            HTTP 408, 425, 429 and 5xx. Any other error ends the call at once with the server's words.
        patience: The most seconds from the first attempt to the last.
        backoff: First and longest of the upper bounds between which waits are drawn (see ``Patience``).
        revision: See above.
        length_option: What the endpoint calls ``max_tokens``; newer models of OpenAI want
            ``"max_completion_tokens"``.
        count_tokens: The most tokens a prompt can have; by default its bytes, with room for the server's template.
        headers: Sent with every request.
        seed: Of the waits between attempts.
        progress: Called with a ``Progress`` whenever a prompt is answered.

    Raises:
        ConfigError: An argument is wrong.
        DataError: The record is damaged.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        record: str | Path,
        key_env: str | None = "OPENAI_API_KEY",
        api: Api = "chat",
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        concurrency: int = 8,
        cap: float | None = None,
        prices: tuple[float, float] | None = None,
        timeout: float = 60.0,
        attempts: int = 8,
        patience: float = 900.0,
        backoff: tuple[float, float] = (1.0, 60.0),
        revision: str = "",
        length_option: str = "max_tokens",
        count_tokens: Callable[[Prompt], int] | None = None,
        headers: Mapping[str, str] | None = None,
        seed: int = 0,
        progress: Callable[[Progress], object] | None = None,
    ) -> None:
        if api not in ("chat", "completions"):
            raise ConfigError("no such endpoint", where="api", found=repr(api), wanted="'chat' or 'completions'")
        for name, value in (("timeout", timeout), ("concurrency", concurrency)):
            check_amount(name, value, above_zero=True)
        self.model, self.api = model, api
        self._asking = Asking(model, api, revision, length_option, count_tokens)
        self._desk = Desk(
            endpoint=Endpoint(base_url, key_env, timeout, headers),
            record=Record(record),
            limits=Limits(requests_per_minute, tokens_per_minute),
            money=Money(prices, cap),
            patience=Patience(attempts, patience, *backoff, seed),
            concurrency=concurrency,
            counts=Counts(),
            progress=progress,
        )
        self._rounds: set[Round] = set()

    def __repr__(self) -> str:
        return f"ServedTeacher({self._desk.endpoint.name!r}, {self.model!r}, record={str(self.record.folder)!r})"

    def __enter__(self) -> ServedTeacher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def record(self) -> Record:
        """Every answer so far."""
        return self._desk.record

    @property
    def spent(self) -> float:
        """What the record has cost so far: what the cap is held against."""
        return self.record.spent

    @property
    def asked(self) -> int:
        """Answers that the server gave to this teacher."""
        return self._desk.counts.asked

    @property
    def reused(self) -> int:
        """Answers that this teacher found in the record."""
        return self._desk.counts.reused

    def generate(
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
    ) -> list[list[Answer]]:
        """``n`` answers to each prompt, in the prompts' order.

        Two equal prompts get the same answers; for several answers to one prompt there is ``n``.

        Args:
            prompts: Texts, or lists of messages such as ``{"role": "user", "content": "Hello"}``.
            max_tokens: The most tokens of an answer.
            temperature: The default, 1, samples from the model's own distribution.
            top_p: The default, 1, cuts nothing off.
            n: Samples of each prompt.
            stop: Texts at which an answer ends.
            top_logprobs: How many of the likeliest tokens to tell at each place. Where the server does not offer them
                ``Answer.tokens`` is ``None``; a server may also refuse.
            seed: The first sample's; sample ``i`` is asked with ``seed + i``.
            extra: More options of the request's body, such as ``{"top_k": 50}``.

        Raises:
            EndpointError: The server refuses a prompt, or stays silent for too long.
            CapReached: The next prompt could cost more than the cap allows.
            ConfigError: A setting is wrong, or there is no API key.
            DataError: The record is damaged or cannot be written.
        """
        answers: list[list[Answer]] = [[] for _ in prompts]
        for place, found in self.each(
            prompts,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            n=n,
            stop=stop,
            top_logprobs=top_logprobs,
            seed=seed,
            extra=extra,
        ):
            answers[place] = found
        return answers

    def each(
        self,
        prompts: Iterable[Prompt],
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
        """As :meth:`generate`, but takes prompts as it goes, and yields (place, answers) of each as they come."""
        settings: dict[str, Any] = {
            "n": n,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "stop": stop,
        }
        settings |= {"top_logprobs": top_logprobs, "seed": seed, "extra": extra}
        check_settings(settings, self._asking.length_option)
        if isinstance(prompts, (str, Mapping)):
            raise ConfigError(
                "not a list of prompts", where="prompts", found=repr(prompts)[:80], wanted="[prompt, ...]"
            )
        total = len(prompts) if isinstance(prompts, Sized) else None

        def questions() -> Iterator[list[Question]]:
            for index, prompt in enumerate(prompts):
                check_prompt(prompt, index)
                yield self._asking.questions(prompt, **settings)

        return self._run(questions(), total)

    def score(self, texts: Sequence[str], *, top_logprobs: int = 0) -> list[Answer]:
        """What the model makes of given texts: the log-probability of every token, and its likeliest rivals.

        Needs a server whose completions endpoint knows ``echo`` together with ``logprobs``, such as vLLM.

        Args:
            texts: Each is one answer's ``text``; its first token follows nothing, so its ``logprob`` is ``None``.
            top_logprobs: How many of the likeliest tokens to tell at each place.

        Raises:
            EndpointError: The server does not score texts, or stays silent for too long.
        """
        check_settings({"top_logprobs": top_logprobs}, self._asking.length_option)
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise ConfigError("not a text", where=f"texts[{index}]", found=type(text).__name__, wanted="str")
            check_prompt(text, index)
        answers: list[Answer | None] = [None] * len(texts)
        for place, (answer,) in self._run(iter([self._asking.scoring(t, top_logprobs)] for t in texts), len(texts)):
            answers[place] = answer
        return [answer for answer in answers if answer is not None]

    def stop(self) -> None:
        """End calls that run in other threads: they ask no more, keep what is under way and raise ``Stopped``."""
        for running in list(self._rounds):
            running.stop.set()

    def close(self) -> None:
        """Let go of connections and of the record; a later call takes them up again."""
        self._desk.endpoint.close()
        self.record.close()

    def _run(self, questions: Iterator[list[Question]], total: int | None) -> Iterator[tuple[int, list[Answer]]]:
        running = Round(self._desk, questions, total)
        self._rounds.add(running)
        try:
            with contextlib.closing(running.run()) as answers:
                yield from answers
        finally:
            self._rounds.discard(running)

"""Speaks to an OpenAI-compatible endpoint, one attempt at a time."""

from __future__ import annotations

import email.utils
import os
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from limbeck.core.errors import ConfigError, MissingExtra
from limbeck.teachers.answers import Answer
from limbeck.teachers.errors import EndpointError
from limbeck.teachers.questions import Question
from limbeck.teachers.replies import BadReply, Refusal, read_reply

_AGAIN = (408, 425, 429)  # of the client errors, those that may pass by themselves
_UNSENT = ("ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError")


class Failure(Exception):
    """An attempt that failed, and may succeed when it is made again.

    Args:
        reason: What happened.
        charged: The server may charge for it all the same.
        wait: Seconds after which the server wishes to be asked again.
    """

    def __init__(self, reason: str, charged: bool = False, wait: float | None = None) -> None:
        self.reason, self.charged, self.wait = reason, charged, wait
        super().__init__(reason)


class Endpoint:
    """One endpoint of an OpenAI-compatible server, asked through the ``openai`` library, whose own retries are off.

    Args:
        base_url: Such as ``"http://localhost:8000/v1"``.
        key_env: Name of the environment variable that holds the API key; ``None`` where none is needed.
        timeout: Seconds to wait for a connection, and for each next piece of a reply.
        headers: Sent with every request.
    """

    def __init__(self, base_url: str, key_env: str | None, timeout: float, headers: Mapping[str, str] | None) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                "not an address", where="base_url", found=repr(base_url), wanted="such as 'http://localhost:8000/v1'"
            )
        port = f":{parts.port}" if parts.port else ""
        self.name = f"{parts.scheme}://{parts.hostname}{port}{parts.path}"  # no user name, password or query
        self._base_url, self._key_env, self._timeout, self._headers = base_url, key_env, timeout, headers
        self._client: Any = None
        self._key = ""

    def connect(self) -> None:
        """Make the client; done with the first question that the record cannot answer.

        Raises:
            MissingExtra: The ``openai`` package is not there.
            ConfigError: The environment variable of the key is not set.
        """
        if self._client is not None:
            return
        try:
            import openai
        except ImportError as error:
            raise MissingExtra("openai", extra="served") from error
        if self._key_env is not None:
            self._key = os.environ.get(self._key_env, "").strip()
            if not self._key:
                raise ConfigError(
                    "there is no API key",
                    where="key_env",
                    found=f"the environment variable {self._key_env} is not set",
                    remedy=f"set {self._key_env}, or give key_env=None to a server that needs no key",
                )
        self._client = openai.OpenAI(
            base_url=self._base_url,
            api_key=self._key or "none",
            timeout=self._timeout,
            max_retries=0,
            default_headers=dict(self._headers or {}),
        )

    def close(self) -> None:
        """Close its connections."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def ask(self, question: Question) -> Answer:
        """Make one attempt.

        Raises:
            Failure: It failed, and may succeed later.
            EndpointError: The server refuses.
        """
        import openai

        self.connect()
        body = dict(question.body)
        main = {"model": body.pop("model")}
        kind = self._client.chat.completions if question.api == "chat" else self._client.completions
        said = "messages" if question.api == "chat" else "prompt"
        main[said] = body.pop(said)
        try:
            reply = kind.with_raw_response.create(**main, extra_body=body)
            return read_reply(reply.http_response.content, question)
        except openai.APIStatusError as error:
            raise self._status(error.status_code, _message(error), error.response.headers) from error
        except openai.APITimeoutError as error:
            sent = type(error.__cause__).__name__ not in _UNSENT
            raise Failure(f"no reply within {self._timeout:g} s", charged=sent) from error
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            text = f"{type(cause).__name__}: {cause}".rstrip(": ")
            raise Failure(self._hide(text), charged=type(cause).__name__ not in _UNSENT) from error
        except BadReply as error:
            raise Failure(str(error), charged=True) from error
        except Refusal as error:
            raise self._status(error.code or 500, error.message, {}, charged=True) from error

    def _status(
        self, code: int, message: str, headers: Mapping[str, str], charged: bool = False
    ) -> Failure | EndpointError:
        message = self._hide(" ".join(message.split())[:300])
        empty = code == 429 and "insufficient_quota" in message
        if code >= 500 or (code in _AGAIN and not empty):
            wait = retry_after(headers)
            wish = f", to be asked again in {wait:g} s" if wait else ""
            return Failure(f"HTTP {code}: {message}{wish}", charged=charged, wait=wait)
        return EndpointError(
            "the server refuses this prompt", where=self.name, found=f"HTTP {code}: {message}", remedy=_REMEDY.get(code)
        )

    def _hide(self, text: str) -> str:
        """No message shows the key."""
        return text.replace(self._key, "***") if self._key else text


_REMEDY = {
    401: "check the API key in the environment variable that key_env names",
    403: "check what the API key may do",
    404: "check base_url (it mostly ends in /v1), the model's name, and api='chat' or api='completions'",
    429: "the account's own limit is used up: see its billing page",
}


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Seconds that a server wants us to wait: ``Retry-After-Ms``, or ``Retry-After`` as seconds or as a date.

    >>> retry_after({"retry-after": "2"})
    2.0
    >>> retry_after({"retry-after": "Thu, 01 Jan 1970 00:01:00 GMT"}, now=50.0)
    10.0
    """
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        text = headers.get(name)
        if text is None:
            continue
        try:
            seconds = float(text) * unit
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(text).timestamp() - (time.time() if now is None else now)
            except (TypeError, ValueError):
                continue
        if seconds < float("inf"):
            return max(seconds, 0.0)
    return None


def _message(error: Any) -> str:
    """The server's own words."""
    body = error.body
    if isinstance(body, dict):
        code = f" ({body['code']})" if body.get("code") else ""
        return f"{body.get('message') or body}{code}"
    return str(body or error.message)

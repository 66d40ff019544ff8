"""Clients in processes of their own, forked from one that has imported everything.

Each line of stdin is JSON: ``{"arguments": {...}, "out": PATH, "err": PATH}`` starts a client and prints its process
id, ``{"wait": PID}`` prints how it ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import openai

from limbeck.teachers.served import ServedTeacher


def client(url: str, record: str, count: int, concurrency: int, **options: Any) -> None:
    """Ask all questions, and print what came of it."""
    teacher = ServedTeacher(
        url,
        "tiny",
        record=record,
        key_env=None,
        concurrency=concurrency,
        timeout=5,
        backoff=(0.02, 0.2),
        **options,
    )
    answers = teacher.generate([f"question {i}" for i in range(count)], max_tokens=6)
    print(json.dumps({"texts": [a.text for (a,) in answers], "asked": teacher.asked, "reused": teacher.reused}))


def serve() -> dict[str, Any] | None:
    """Start and await clients; returns in a client, with its arguments."""
    for line in sys.stdin:
        command = json.loads(line)
        if "wait" in command:
            print(os.waitstatus_to_exitcode(os.waitpid(command["wait"], 0)[1]), flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            for name, handle in (("out", 1), ("err", 2)):
                os.dup2(os.open(command[name], os.O_WRONLY | os.O_CREAT), handle)
            return command["arguments"]
    return None


# What a first request imports and looks up is done before clients are forked.
first = openai.OpenAI(base_url="http://127.0.0.1:1", api_key="none")
assert first.chat.completions.with_raw_response
assert first.platform_headers()

signal.signal(signal.SIGINT, signal.default_int_handler)  # also where tests run in a background that ignores it

if __name__ == "__main__" and (arguments := serve()) is not None:
    client(**arguments)

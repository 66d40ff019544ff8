"""A small OpenAI-compatible server with a deterministic model, in a process of its own, that fails as it is told to.

``python loopback.py PORT LOG FAULTS`` where FAULTS is JSON: a list of faults, of which every prompt meets two on its
first attempts (its hash says which), the share of prompts that meet any, and the seconds a reply takes. Every request
and every whole reply is a line of LOG, written before the request is answered and after the reply is sent.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "haven"]


def model(prompt: str, seed: int, limit: int) -> tuple[list[str], list[list[tuple[str, float]]]]:
    """Tokens, and at each place four rivals with log-probabilities."""
    tokens, tops = [], []
    digest = hashlib.sha256(f"{seed}:{prompt}".encode()).digest()
    for place in range(min(limit, 4 + digest[0] % 4)):
        rivals = [f" {WORDS[(digest[place + 1] + 3 * i) % 8]}" for i in range(4)]
        weights = [1.0 + digest[place + 9] % (5 + i) for i in range(4)]
        logprobs = [math.log(w / sum(weights)) for w in weights]
        tops.append(sorted(zip(rivals, logprobs, strict=True), key=lambda pair: -pair[1]))
        tokens.append(tops[-1][0][0])
    return tokens, tops


def chat(request: dict[str, Any]) -> dict[str, Any]:
    prompt = request["messages"][-1]["content"]
    tokens, tops = model(prompt, request.get("seed", 0), request["max_tokens"])
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": "".join(tokens)}, "finish_reason": "stop"}
    if request.get("logprobs"):
        rows = [
            {"token": t, "logprob": top[0][1], "bytes": list(t.encode()), "top_logprobs": ranked(top, request)}
            for t, top in zip(tokens, tops, strict=True)
        ]
        choice["logprobs"] = {"content": rows}
    return reply(request, choice, prompt, len(tokens))


def ranked(top: list[tuple[str, float]], request: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"token": t, "logprob": p, "bytes": list(t.encode())} for t, p in top[: request["top_logprobs"]]]


def complete(request: dict[str, Any]) -> dict[str, Any]:
    prompt = request["prompt"]
    tokens, tops = model(prompt, request.get("seed", 0), max(request["max_tokens"], 1))
    choice: dict[str, Any] = {"text": "".join(tokens), "finish_reason": "length", "logprobs": None}
    if request.get("logprobs") is not None:
        table = {
            "tokens": tokens,
            "token_logprobs": [top[0][1] for top in tops],
            "top_logprobs": [dict(top[: request["logprobs"]]) for top in tops],
            "text_offset": [sum(map(len, tokens[:i])) for i in range(len(tokens))],
        }
        if request.get("echo"):  # one token for each character, and one that is generated, as some servers do
            generated = {name: row[0] for name, row in table.items()}
            table = {
                "tokens": [*prompt, generated["tokens"]],
                "token_logprobs": [None, *(-0.5 - i / 100 for i in range(1, len(prompt))), -0.1],
                "top_logprobs": [None, *({c: -0.25, "~": -2.0} for c in prompt[1:]), generated["top_logprobs"]],
                "text_offset": [*range(len(prompt)), len(prompt)],
            }
            choice["text"] = prompt + generated["tokens"]
        choice["logprobs"] = table
    return reply(request, choice, prompt, len(tokens))


def reply(request: dict[str, Any], choice: dict[str, Any], prompt: str, count: int) -> dict[str, Any]:
    usage = {"prompt_tokens": len(prompt.split()) + 3, "completion_tokens": count}
    return {"model": f"{request['model']}-exact", "choices": [choice], "usage": usage}


def meets_faults(prompt: str, share: float) -> bool:
    return hashlib.sha256(prompt.encode()).digest()[1] / 256 < share


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    log: int
    faults: list[str]
    share: float
    latency: float
    seen: ClassVar[Counter[str]] = Counter()
    lock: ClassVar[threading.Lock] = threading.Lock()

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = request["prompt"] if "prompt" in request else request["messages"][-1]["content"]
        self.note("asked", prompt)
        time.sleep(self.latency)
        fault = self.fault(prompt, request)
        if fault == "hang":
            time.sleep(1.5)
            self.close_connection = True
        elif fault == "cut":
            self.connection.close()
        elif fault == "half":  # the connection breaks within the reply
            self.send(200, json.dumps(chat(request)).encode(), keep=0.5)
        elif fault == "truncated":  # the reply says it is whole, and is not
            self.send(200, json.dumps(chat(request)).encode()[:-20])
        elif fault == "error200":
            self.send(200, b'{"error": {"message": "upstream is tired", "code": 502}}')
        elif fault is not None:
            code = int(fault.split(":")[0])
            headers = {"Retry-After": fault.split(":")[1]} if ":" in fault else {}
            error = {"error": {"message": f"scripted {code}, key {self.headers['Authorization']}", "code": None}}
            self.send(code, json.dumps(error).encode(), headers)
        else:
            self.send(200, json.dumps(chat(request) if "messages" in request else complete(request)).encode())
            self.note("answered", prompt)

    def fault(self, prompt: str, request: dict[str, Any]) -> str | None:
        if prompt.startswith("refuse"):
            return "400"
        if not self.faults or not meets_faults(prompt, self.share):
            return None
        with self.lock:
            attempt = self.seen[prompt]
            self.seen[prompt] += 1
        start = hashlib.sha256(prompt.encode()).digest()[0] % len(self.faults)
        return self.faults[start] if attempt == 0 else self.faults[start - 1] if attempt == 1 else None

    def send(self, code: int, body: bytes, headers: dict[str, str] | None = None, keep: float = 1.0) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: int(len(body) * keep)])
        self.wfile.flush()
        if keep < 1:
            self.close_connection = True

    def note(self, event: str, prompt: str) -> None:
        os.write(self.log, (json.dumps({"event": event, "prompt": prompt, "at": time.monotonic()}) + "\n").encode())

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """A client that went away is no news."""


if __name__ == "__main__":
    port, path, script = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    Handler.log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    Handler.faults, Handler.share, Handler.latency = script["faults"], script["share"], script["latency"]
    server = Server(("127.0.0.1", port), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()

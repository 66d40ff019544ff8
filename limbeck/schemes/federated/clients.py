"""Clients: what one does in a round, and where they run, all in this process or each in one of its own."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from limbeck.core.errors import ConfigError, LimbeckError
from limbeck.core.ranks import gather_bytes, world_size
from limbeck.engine.config import TrainConfig
from limbeck.schemes.federated.local import Round
from limbeck.schemes.federated.wire import Tensors, below, pack, under, unpack

Where = Literal["simulated", "processes"]


class Work(ABC):
    """What the clients of a method do. It has no memory: what a client keeps from round to round is handed to it.

    Attributes:
        hears: Kinds of tensors that the server may send.
        says: Kinds that a client may send.
    """

    hears: tuple[str, ...] = ()
    says: tuple[str, ...] = ()

    def begin(self, number: int) -> Tensors:
        """What a client keeps, before the first round."""
        return {}

    @abstractmethod
    def answer(self, number: int, kept: Tensors, told: Tensors, place: Round) -> tuple[Tensors, Tensors]:
        """One client's round.

        Args:
            number: Whose.
            kept: What it kept of the rounds before, on its own disk.
            told: What the server sent.
            place: The round.

        Returns:
            What it keeps, and what it sends.
        """


@dataclass
class Answers:
    """Who said what in a round.

    Args:
        said: Payloads that arrived, by client.
        kept: What those clients keep.
        lost: Why nothing came of the others.
    """

    said: dict[int, bytes] = field(default_factory=dict)
    kept: dict[int, Tensors] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)

    def everywhere(self, device: torch.device) -> Answers:
        """With what the clients of all other ranks said; the same on each.

        Args:
            device: By which ranks talk.
        """
        if world_size() == 1:
            return self
        own = {f"said/{number}": _raw(payload) for number, payload in self.said.items()}
        own |= {f"lost/{number}": _raw(why.encode()) for number, why in self.lost.items()}
        for number, tensors in self.kept.items():
            own |= under(f"kept/{number}", tensors)
        found = Answers()
        for payload in gather_bytes(pack(own), device):
            every = unpack(payload)
            found.lost |= {int(n): tensor.numpy().tobytes().decode() for n, tensor in below("lost", every).items()}
            said = {int(n): tensor.numpy().tobytes() for n, tensor in below("said", every).items()}
            found.said |= said
            found.kept |= {number: below(f"kept/{number}", every) for number in said}
        found.said = dict(sorted(found.said.items()))  # sums are those of one process
        return found


def _raw(payload: bytes) -> Tensor:
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8)


class Clients(Protocol):
    """Where clients run."""

    def ask(self, place: Round, kept: Mapping[int, Tensors], told: Mapping[int, bytes]) -> Answers:
        """One round with some of them."""

    def close(self) -> None:
        """Send them home."""


class Simulated:
    """The clients in this process, one after the other; of several ranks each has its part of them."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def ask(self, place: Round, kept: Mapping[int, Tensors], told: Mapping[int, bytes]) -> Answers:
        found = Answers()
        for number, payload in told.items():
            keeps, says = self.work.answer(number, dict(kept[number]), unpack(payload, self.work.hears), place)
            found.said[number], found.kept[number] = pack(says, self.work.says), keeps
        return found

    def close(self) -> None:
        return


class Processes:
    """Each client in a process of its own, of one thread, which belongs to one rank.

    It has the data from when it was forked; what it is told and what it says are the bytes of the wire. One that dies,
    fails or is too late is lost for the round, and is started again for the next. What it kept is as it was before.

    Args:
        work: What they do.
        timeout: Seconds that a round waits for them; ``None``: until they answer or die.
    """

    def __init__(self, work: Work, timeout: float | None = None) -> None:
        self.work, self.timeout = work, timeout
        self.running: dict[int, tuple[BaseProcess, Connection]] = {}

    def ask(self, place: Round, kept: Mapping[int, Tensors], told: Mapping[int, bytes]) -> Answers:
        found = Answers()
        facts = {"number": place.number, "total": place.total, "seed": place.seed}
        header = json.dumps({**facts, "config": place.config.model_dump(mode="json")}).encode()
        waiting: dict[Connection, int] = {}
        for number, payload in told.items():
            _, line = self._start(number)
            try:
                for part in (header, pack(kept[number]), payload):
                    line.send_bytes(part)
                waiting[line] = number
            except OSError:
                self._lose(number, found)
        end = None if self.timeout is None else time.monotonic() + self.timeout
        while waiting:
            left = None if end is None else max(end - time.monotonic(), 0.0)
            ready = wait(list(waiting), left)
            for one in ready:
                answered = cast(Connection, one)
                self._hear(waiting.pop(answered), answered, found)
            if not ready:
                for number in waiting.values():
                    self._lose(number, found, f"no answer within {self.timeout:g} s")
                break
        found.said = dict(sorted(found.said.items()))  # in whatever order they came, sums are the same
        return found

    def _hear(self, number: int, line: Connection, found: Answers) -> None:
        try:
            problem, says, keeps = line.recv_bytes(), line.recv_bytes(), line.recv_bytes()
        except (EOFError, OSError):
            self._lose(number, found)
            return
        if problem:
            found.lost[number] = problem.decode()
            return
        found.said[number], found.kept[number] = says, unpack(keeps)

    def _start(self, number: int) -> tuple[BaseProcess, Connection]:
        process, line = self.running.get(number, (None, None))
        if process is not None and line is not None and process.is_alive():
            return process, line
        if line is not None:
            line.close()
        here, there = multiprocessing.Pipe()
        others = [line for _, line in self.running.values() if not line.closed]
        process = multiprocessing.get_context("fork").Process(
            target=_serve, args=(self.work, number, there, [here, *others], os.getpid()), daemon=True
        )
        process.start()
        there.close()  # else its end would not be seen when it dies
        self.running[number] = process, here
        return process, here

    def _lose(self, number: int, found: Answers, why: str | None = None) -> None:
        process, line = self.running.pop(number)
        if why is not None:
            process.kill()
        line.close()
        process.join(5)
        code = process.exitcode
        ended = "ended" if code is None else f"killed by signal {-code}" if code < 0 else f"ended with code {code}"
        found.lost[number] = why or ended

    def close(self) -> None:
        for process, line in self.running.values():
            process.kill()
            line.close()
            process.join(5)
        self.running = {}


def _serve(work: Work, number: int, line: Connection, others: list[Connection], parent: int) -> None:
    """A client's process: one round after the other, until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)  # and a thread pool does not outlive a fork
    for other in others:
        other.close()
    while True:
        while not line.poll(1.0):
            if os.getppid() != parent:
                return
        try:
            facts, kept, told = json.loads(line.recv_bytes()), line.recv_bytes(), line.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            place = Round(**{**facts, "config": TrainConfig(**facts["config"])})
            keeps, says = work.answer(number, unpack(kept), unpack(told, work.hears), place)
            parts = [b"", pack(says, work.says), pack(keeps)]
        except LimbeckError as error:
            parts = [str(error).encode(), b"", b""]
        except Exception as error:  # whatever it is, the others go on
            parts = [f"{type(error).__name__}: {error}".encode(), b"", b""]
        for part in parts:
            line.send_bytes(part)


def clients_of(where: Where, work: Work, timeout: float | None, device: torch.device) -> Clients:
    """Clients where they are wanted.

    Raises:
        ConfigError: They cannot be there.
    """
    if where == "simulated":
        return Simulated(work)
    if device.type != "cpu" or "fork" not in multiprocessing.get_all_start_methods():
        raise ConfigError(
            "clients in processes are forked, which needs training on the CPU of a POSIX system",
            where="scheme.clients",
            found=f"device {device.type}",
            remedy="set train.device: cpu, or clients: simulated",
        )
    return Processes(work, timeout)

"""Rounds: the server asks, clients answer or are lost, the student moves to what came of it. A step is a round.

Several ranks share the clients: client i lives on rank i modulo their number. What clients say goes to all ranks, and
so does what they keep, since it lies in the checkpoint; every rank then does the server's part, alike.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller, Losses
from limbeck.core.errors import ConfigError, DataError, TrainingError
from limbeck.core.files import write_text
from limbeck.core.hashing import draw_bits, key, key_tensor
from limbeck.core.objective import DataInfo, Objective
from limbeck.core.ranks import alone, rank_here, world_size
from limbeck.data.blank import BlankLoader
from limbeck.data.loader import Loader
from limbeck.engine.config import TrainConfig
from limbeck.engine.stage import Stage
from limbeck.schemes.federated.clients import Answers, Clients, Where, Work, clients_of
from limbeck.schemes.federated.local import Round, check_config, seeded
from limbeck.schemes.federated.split import indexed
from limbeck.schemes.federated.wire import Tensors, pack, unpack
from limbeck.schemes.scheme import Cast, Training

_WHO = 63  # keeps these draws apart from others
RECORD = "rounds.jsonl"


@dataclass(frozen=True)
class Plan:
    """How rounds go, in every federated scheme.

    Args:
        count: Clients.
        clients: ``"simulated"``, one after the other, or ``"processes"``, each in one of its own.
        fraction: Of them, asked in a round.
        timeout: Seconds that a round waits for processes.
    """

    count: int
    clients: Where
    fraction: float
    timeout: float | None

    def __post_init__(self) -> None:
        if self.clients not in get_args(Where):
            wanted = ", ".join(get_args(Where))
            raise ConfigError("no such way", where="scheme.clients", found=repr(self.clients), wanted=wanted)
        limits = {"count": self.count >= 1, "fraction": 0 < self.fraction <= 1, "timeout": (self.timeout or 1) > 0}
        for name, good in limits.items():
            if not good:
                wanted = "a part of 1" if name == "fraction" else "more than 0"
                raise ConfigError("out of range", where=f"scheme.{name}", found=getattr(self, name), wanted=wanted)


class Kept(nn.Module):
    """What one client keeps, as buffers, so that checkpoints hold it: they stand for its own disk."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name.replace(".", "|"), tensor.detach().clone())

    @property
    def tensors(self) -> Tensors:
        """By their names."""
        return {name.replace("|", "."): tensor for name, tensor in self._buffers.items() if tensor is not None}

    def keep(self, tensors: Tensors) -> None:
        """Put others in their place."""
        for name, tensor in tensors.items():
            self._buffers[name.replace(".", "|")].copy_(tensor)  # type: ignore[union-attr]


class Federation(Distiller):
    r"""The server, whose student is the model that ships.

    A round ends with weights :math:`\theta^\star` where the student shall be; its loss is :math:`\frac 1 2 \|\theta -
    \theta^\star\|^2`, and the step of plain SGD with rate 1 goes there.

    Args:
        cast: Student, loss and settings.
        work: What clients do.
        plan: How rounds go.
        facts: What the run is beside that: options, and who owns what.
    """

    def __init__(self, cast: Cast, work: Work, plan: Plan, facts: dict[str, Any]) -> None:
        super().__init__(cast.student, cast.loss, None, logits=cast.logits)
        self.work, self.plan, self.facts = work, plan, facts
        self.config, self.seed, self.folder, self.validation = cast.config, cast.seed, cast.folder, cast.validation
        self.kept = nn.ModuleList(Kept(work.begin(number)) for number in range(plan.count))
        self.clients: Clients | None = None
        self.goal: list[Tensor] | None = None
        self.notes: dict[str, float] = {}

    @abstractmethod
    def tell(self, number: int, place: Round) -> Tensors:
        """What is sent to a client."""

    @abstractmethod
    def hear(self, said: dict[int, Tensors], place: Round) -> Tensors:
        """What comes of the answers: the state that the student shall have.

        Args:
            said: By client, of those who answered.
            place: The round.
        """

    def judge(self, place: Round) -> dict[str, float]:
        """Further figures of a round that is judged."""
        return {}

    # -- a round ---------------------------------------------------------------------------------------------------

    def made(self, batch: Batch) -> Batch:
        total = self.rounds
        place = Round.of(round(float(batch.progress) * total), total, self.seed, self.config)
        if self.clients is None:
            self.clients = clients_of(self.plan.clients, self.work, self.plan.timeout, batch.inputs.device)
        asked = self.asked(place.number)
        told = {number: pack(self.tell(number, place), self.work.hears) for number in asked}
        kept = {number: self._kept(number).tensors for number in asked}
        rank, world = rank_here(), world_size()
        with seeded(self.seed, place.number):
            with alone():
                answers = self.clients.ask(place, kept, {n: p for n, p in told.items() if n % world == rank})
            answers = answers.everywhere(batch.inputs.device)
            if not answers.said:
                raise TrainingError(
                    "no client answered",
                    where=f"round {place.number + 1}",
                    found="; ".join(f"client {number}: {why}" for number, why in sorted(answers.lost.items())),
                )
            for number, keeps in answers.kept.items():
                self._kept(number).keep(keeps)
            said = {number: unpack(payload, self.work.says) for number, payload in answers.said.items()}
            with alone():  # every rank is the server
                self._aim(self.hear(said, place))
                self.notes = {} if not self._judged(place) else self.judge(place)
        self._note(place, told, answers)
        return batch

    def asked(self, number: int) -> list[int]:
        """Who takes part in a round: drawn anew each time, where that is not everybody.

        All of them, where everybody is asked.
        """
        count = max(1, round(self.plan.fraction * self.plan.count))
        bits = draw_bits(key_tensor([key(_WHO, self.seed, number)]), torch.arange(self.plan.count)).squeeze(1)
        return sorted(bits.argsort(stable=True)[:count].tolist())

    @property
    def rounds(self) -> int:
        """How many there are."""
        return self.config.total_steps(1)

    def _kept(self, number: int) -> Kept:
        found = self.kept[number]
        assert isinstance(found, Kept)
        return found

    def _aim(self, state: Tensors) -> None:
        device = next(self.student.parameters()).device
        self.goal = [state[name].to(device) for name, _ in self.student.named_parameters()]
        with torch.no_grad():
            for name, buffer in self.student.named_buffers():
                if name in state:
                    buffer.copy_(state[name])

    def _judged(self, place: Round) -> bool:
        every = self.config.validate_steps or self.config.validate_epochs
        return self.validation is not None and ((place.number + 1) % every == 0 or place.number + 1 == place.total)

    def _note(self, place: Round, told: dict[int, bytes], answers: Answers) -> None:
        up, down = {n: len(p) for n, p in answers.said.items()}, {n: len(p) for n, p in told.items()}
        self.notes |= {"bytes_up": float(sum(up.values())), "bytes_down": float(sum(down.values()))}
        self.notes |= {"answered": float(len(up)), "lost": float(len(answers.lost))}
        if self.folder is None or rank_here() > 0:
            return
        path, line = self.folder / RECORD, {"round": place.number + 1, "asked": sorted(told), "answered": sorted(up)}
        lost = [{"client": number, "why": why} for number, why in sorted(answers.lost.items())]
        line |= {"lost": lost, "bytes_up": sum(up.values()), "bytes_down": sum(down.values())}
        line |= {"up": {str(n): size for n, size in up.items()}, "down": {str(n): size for n, size in down.items()}}
        line |= {k: round(v, 6) for k, v in self.notes.items() if k not in line and k != "lost" and math.isfinite(v)}
        # A resumed run comes here again: lines from this round on are those of before.
        before = [one for one in record(self.folder) if one["round"] <= place.number]
        write_text(path, "".join(json.dumps(one) + "\n" for one in [*before, line]))

    # -- what the engine asks --------------------------------------------------------------------------------------

    def setup(self, batch: Batch, data: DataInfo | None = None) -> Federation:
        self.close()
        return self

    def objectives(self) -> Iterator[Objective]:
        return iter(())  # the clients' own; the server has none

    def parameters_of(self, turn: str) -> Iterator[nn.Parameter]:
        return self.student.parameters()

    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        own = list(self.student.parameters())
        goal = self.goal if self.goal is not None else [p.detach() for p in own]
        gaps = [(p - g).square().sum() for p, g in zip(own, goal, strict=True) if p.requires_grad]
        total = torch.stack(gaps).sum() / 2
        notes = {name: torch.tensor(v, dtype=torch.float64, device=total.device) for name, v in self.notes.items()}
        return Losses(total, {"moved": total.detach(), **notes}, {})

    def settled(self) -> dict[str, Any]:
        plan = {"count": self.plan.count, "fraction": self.plan.fraction}  # where clients run changes no bit
        return {**plan, **self.facts, "train": self.config.settled()}

    def close(self) -> None:
        super().close()
        if self.clients is not None:
            self.clients.close()
            self.clients = None


def record(folder: Path) -> list[dict[str, Any]]:
    """The rounds of a run, from its folder: who was asked, who answered, who was lost and why, bytes up and down."""
    path = folder / RECORD
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


def server_config(config: TrainConfig) -> TrainConfig:
    """Settings of the server's steps: SGD with rate 1 goes where the round ends. An epoch is a step is a round.

    Raises:
        ConfigError: The section ``train`` says what a federation cannot do.
    """
    check_config(config)
    plain = {"optimizer": "sgd", "lr": 1.0, "weight_decay": 0.0, "optimizer_options": {"momentum": 0.0}}
    still = {"schedule": "constant", "schedule_options": {}, "warmup": 0.0, "clip": None}
    return config.model_copy(update={**plain, **still, "accumulate": 1, "compile": "off", "log_every": 1})


def training_of(name: str, cast: Cast, make: Callable[[], Federation]) -> Training:
    """The one training of a federated scheme.

    Data that cannot be split among the clients are told of when it begins: a recipe that is only checked shows a scheme
    a few samples.

    Args:
        name: Of its stage.
        cast: Student, settings and data.
        make: Makes the server, by splitting the data.
    """
    config, train = server_config(cast.config), indexed(cast.train, name)
    try:
        server: Distiller = make()
    except DataError as error:
        problem, server = error, Distiller(cast.student, cast.loss, None, logits=cast.logits)

        def refused() -> Loader:
            raise problem

        return Training([Stage(name, server, config)], train=refused)

    return Training([Stage(name, server, config)], train=lambda: Beat(train))


class Beat(BlankLoader):
    """A round a step, and a sample without data for each rank.

    Args:
        train: The data, of which the shape is taken.
    """

    def __init__(self, train: Loader) -> None:
        super().__init__(train, samples=train.batch_size)
        self.samples = self.batch_size = 1

    def epoch(
        self, epoch: int, *, start_step: int = 0, rank: int = 0, world: int = 1, parts: int = 1
    ) -> Iterator[list[Batch]]:
        return super().epoch(epoch, start_step=start_step, parts=parts)

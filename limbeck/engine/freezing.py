"""Who learns in a stage: which parameters train, and which modules stay exactly as they are."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, did_you_mean
from limbeck.core.taps import Listener


@contextlib.contextmanager
def learning(distiller: Distiller, learn: Iterable[str], among: Iterable[str] | None = None) -> Iterator[None]:
    """Let only some of the student's parameters train, for as long as this lasts. Objectives' own always train.

    What its owner froze stays frozen.

    Args:
        distiller: Set up.
        learn: Patterns over the student's parameter names (``"layer3.*"``).
        among: Names that may train at all; ``None``: any.

    Raises:
        ConfigError: A pattern fits no parameter, or nothing is left to train.
    """
    named = dict(distiller.student.named_parameters())
    before = [(p, p.requires_grad) for p in distiller.parameters()]
    chosen: set[str] = set()
    for pattern in learn:
        matching = fnmatch.filter(named, pattern)
        if not matching and named:
            raise ConfigError(
                "no parameter of the student has such a name",
                where="learn",
                found=repr(pattern),
                remedy=did_you_mean(pattern, named) or f"its first are {', '.join(list(named)[:3])}",
            )
        chosen.update(matching)
    if among is not None:
        chosen &= set(among)
    try:
        for name, parameter in named.items():
            parameter.requires_grad_(parameter.requires_grad and name in chosen)
        if not any(p.requires_grad for p in distiller.parameters()):
            raise ConfigError("nothing is left to train", where="learn", found=", ".join(learn) or "no pattern")
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)


def train_mode(distiller: nn.Module) -> None:
    """Training mode, but evaluation mode for modules whose parameters are all frozen.

    So a frozen part does not change at all: its normalisation statistics stay, and it drops nothing out.
    """
    distiller.train()
    for module in distiller.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()


def reaches(student: nn.Module, inputs: Any, tap: str) -> list[str]:
    """The student's parameters that a tap depends on, told by one backward pass that changes nothing.

    >>> reaches(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), torch.ones(1, 2), "1")
    ['0.weight', '0.bias']
    """
    named = [(n, p) for n, p in student.named_parameters() if p.requires_grad]
    listener = Listener(student, [tap], inputs)
    modes = {m: m.training for m in student.modules()}
    try:
        student.eval()
        found = listener(inputs)[tap]
        total = sum(v.float().sum() for v in (found if isinstance(found, list) else [found]))
        gradients = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
    finally:
        listener.close()
        for module, training in modes.items():
            module.training = training
    return [n for (n, _), g in zip(named, gradients, strict=True) if g is not None]


def leaves_some_out(distiller: Distiller, batch: Batch) -> bool:
    """Whether some trained parameter gets no gradient in some turn; DDP must then look for those in every step.

    One forward and backward on an example tell; buffers and random states are put back.
    """
    trained = [p for p in distiller.parameters() if p.requires_grad]
    kept = {n: b.clone() for n, b in distiller.named_buffers()}
    device = next(p.device for p in trained)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for turn in dict.fromkeys(distiller.turns):
                total = distiller.forward(batch, turn).total
                if any(g is None for g in torch.autograd.grad(total, trained, allow_unused=True)):
                    return True
            return False
    finally:
        with torch.no_grad():
            for name, buffer in distiller.named_buffers():
                buffer.copy_(kept[name])

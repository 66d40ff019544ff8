"""Who learns in a stage: which parameters train, and which modules stay exactly as they are."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, did_you_mean


@contextlib.contextmanager
def learning(distiller: Distiller, learn: Iterable[str]) -> Iterator[None]:
    """Let only some of the student's parameters train, for as long as this lasts. Objectives' own always train.

    What its owner froze stays frozen.

    Args:
        distiller: Set up.
        learn: Patterns over the student's parameter names (``"layer3.*"``).

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


def freeze_unused(distiller: Distiller, batch: Batch) -> list[str]:
    """Freeze parameters that no turn's loss depends on, and name them. DDP would wait for their gradients for ever.

    One forward on an example tells; buffers and random states are put back.
    """
    named = [(n, p) for n, p in distiller.named_parameters() if p.requires_grad]
    kept = {n: b.clone() for n, b in distiller.named_buffers()}
    used: set[str] = set()
    device = batch_device(distiller)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for turn in dict.fromkeys(distiller.turns):
            total = distiller.forward(batch, turn).total
            gradients = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
            used |= {n for (n, _), g in zip(named, gradients, strict=True) if g is not None}
    with torch.no_grad():
        for name, buffer in distiller.named_buffers():
            buffer.copy_(kept[name])
    unused = [(n, p) for n, p in named if n not in used]
    for _, parameter in unused:
        parameter.requires_grad_(False)
    return [n for n, _ in unused]


def batch_device(module: nn.Module) -> torch.device:
    """Where a module's parameters are."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))

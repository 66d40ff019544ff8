"""Training where the data are: a few epochs of one model, by the engine's own steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError
from limbeck.core.hashing import key
from limbeck.core.objective import DataInfo, Terms
from limbeck.core.teacher import Teacher
from limbeck.data.loader import IndexedLoader
from limbeck.engine.config import TrainConfig
from limbeck.engine.device import make_accelerator
from limbeck.engine.freezing import train_mode
from limbeck.engine.optim import build_optimizer, build_scheduler
from limbeck.engine.step import Step

_LOCAL = 62  # keeps these draws apart from others


@dataclass(frozen=True)
class Round:
    """A round as everybody knows it.

    Args:
        number: From 0.
        total: How many there are.
        seed: Of the run.
        config: How one trains locally; its learning rate is this round's.
    """

    number: int
    total: int
    seed: int
    config: TrainConfig

    @classmethod
    def of(cls, number: int, total: int, seed: int, config: TrainConfig) -> Round:
        """A round of a run: the run's schedule tells its learning rate, which stays the same within it."""
        changes = {"schedule": "constant", "schedule_options": {}, "warmup": 0.0, "ema": None}
        lr = rate(config, number, total)
        return cls(number, total, seed, config.model_copy(update={"lr": lr, **changes}))


def rate(config: TrainConfig, done: int, total: int) -> float:
    """The learning rate after so many rounds.

    >>> [round(rate(TrainConfig(lr=1.0, schedule="linear"), done, 4), 2) for done in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    optimizer = build_optimizer("sgd", [("x", nn.Parameter(torch.zeros(1)))], lr=config.lr, weight_decay=0.0)
    scheduler = build_scheduler(optimizer, config.schedule, config.schedule_options, total=total, warmup=config.warmup)
    for _ in range(done):
        optimizer.step()
        scheduler.step()
    return max(float(optimizer.param_groups[0]["lr"]), 1e-12)  # a rate of nothing is no rate


def check_lengths(least: int, **lengths: int | None) -> None:
    """Refuse numbers of epochs and samples that are none.

    Raises:
        ConfigError: One is lower than ``least``.
    """
    for name, value in lengths.items():
        if value is not None and value < least:
            raise ConfigError("out of range", where=f"scheme.{name}", found=value, wanted=f"{least} or more")


def check_config(config: TrainConfig) -> None:
    """Refuse settings that a round does not know.

    Raises:
        ConfigError: One is there.
    """
    wrong = {
        "compile": config.compile == "on",
        "monitor": config.monitor == "total",
        "ema": config.ema is not None,
        "schedule": config.schedule == "ReduceLROnPlateau",
    }
    for name, bad in wrong.items():
        if bad:
            raise ConfigError("a federation cannot do this", where=f"train.{name}", found=getattr(config, name))


@contextmanager
def seeded(*counters: int) -> Iterator[None]:
    """A random state of one's own, for as long as this lasts."""
    with torch.random.fork_rng():
        torch.manual_seed(key(_LOCAL, *counters) >> 1)
        yield


def learn(
    model: nn.Module,
    terms: Terms,
    loader: IndexedLoader,
    place: Round,
    *,
    epochs: int,
    first: int | None = None,
    teacher: Teacher | None = None,
    logits: str | None = None,
    build: Callable[..., Distiller] = Distiller,
) -> nn.Module:
    """Train a model for some epochs, with an optimizer that begins anew.

    Args:
        model: Who learns, in place.
        terms: By what; a copy of them is set up each time.
        loader: From what.
        place: The round.
        epochs: How many.
        first: The number of the first of them, which tells order and views; default: those of earlier rounds go before.
        teacher: From whom.
        logits: Where logits stand in the model's output.
        build: Makes the distiller, called as :class:`~limbeck.core.distiller.Distiller` is.
    """
    if not epochs:
        return model
    first = place.number * epochs if first is None else first
    accelerator = make_accelerator(place.config)
    distiller = build(model, copy.deepcopy(terms), teacher, logits=logits).to(accelerator.device)
    example = next(loader.epoch(first))[0].to(accelerator.device)
    steps = epochs * loader.steps_per_epoch
    try:
        distiller.setup(example, DataInfo(loader.samples, None, loader.classes, task=loader.task))
        distiller.to(accelerator.device)
        step = Step(accelerator, distiller, distiller, place.config, steps * place.total)
        step.distributed, step.whole = False, place.config.accumulate == 1  # other ranks have other clients
        train_mode(distiller)
        done = steps * place.number  # so that terms see how far the run is
        for epoch in range(first, first + epochs):
            for parts in loader.epoch(epoch, parts=place.config.accumulate):
                step(parts, done)
                done += 1
    finally:
        distiller.zero_grad(set_to_none=True)
        distiller.close()
    return model

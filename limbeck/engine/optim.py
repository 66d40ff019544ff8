"""Optimizers and learning-rate schedules: by name from torch, by import path from anywhere."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from limbeck.core.errors import ConfigError, did_you_mean
from limbeck.core.schedules import Constant, Cosine, Linear, Schedule, Step, parse_schedule
from limbeck.engine.dot import DOT

#: What a bare name means: parts of the learning rate over the stage. ``step`` are the CRD benchmark's milestones.
SCHEDULES: dict[str, Schedule] = {
    "constant": Constant(1.0),
    "cosine": Cosine(1.0, 0.0),
    "linear": Linear(1.0, 0.0),
    "step": Step(1.0, (0.625, 0.75, 0.875), 0.1),
}
_PRESETS: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}}
# LBFGS evaluates the loss several times a step; SparseAdam wants sparse gradients.
_UNFIT = ("Optimizer", "LBFGS", "SparseAdam")
_OWN = ("params", "lr", "weight_decay", "self")

Named = list[tuple[str, nn.Parameter]]


def optimizer_class(name: str) -> type[Optimizer]:
    """The optimizer of this name: of ``torch.optim``, whatever its case, ``dot``, or ``package.module:Class``.

    Raises:
        ConfigError: There is none, or it cannot be stepped once a batch.

    >>> optimizer_class("AdamW").__name__
    'AdamW'
    """
    known = {n.lower(): c for n, c in vars(torch.optim).items() if isinstance(c, type) and issubclass(c, Optimizer)}
    known = {n: c for n, c in known.items() if c.__name__ not in _UNFIT} | {"dot": DOT}
    return _named(name, known, Optimizer, "optimizer")


def check_optimizer(name: str, options: dict[str, Any]) -> None:
    """Refuse options that the optimizer does not take, before any model is there."""
    weight = nn.Parameter(torch.zeros(2, 2))
    build_optimizer(name, [("weight", weight)], lr=0.1, weight_decay=0.0, options=options, probe=True)


class _Probe(Optimizer):
    """An optimizer's constructor without torch's own, which would import the compiler: seconds, for a check."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self.defaults, self.state = defaults, defaultdict(dict)
        groups = [g if isinstance(g, dict) else {"params": [g]} for g in params]
        self.param_groups = [{**defaults, **g} for g in groups]


def _probe(cls: type[Optimizer]) -> Any:
    return type(cls.__name__, (cls, _Probe), {})


def build_optimizer(
    name: str,
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float = 0.0,
    decay: str = "weights",
    options: dict[str, Any] | None = None,
    fused: bool = False,
    probe: bool = False,
) -> Optimizer:
    """An optimizer over named parameters, in one group that decays and one that does not.

    Args:
        name: See ``optimizer_class``.
        parameters: Names and parameters.
        lr: Learning rate.
        weight_decay: Weight decay.
        decay: ``"weights"``: only parameters of two or more dimensions decay; ``"all"``: biases and norms too.
        options: Its other options.
        fused: Use its fused form where it has one for these parameters.
        probe: Only its constructor, for a check: torch's own machinery would import the compiler.

    Raises:
        ConfigError: An option is not known or not allowed.

    >>> layer = nn.Linear(3, 2)
    >>> sgd = build_optimizer("sgd", layer.named_parameters(), lr=0.1, weight_decay=1e-4)
    >>> [(len(g["params"]), g["weight_decay"]) for g in sgd.param_groups]
    [(1, 0.0001), (1, 0.0)]
    """
    cls: Any = optimizer_class(name)
    known = [p for p in inspect.signature(cls).parameters if p not in _OWN]
    settings = {**_PRESETS.get(name.lower(), {}), **(options or {})}
    for option in settings:
        if option not in known:
            raise ConfigError(
                f"{cls.__name__} has no such option",
                where=f"optimizer_options.{option}",
                wanted="lr and weight_decay beside it, not in it" if option in _OWN else f"one of {', '.join(known)}",
                remedy=did_you_mean(option, known),
            )
    # A file has lists where a class may want tuples (betas).
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    named = list(parameters)
    if fused and "fused" in known and "fused" not in settings and _fusible(named):
        settings["fused"] = True
    if "weight_decay" in inspect.signature(cls).parameters:
        settings["weight_decay"] = weight_decay
    elif weight_decay:
        raise ConfigError(f"{cls.__name__} has no weight decay", where="weight_decay", remedy="set it to 0")
    groups: list[dict[str, Any]] = [{"params": [p for _, p in named]}]
    if weight_decay and decay == "weights":
        matrices, rest = [p for _, p in named if p.ndim > 1], [p for _, p in named if p.ndim <= 1]
        groups = [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]
    try:
        make: Any = _probe(cls) if probe else cls
        return make([g for g in groups if g["params"]], lr=lr, **settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{cls.__name__} refuses this: {error}", where="optimizer_options", found=settings) from None


def _fusible(named: Named) -> bool:
    """Fused steps exist for real floating weights on these devices; elsewhere torch would raise."""
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda", "mps") for _, p in named)


def check_schedule(schedule: Any, options: dict[str, Any] | None = None) -> None:
    """Refuse a schedule or options of it that cannot be, before any model is there."""
    optimizer = _probe(torch.optim.SGD)([nn.Parameter(torch.zeros(1))], lr=0.1)
    if options is None and isinstance(schedule, str) and schedule not in SCHEDULES:
        _scheduler_class(schedule)
        return
    build_scheduler(optimizer, schedule, options or {}, total=10, warmup=0.0)


def build_scheduler(
    optimizer: Optimizer, schedule: Any, options: dict[str, Any], *, total: int, warmup: float
) -> LRScheduler:
    """What moves the learning rate after every step.

    Args:
        optimizer: Whose.
        schedule: A name of ``SCHEDULES``, a schedule of ``limbeck.core.schedules`` or its written form (in parts of the
            learning rate), or a scheduler class by name or import path.
        options: Of a scheduler class. ``T_max`` and ``total_steps``, where it wants them, are the stage's steps.
        total: Steps of the stage.
        warmup: Share of the steps over which the rate rises from 0, multiplied with the schedule.

    Raises:
        ConfigError: No such schedule, or options it does not take.

    >>> sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> scheduler = build_scheduler(sgd, "linear", {}, total=4, warmup=0.0)
    >>> sgd.step(); scheduler.step(); sgd.param_groups[0]["lr"]
    0.75
    """
    if isinstance(schedule, str) and schedule not in SCHEDULES:
        return _from_class(optimizer, schedule, options, total, warmup)
    if options:
        raise ConfigError(
            "options belong to scheduler classes",
            where="schedule_options",
            remedy=f"write {{{schedule}: {{option: value}}}} as the schedule" if isinstance(schedule, str) else None,
        )
    parsed = SCHEDULES[schedule] if isinstance(schedule, str) else parse_schedule(schedule, "schedule")
    return LambdaLR(optimizer, _factor(parsed, total, warmup))


def _factor(schedule: Schedule, total: int, warmup: float) -> Callable[[int], float]:
    """The schedule as a function of steps done. A warm-up counts the coming step too, so that the first one moves."""

    @functools.lru_cache(maxsize=2)  # asked once for each group of parameters
    def at(done: int) -> float:
        part = float(schedule(min(done / total, 1.0)))
        return part * min((done + 1) / (warmup * total), 1.0) if warmup else part

    return at


def _scheduler_class(name: str) -> type[LRScheduler]:
    known = {n: c for n, c in vars(lr_scheduler).items() if isinstance(c, type) and issubclass(c, LRScheduler)}
    # These take functions or other schedulers, which a file cannot name.
    for unfit in ("LRScheduler", "_LRScheduler", "LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler"):
        known.pop(unfit, None)
    return _named(name, known, LRScheduler, "schedule", also=SCHEDULES)


def _from_class(optimizer: Optimizer, name: str, options: dict[str, Any], total: int, warmup: float) -> LRScheduler:
    cls = _scheduler_class(name)
    if warmup:
        raise ConfigError(f"{cls.__name__} cannot be combined with a warm-up", where="warmup", remedy="set it to 0")
    known = list(inspect.signature(cls).parameters)
    settings = {k: total for k in ("T_max", "total_steps") if k in known and "epochs" not in options} | options
    for option in settings:
        if option not in known or option == "optimizer":
            raise ConfigError(
                f"{cls.__name__} has no such option",
                where=f"schedule_options.{option}",
                wanted=f"one of {', '.join(k for k in known if k != 'optimizer')}",
                remedy=did_you_mean(option, known),
            )
    try:
        return cls(optimizer, **settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{cls.__name__} refuses this: {error}", where="schedule_options", found=settings) from None


def _named(name: str, known: dict[str, Any], base: type, where: str, also: Iterable[str] = ()) -> Any:
    """A class by a known name or by its import path."""
    if name in known or name.lower() in known:
        return known.get(name, known.get(name.lower()))
    module, _, attribute = name.partition(":") if ":" in name else name.rpartition(".")
    if not module:
        names = [*also, *known]
        raise ConfigError(
            f"no such {where}",
            where=where,
            found=repr(name),
            wanted=f"one of {', '.join(names)}, or package.module:Class",
            remedy=did_you_mean(name, names),
        )
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a stranger's module may raise anything while it is imported
        raise ConfigError(
            f"cannot be imported: {type(error).__name__}: {error}", where=where, found=repr(name)
        ) from None
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ConfigError(f"not a {base.__name__}", where=where, found=repr(name))
    return cls

"""A stage's moving parts, into a checkpoint and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from limbeck.core.errors import CheckpointError
from limbeck.engine.checkpoint import Checkpoint
from limbeck.engine.state import pack_optimizer, pack_scheduler, unpack_optimizer, unpack_scheduler
from limbeck.engine.step import Step


def pack(step: Step, scaler: Any) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by file, and plain values: student, objectives, optimizers, schedules, averages, open sums."""
    optimizers = {turn: pack_optimizer(p.optimizer, step.names) for turn, p in step.players.items()}
    tensors = {
        "student": step.distiller.student.state_dict(),
        "objectives": {k: v for k, v in step.distiller.state_dict().items() if not k.startswith("student.")},
        "optimizer": {f"{turn}/{k}": v for turn, (found, _) in optimizers.items() for k, v in found.items()},
    }
    for file, values in tensors.items():
        for name, value in values.items():
            if not isinstance(value, Tensor):
                raise CheckpointError(
                    "only tensors can be saved", where=f"{file}: {name}", found=type(value).__name__, wanted="a buffer"
                )
    if step.ema is not None:
        tensors["ema"] = step.ema.state
    state = {
        "meter": step.meter.pack(),
        "optimizers": {turn: plain for turn, (_, plain) in optimizers.items()},
        "schedulers": {turn: pack_scheduler(p.scheduler) for turn, p in step.players.items()},
        "scaler": None if scaler is None else scaler.state_dict(),
    }
    return tensors, state


def unpack(step: Step, scaler: Any, found: Checkpoint) -> None:
    """Put back what ``pack`` took.

    Raises:
        CheckpointError: Its tensors do not fit.
    """
    student = {f"student.{k}": v for k, v in found.tensors("student").items()}
    load_into(step.distiller, student | found.tensors("objectives"), found.path)
    optimizer = found.tensors("optimizer")
    for turn, player in step.players.items():
        own = {k.removeprefix(f"{turn}/"): v for k, v in optimizer.items() if k.startswith(f"{turn}/")}
        unpack_optimizer(player.optimizer, step.names, own, found.state["optimizers"][turn])
        unpack_scheduler(player.scheduler, found.state["schedulers"][turn])
    if step.ema is not None:
        step.ema.load(found.tensors("ema"))
    if scaler is not None and found.state["scaler"]:
        scaler.load_state_dict(found.state["scaler"])
    step.meter.unpack(found.state["meter"])


def load_into(module: nn.Module, tensors: dict[str, Tensor], place: Path) -> None:
    """Load a checkpoint's tensors into a module.

    Raises:
        CheckpointError: Names or shapes do not fit.
    """
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:300]
        raise CheckpointError(f"its tensors do not fit this run: {problem}", where=str(place)) from None

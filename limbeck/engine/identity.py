"""What a run is: everything its weights depend on, so that a checkpoint of another run is refused."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.distiller import Distiller
from limbeck.core.errors import CheckpointError
from limbeck.core.plain import differences
from limbeck.core.teacher import FrozenTeacher, Teacher

_SAMPLE = 256  # values of each of a teacher's tensors that are looked at


def describe_distiller(distiller: Distiller) -> dict[str, Any]:
    """The losses with their options and weights, the student's shapes and the teacher's weights, as plain values."""
    terms = {
        name: {"class": _path(type(objective)), "weight": repr(schedule), **_options(objective)}
        for name, objective, schedule in distiller.loss.items()
    }
    student = {
        n: f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for n, t in distiller.student.state_dict().items()
    }
    teacher = None if distiller.teacher is None else _teacher(distiller.teacher)
    plain = {"distiller": _path(type(distiller)), "loss": terms, "student": student, "teacher": teacher}
    own = {turn: found for turn in distiller.turns if (found := distiller.settings_of(turn))}
    if own:
        plain["settings"] = own
    if settled := distiller.settled():
        plain["settled"] = settled
    return json.loads(json.dumps(plain))


def _teacher(teacher: Teacher) -> Any:
    """What tells a teacher from others; of several together, of each."""
    if isinstance(teacher, FrozenTeacher):
        return digest(teacher.model)
    members = getattr(teacher, "members", ())
    if members:
        return [_teacher(member) for member in members]
    return getattr(teacher, "identity", None) or _path(type(teacher))


def digest(model: nn.Module) -> str:
    """A short text that differs where models do: names, shapes and evenly spread values of every tensor."""
    sums = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        sums.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        if isinstance(tensor, Tensor) and tensor.numel():
            flat = tensor.detach().flatten()
            chosen = flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE].cpu()
            sums.update(chosen.contiguous().view(torch.uint8).numpy().tobytes())
    return sums.hexdigest()


def refuse_other(saved: Any, now: Any) -> None:
    """Raise where a checkpoint's run is not this one.

    Raises:
        CheckpointError: The message names the first field that differs.

    >>> refuse_other({"seed": 1}, {"seed": 2})
    Traceback (most recent call last):
    limbeck.core.errors.CheckpointError: seed: the checkpoint is of another run; found 1 in the checkpoint; wanted 2 ...
    """
    for place, old, new in differences(saved, now):
        raise CheckpointError(
            "the checkpoint is of another run",
            where=place or "run",
            found=f"{old} in the checkpoint",
            wanted=f"{new} as asked for",
            remedy="resume with the settings it was started with, or start in another folder",
        )


def _options(objective: nn.Module) -> dict[str, Any]:
    """Plain public attributes: what its constructor was told, as a rule."""
    kinds = (bool, int, float, str, list, tuple, type(None))
    known = {k: v for k, v in vars(objective).items() if not k.startswith("_") and k != "training"}
    return {k: v for k, v in known.items() if isinstance(v, kinds) and _is_json(v)}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"

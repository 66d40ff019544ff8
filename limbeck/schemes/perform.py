"""Carry a scheme out: its trainings one after the other, each in a folder, none of them twice."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from limbeck.core.errors import CheckpointError, ConfigError
from limbeck.core.files import write_json, write_tensors
from limbeck.core.hashing import key
from limbeck.engine.device import wait_for_everyone
from limbeck.engine.fitting import Fit, fit
from limbeck.engine.operations import together
from limbeck.engine.snapshot import load_into
from limbeck.schemes.scheme import Cast, Scheme, Training

_DONE, _KEPT = "done.json", "models.safetensors"
_SEEDS = 9  # keeps the seeds of trainings apart from other draws


def perform(
    scheme: Scheme, cast: Cast, *, out: str | os.PathLike[str] | None = None, resume: bool = False, quiet: bool = False
) -> Fit:
    """Train as a scheme says.

    The last training is the student's own and lies in ``out``; those before it lie in ``out/trainings/NAME``. One that
    was finished before an interruption is not repeated: its models are given the weights they had at its end.

    Args:
        scheme: Who learns from whom.
        cast: Models, loss, data and settings.
        out: The run's folder; ``None`` keeps everything in memory.
        resume: Go on where an interrupted run was.
        quiet: Show no progress.

    Returns:
        The last training's figures; ``steps``, ``seconds`` and ``operations`` are those of all.

    Raises:
        ConfigError: The scheme ends with another model than the student.
    """
    place, done, names = None if out is None else Path(out), list[Fit](), list[str]()
    if cast.train is None:
        raise ConfigError("there is nothing to learn from", where="train")
    cast = replace(cast, folder=place)
    for number, training in enumerate(scheme.trainings(cast)):
        if training.name in names or "" in names:
            problem = "the student's own training comes last" if "" in names else "two trainings have one name"
            raise ConfigError(problem, where="scheme", found=training.name)
        names.append(training.name)
        done.append(_one(training, cast, number, place, resume, quiet))
    if not done or done[-1].student is not cast.student:
        raise ConfigError("the scheme does not end with its student", where="scheme", found=type(scheme).__name__)
    last = done[-1]
    took = together([f.operations for f in done])
    return replace(last, steps=sum(f.steps for f in done), seconds=sum(f.seconds for f in done), operations=took)


def _one(training: Training, cast: Cast, number: int, out: Path | None, resume: bool, quiet: bool) -> Fit:
    train = training.train if training.train is not None else cast.train
    folder = None if out is None or not training.name else out / "trainings" / training.name
    kept = nn.ModuleDict({"student": training.student, **training.keeps})
    if folder is not None and (folder / _DONE).is_file():
        return _was(folder, kept, training.student)
    train = train() if callable(train) else train
    validation = cast.validation if training.judged else None
    seed = cast.seed if not training.name else key(_SEEDS, cast.seed, number) >> 33
    if not training.name:
        begun = resume and out is not None and (out / "checkpoints").is_dir()
        return fit(training.stages, train, validation, out=out, resume=begun, seed=seed, quiet=quiet)
    if folder is None:
        return fit(training.stages, train, validation, seed=seed, quiet=quiet)
    begun = resume and (folder / "checkpoints").is_dir()
    fitted = fit(training.stages, train, validation, out=folder, resume=begun, seed=seed, quiet=quiet)
    facts = {name: getattr(fitted, name) for name in ("validation", "best", "steps", "seconds", "operations")}
    if int(os.environ.get("RANK", "0")) == 0:  # in distributed runs one process writes
        write_tensors(folder / _KEPT, {name: t.detach().contiguous().clone() for name, t in kept.state_dict().items()})
        write_json(folder / _DONE, json.loads(json.dumps(facts)))
    wait_for_everyone()
    return fitted


def _was(folder: Path, kept: nn.ModuleDict, student: nn.Module) -> Fit:
    """A training that was finished before: its figures, and its weights in the models."""
    try:
        facts: dict[str, Any] = json.loads((folder / _DONE).read_text(encoding="utf-8"))
        tensors = load_file(folder / _KEPT)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"what a finished training left is damaged: {error}",
            where=str(folder),
            remedy="remove this folder and resume",
        ) from error
    load_into(kept, tensors, folder / _KEPT)
    student.eval()
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return Fit(student=student, history=[json.loads(line) for line in lines], **facts)

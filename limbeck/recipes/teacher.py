"""The teacher of a recipe: loaded, or trained on the labels first and kept for every run that wants the same one."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck.core import catalogue
from limbeck.core.distiller import Distiller
from limbeck.data.sources.source import DataSource
from limbeck.data.tasks import task_of
from limbeck.models import load_weights
from limbeck.models.student import save_student
from limbeck.recipes.build import Sizes, as_teacher_reads, check_loader, fewer, model_of, train_loader
from limbeck.recipes.schema import Data, Recipe, TeacherModel


def teacher_of(
    recipe: Recipe,
    source: DataSource,
    sizes: Sizes,
    folder: Path,
    *,
    spec: TeacherModel | None = None,
    device: torch.device | str = "cpu",
    main: bool = True,
    quiet: bool = False,
) -> nn.Module | None:
    """The model of a recipe's teacher, ready to teach; ``None`` where the recipe has none.

    One that is to be trained is looked for in ``folder`` under a name that follows from everything its weights depend
    on. If it is not there it is trained there, going on from where an earlier attempt was interrupted.

    Args:
        recipe: Which.
        source: The recipe's data.
        sizes: What models are built for.
        folder: Where trained teachers are kept.
        spec: Which of its teachers; default the one of its section ``teacher``.
        device: Where it trains.
        main: This process writes; in distributed runs one does.
        quiet: Show no progress bar.
    """
    spec = recipe.teacher if spec is None else spec
    if spec is None or not spec.model:
        return None
    data, source, sizes = as_teacher_reads(recipe.data, source, sizes)
    recipe = recipe.model_copy(update={"data": data})
    model = model_of(spec, sizes, spec.seed)
    if spec.train is None:
        return model
    place = folder / name_of(recipe, spec, sizes)
    if not (place / "student" / "student.json").is_file():
        from limbeck.engine.device import wait_for_everyone

        _train(model, recipe, spec, source, sizes, place, device, main, quiet)
        wait_for_everyone()  # the first process writes what all read
        model = model_of(spec, sizes, spec.seed)
    load_weights(model, place / "student")
    return model


def _train(
    model: nn.Module,
    recipe: Recipe,
    spec: TeacherModel,
    source: DataSource,
    sizes: Sizes,
    place: Path,
    device: torch.device | str,
    main: bool,
    quiet: bool,
) -> None:
    from limbeck.engine.fitting import fit
    from limbeck.engine.stage import Stage

    assert spec.train is not None
    loader = train_loader(_unseen(recipe.data), fewer(source.train, spec.samples), spec.seed, device)
    validation = None if source.validation is None else check_loader(recipe.data, source.validation, device)
    labels = catalogue.get(task_of(source.task).control).build()
    stage = Stage("teacher", Distiller(model, labels, logits=spec.logits), spec.train)
    begun = (place / "checkpoints").is_dir()
    fitted = fit([stage], loader, validation, out=place, resume=begun, seed=spec.seed, quiet=quiet)
    if not main:
        return
    save_student(
        fitted.student,
        place / "student",
        model=spec.model,
        options={**sizes.options(), **spec.options},
        auto=spec.auto,
        logits=spec.logits,
        validation=fitted.validation,
        steps=fitted.steps,
    )
    shutil.rmtree(place / "checkpoints", ignore_errors=True)  # it is done, and weighs several times the weights


def _unseen(data: Data) -> Data:
    """The data as a teacher is trained on them: how often the student sees a view is nothing to it."""
    return data.model_copy(update={"views": None, "view_seed": None, "per_read": 1})


def origin_of(data: Data, spec: TeacherModel, sizes: Sizes) -> dict[str, Any]:
    """Everything that a recipe's teacher depends on, as plain values."""
    start = spec.model_dump(mode="json", exclude={"train", "weights", "untrained", "cache"})
    if spec.head is None:  # as were names before there were heads
        start.pop("head")
    there = spec.weights is not None and Path(spec.weights).exists()
    return {
        "teacher": start,
        "sizes": sizes.options(),
        "weights": _content(Path(spec.weights)) if there and spec.weights is not None else None,
        "train": None if spec.train is None else spec.train.settled(),
        "data": None
        if spec.train is None
        else _unseen(data).model_dump(mode="json", exclude={"samples", "views", "view_seed", "per_read"}),
    }


def name_of(recipe: Recipe, spec: TeacherModel, sizes: Sizes) -> str:
    """The name of a trained teacher: its model's, and a hash of everything its weights depend on."""
    identity = origin_of(recipe.data, spec, sizes)
    digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=5).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9_]+', '-', spec.model).strip('-')[-40:]}-{digest}"


def _content(path: Path) -> str:
    """A hash of a file, or of every file in a folder."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, hashlib.blake2b).digest())
    return digest.hexdigest()

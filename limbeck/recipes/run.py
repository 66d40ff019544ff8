"""A recipe from its file to a finished run's folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from limbeck.core.errors import ConfigError, LimbeckError
from limbeck.core.files import write_json, write_text
from limbeck.data.language.loader import LanguageLoader
from limbeck.data.language.split import LanguageSplit
from limbeck.data.sources.source import DataSource
from limbeck.data.sources.split import Split
from limbeck.data.sources.texts import TextSplit
from limbeck.engine.config import FREE, TrainConfig
from limbeck.models.heads import settle_head
from limbeck.models.student import describe_inputs, save_student
from limbeck.recipes.answers import answers
from limbeck.recipes.build import Sizes, cast_of, check_loader, fewer, model_of, scheme_of, source_of, train_loader
from limbeck.recipes.caching import held_out_teacher
from limbeck.recipes.document import dump, parse
from limbeck.recipes.schema import Recipe
from limbeck.recipes.staff import caches_of, staff_of


def run(
    recipe: Recipe,
    out: str | os.PathLike[str],
    resume: bool = False,
    *,
    teachers: str | os.PathLike[str] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Do what a recipe says.

    The folder ``out`` gets ``recipe.yaml`` (every default written out), ``metrics.jsonl``, ``run.json``, checkpoints,
    ``student/`` (weights and how to build it) and ``result.json``. Under ``accelerate launch`` or ``torchrun`` every
    process calls it alike.

    Args:
        recipe: See :func:`limbeck.recipes.load`.
        out: The run's folder.
        resume: Go on where an interrupted run in ``out`` was; a finished one is only read.
        teachers: Where teachers that were trained first are kept; default ``teachers`` beside ``out``.
        quiet: Show no progress bar.

    Returns:
        The content of ``result.json``: what :func:`limbeck.analysis.assess` says of the student on held-out data, with
        ``name``, ``seed``, ``split`` (which data), ``data`` and ``training``.

    Raises:
        ConfigError: The folder holds a run already, or one of another recipe.
        LimbeckError: Whatever its parts say.
    """
    out, main, device = Path(out), int(os.environ.get("RANK", "0")) == 0, device_of(recipe.train)
    if main:
        _folder_for(recipe, out, resume)
    if (out / "result.json").is_file():
        return _read(out / "result.json")
    from limbeck.analysis.assess import assess
    from limbeck.schemes import perform

    if main:
        write_text(out / "recipe.yaml", dump(recipe.written()))
    source, caches = source_of(recipe.data), caches_of(recipe)
    views = next(iter(caches.values()), None)  # all of them must have the same
    loader = train_loader(recipe.data, fewer(source.train, recipe.data.samples), recipe.seed, device, cache=views)
    sizes = Sizes.of(loader)
    beside = Path(teachers) if teachers is not None else out.parent / "teachers"
    staff = staff_of(recipe, source, sizes, loader, caches, beside, device=device, main=main, quiet=quiet)
    model = staff.model
    student = model_of(recipe.student, sizes, recipe.seed, example=loader.example(2).to("cpu"), teacher=model)
    validation = None if source.validation is None else check_loader(recipe.data, source.validation, device)
    cast = cast_of(recipe, sizes, student, staff.teacher, loader, validation, teachers=staff.teachers)
    fitted = perform(scheme_of(recipe.scheme), cast, out=out, resume=resume, quiet=quiet)
    if not main:
        return {}
    spec, inputs, beside_it = recipe.student, loader.example(2).inputs, text_of(source)
    if isinstance(source.train, LanguageSplit):  # what packs have beside their tokens is for training alone
        ids = inputs["input_ids"]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        source.train.tokens.save(out / "student")
        files = {file.name for file in (out / "student").iterdir()} - {"model.safetensors", "student.json"}
        beside_it = {"tokenizer": sorted(files)}
    chosen = settle_head(fitted.student, validation.batches()) if validation is not None and source.test else {}
    save_student(
        fitted.student,
        out / "student",
        model=spec.model,
        options={**sizes.options(), **spec.options},
        auto=spec.auto,
        logits=spec.logits,
        inputs=describe_inputs(inputs),
        classes=source.classes,
        normalize=loader.describe().get("normalise"),
        learned={
            "teacher": None if staff.first is None else staff.first.model or staff.first.cache,
            **({"teachers": sorted(recipe.teachers)} if recipe.teachers else {}),
            "scheme": recipe.scheme.name,
            "loss": recipe.written()["loss"],
        },
        **beside_it,
    )
    name, split = held_out(source)
    place = next((p.device for p in fitted.student.parameters()), torch.device("cpu"))
    measured = check_loader(recipe.data, split, place)
    where = None if staff.first is None else staff.first.logits
    said = None  # in a comparison many runs ask the same teacher the same
    if model is not None and teachers is not None:
        identity = {"split": name, "source": source.describe()}
        said = answers(model.to(place), measured, beside.with_name("answers"), data=identity, where=where)
    result = assess(
        fitted.student,
        held_out_teacher(staff.first, source, measured) if model is None else model,
        measured,
        logits=spec.logits,
        teacher_logits=where,
        said=said,
    )
    if isinstance(measured, LanguageLoader):
        from limbeck.analysis.writing import assess_writing

        wrote = assess_writing(fitted.student, model, measured) or {}
        if result.get("teacher") is not None:
            result["teacher"].update(wrote.pop("teacher", {}))
        result.update(wrote)
    training = {name: getattr(fitted, name) for name in ("steps", "seconds", "best", "operations")}
    if chosen:
        training["head"] = chosen
    if fitted.validation is not None:
        training["validation"] = fitted.validation.get(recipe.train.monitored(source.task))
    facts = {"name": recipe.name, "seed": recipe.seed, "split": name, "data": source.describe(), "training": training}
    result = json.loads(json.dumps({**result, **facts}))
    write_json(out / "result.json", result)
    return result


def text_of(source: DataSource) -> dict[str, Any]:
    """How texts become what the student takes, for its folder."""
    train = source.train
    return {"text": train.tokenizer.written()} if isinstance(train, TextSplit) else {}


def held_out(source: DataSource) -> tuple[str, Split]:
    """What is reported on: the test split, else the validation split, else, and said so, what was trained on."""
    for name in ("test", "validation"):
        split = getattr(source, name)
        if split is not None:
            return name, split
    return "train", source.train


def _folder_for(recipe: Recipe, out: Path, resume: bool) -> None:
    """Refuse a folder that another run is in."""
    kept = out / "recipe.yaml"
    if out.exists() and not out.is_dir():
        raise ConfigError("this is a file, not a folder", where=str(out), remedy="give another folder with --out")
    if not kept.is_file():
        return
    if not resume:
        raise ConfigError(
            "this folder holds a run already",
            where=str(out),
            remedy="resume it with --resume, or choose another with --out",
        )
    old = parse(kept.read_text(encoding="utf-8"), str(kept)).data
    for place, was, now in differences(old, recipe.written()):
        raise ConfigError(
            "the recipe is another than the run in this folder was started with",
            where=place,
            found=now,
            wanted=was,
            remedy="resume with the recipe it was started with, or choose another folder with --out",
        )


def differences(old: Any, new: Any, place: str = "") -> Iterator[tuple[str, str, str]]:
    """Where two recipes differ in what weights depend on: place, old value, new value."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            if place.rpartition(".")[2] == "train" and key in FREE:
                continue
            below = f"{place}.{key}" if place else key
            yield from differences(old.get(key), new.get(key), below)
    elif old != new:
        yield place, _shown(old), _shown(new)


def _shown(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value, default=str)


def _read(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LimbeckError(
            f"this file is damaged: {error}", where=str(path), remedy="remove it and resume the run"
        ) from error
    if not isinstance(result, dict):
        raise LimbeckError("this file is damaged", where=str(path), remedy="remove it and resume the run")
    return result


def device_of(config: TrainConfig) -> torch.device:
    """Where the engine will train, so that resident data lie there from the beginning."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if config.device == "cpu" or accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))

"""From a teacher, a student and data to a trained student, in one line."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import limbeck.objectives  # noqa: F401  registers the methods
from limbeck.core import catalogue
from limbeck.core.objective import Objective, Terms
from limbeck.core.teacher import FrozenTeacher, Teacher, as_teacher
from limbeck.data.build import as_loader
from limbeck.data.language.loader import LanguageLoader
from limbeck.data.sources.load import load_source
from limbeck.data.sources.source import DataSource
from limbeck.data.sources.split import MEASURED, Split
from limbeck.engine.config import TrainConfig
from limbeck.models.heads import fit_head
from limbeck.models.student import describe_inputs, save_student
from limbeck.recipes.build import loss_of
from limbeck.recipes.run import device_of
from limbeck.recipes.schema import usual_scheme, usual_terms
from limbeck.teachers.cached import CachedTeacher
from limbeck.teachers.several import SeveralTeachers


@dataclass
class Distilled:
    """What distillation came to.

    Args:
        student: The trained model: the module that was given, in evaluation mode, with no hooks and no wrappers.
        result: What :func:`limbeck.analysis.assess` says of it on the validation data; empty where there are none.
        history: The lines of ``metrics.jsonl``.
        steps: Optimizer steps.
        seconds: How long training took.
    """

    student: nn.Module
    result: dict[str, Any]
    history: list[dict[str, Any]]
    steps: int
    seconds: float


def distill(
    teacher: nn.Module | Teacher | None,
    student: nn.Module,
    data: Any,
    method: str | Objective | Terms = "kd",
    *,
    validation: Any = None,
    batch_size: int = 128,
    augment: Any = None,
    normalize: Any = None,
    scheme: str | None = None,
    scheme_options: dict[str, Any] | None = None,
    teachers: Mapping[str, nn.Module | Teacher] | None = None,
    players: dict[str, nn.Module] | None = None,
    fresh: Callable[[int], nn.Module] | None = None,
    logits: str | None = None,
    teacher_logits: str | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    seed: int = 0,
    task: str | None = None,
    quiet: bool = False,
    **train: Any,
) -> Distilled:
    """Train a student to say what its teacher says.

    Works with any module: one that takes a tensor, a tuple (positions) or a dict (keywords), and returns a tensor, a
    tuple, a dict or a transformers ``ModelOutput``. The teacher is left as it was: its weights, its modes, its device.

    Args:
        teacher: A module, or anything that answers like a ``Teacher``, such as ``limbeck.teachers.CachedTeacher``;
            ``None`` for methods that learn from labels.
        student: The module to train, in place. A method that wants another last layer (see
            :func:`limbeck.models.put_head`) puts it on.
        data: ``(inputs, labels)`` tensors, a Dataset, a DataLoader, a loader of ``limbeck.data``; or a source or its
            name (``"digits"``, a folder), whose validation split is then used too.
        method: A method's name, for the sum that its card calls usual (``limbeck show kd``), or a loss of your own:
            ``CrossEntropy() + 0.9 * KD(temperature=2.0)``.
        validation: Held-out data in any of those forms, to judge by; ``None`` judges nothing.
        batch_size: Samples of a step; a DataLoader keeps its own.
        augment: Augmentations of images, such as ``["pad_crop", "flip"]``.
        normalize: Of images, such as ``"imagenet"``.
        scheme: Who teaches whom, and when; default the method's own.
        scheme_options: Of the scheme.
        teachers: Further teachers by name, for schemes of several; without ``teacher``, they together are it.
        players: Further models by name, for schemes that ask for them (assistants, peers).
        fresh: Makes another student with a random start of its own, for schemes of several (generations, peers).
        logits: Where logits stand in the student's output, where that does not tell itself.
        teacher_logits: The same for the teacher.
        out: Folder for metrics, checkpoints and the student; ``None`` writes nothing.
        resume: Go on from the newest checkpoint in ``out``.
        seed: Of everything random in data and training.
        task: What the labels mean, where the data do not say: ``"multilabel"`` or ``"regression"``; a method's usual
            sum, and what it is judged by, follow from it.
        quiet: Show no progress bar.
        train: Settings of ``TrainConfig``: ``epochs`` or ``steps``, ``optimizer``, ``lr``, ``schedule``, ...

    Raises:
        ConfigError: No such method, scheme or setting, or the method needs a teacher and there is none.
        LimbeckError: Data, models or taps do not fit the method.

    >>> import torch
    >>> inputs = torch.randn(256, 8); labels = (inputs[:, 0] > 0).long()
    >>> done = distill(nn.Linear(8, 2), nn.Linear(8, 2), (inputs, labels), "kd", epochs=2, lr=0.1, quiet=True)
    >>> type(done.student).__name__, done.steps
    ('Linear', 4)
    """
    config = catalogue.check_options(TrainConfig, train, "distill")
    settings = TrainConfig(**config)
    device = device_of(settings)
    if isinstance(data, (str, Path, DataSource)):
        source = load_source(data)
        data, validation = source.train, source.validation if validation is None else validation
    views = {"augment": augment, "normalise": normalize, "seed": seed, "device": device, "task": task}
    staff = {} if teacher is None else {"teacher": as_teacher(teacher, teacher_logits)}
    staff |= {name: as_teacher(other, teacher_logits) for name, other in (teachers or {}).items()}
    judge = next(iter(staff.values()), None)
    alone = teacher is not None or len(staff) < 2
    if isinstance(judge, CachedTeacher):  # it has spoken of certain views
        views |= judge.views
    loader = as_loader(data, batch_size=batch_size, train=True, **views)
    same = {"normalise": normalize, "device": device, "task": task}
    size = validation.measured if isinstance(validation, Split) else MEASURED
    held = None if validation is None else as_loader(validation, batch_size=size, **same)
    loss, scheme = method_loss(method, loader.task), scheme or usual_scheme(method).name
    from limbeck.analysis.assess import assess
    from limbeck.schemes import Cast, build, perform

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fit_head(student, loss, example=loader.example(2), teacher=judge)
    cast = Cast(
        student,
        loss,
        judge if alone else SeveralTeachers(staff.values()),
        settings,
        train=loader,
        validation=held,
        teachers=staff,
        players=players or {},
        fresh=fresh,
        logits=logits,
        seed=seed,
    )
    with _as_they_were(staff.values()):
        fitted = perform(build(scheme, **scheme_options or {}), cast, out=out, resume=resume, quiet=quiet)
        asked = None if isinstance(judge, CachedTeacher) else judge  # of held-out data a cache knows nothing
        result = {} if held is None else assess(student, asked, held, logits=logits)
    if out is not None:
        inputs = describe_inputs(loader.example(2).inputs)
        save_student(student, Path(out) / "student", logits=logits, inputs=inputs)
        if isinstance(loader, LanguageLoader):
            loader.split.tokens.save(Path(out) / "student")
    return Distilled(fitted.student, result, fitted.history, fitted.steps, fitted.seconds)


def method_loss(method: str | Objective | Terms, task: str = "classification") -> Terms:
    """A method's name as the sum its card calls usual, or a loss as it is.

    >>> method_loss("kd").names
    ['cross_entropy', 'kd']
    """
    if not isinstance(method, str):
        return Terms.of(method)
    return loss_of(usual_terms(method, task))


@contextmanager
def _as_they_were(teachers: Iterable[Teacher]) -> Iterator[None]:
    """Put the modes and devices of teachers that are models back afterwards."""
    models = [teacher.model for teacher in teachers if isinstance(teacher, FrozenTeacher)]
    modes = {module: module.training for model in models for module in model.modules()}
    devices = [next((p.device for p in model.parameters()), None) for model in models]
    try:
        yield
    finally:
        for model, device in zip(models, devices, strict=True):
            if device is not None:
                model.to(device)
        for module, training in modes.items():
            module.training = training

"""Every mistake in a recipe at once, before any training: form, names, options, files, and a dry run on few samples."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from limbeck.core import catalogue
from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller
from limbeck.core.errors import LimbeckError, TapError
from limbeck.core.objective import DataInfo, Objective, Terms
from limbeck.core.roles import resolve
from limbeck.core.schedules import Schedule
from limbeck.core.survey import Place, call_model, dry, survey
from limbeck.core.teacher import Teacher, as_teacher
from limbeck.core.trace import logits_of
from limbeck.data.augment import parse_augment
from limbeck.data.build import build_loader
from limbeck.data.language.loader import LanguageLoader
from limbeck.data.loader import Loader
from limbeck.data.normalise import normalisation
from limbeck.data.sources.source import DataSource
from limbeck.data.sources.split import Split, StreamSplit
from limbeck.data.tasks import TASKS
from limbeck.models import load_weights, zoo
from limbeck.models.heads import check_head
from limbeck.models.load import with_head
from limbeck.recipes.build import Sizes, cast_of, fewer, model_of, scheme_of, source_of, teacher_sizes, train_loader
from limbeck.recipes.caching import cache_of, cached_teacher
from limbeck.recipes.document import Document
from limbeck.recipes.load import read
from limbeck.recipes.problem import Key, Problem, RecipeError, dotted
from limbeck.recipes.schema import Data, Model, Named, Recipe, TeacherModel, Term, usual_head
from limbeck.recipes.validate import problems_of, sections
from limbeck.teachers.cached import CachedTeacher
from limbeck.teachers.several import SeveralTeachers

T = TypeVar("T")
_TRIED = 4  # samples in the dry run
_BUILT = ("data", "student", "teacher", "teachers", "loss", "scheme")  # sections that the dry run stands on
_USUAL = "offline"


def check(recipe: str | os.PathLike[str] | Recipe, overrides: Sequence[str] = ()) -> list[Problem]:
    """Everything that is wrong with a recipe; an empty list where it can be run.

    Besides its form, this looks at what the recipe names: files, data, methods and their options, models and weights,
    places in the models; and it runs both models and the loss once on a few samples. Nothing is trained or written.

    Args:
        recipe: A file, a shipped recipe's name, a run's folder, or a recipe in hand.
        overrides: Settings to change, such as ``"train.epochs=5"``.

    >>> for problem in check("digits", ["train.epochs=-1", "loss=fitnet"]):
    ...     print(problem)
    train.epochs: this cannot be; found -1; wanted greater than or equal to 1
    loss.fitnet: no such method; found 'fitnet'; did you mean 'fitnets'...
    """
    try:
        document = Document(recipe.written(), recipe.name) if isinstance(recipe, Recipe) else read(recipe, overrides)
    except RecipeError as error:
        return error.problems
    except LimbeckError as error:
        return [Problem.of(error, error.where or "", None)]
    return _Check(document).run()


class _Check:
    """One look at a recipe. Each step works with what the steps before it left usable."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.usable, self.problems = sections(document)
        self.batch: Batch | None = None
        self.info = DataInfo()
        self.cached: tuple[CachedTeacher, Batch] | None = None
        self.staff: dict[str, Teacher] = {}  # all teachers by name
        self.sizes = Sizes()
        self.loader: Loader | None = None  # of a few samples
        self.judged = False  # by validation data

    def run(self) -> list[Problem]:
        """All problems, in the order of the file."""
        sizes = Sizes(10, 3, 32)  # names and options can be tried without the data
        if "data" in self.usable:
            self.data(self.usable["data"])
            if self.batch is not None and self.loader is not None:
                sizes = self.sizes = Sizes.of(self.loader, self.batch)
        student = self.model(("student",), sizes) if "student" in self.usable else None
        spec = self.usable.get("teacher")
        other = teacher_sizes(self.loader.split, sizes) if isinstance(self.loader, LanguageLoader) else sizes
        teacher = self.teacher(("teacher",), spec, other) if spec is not None and spec.cache is None else None
        self.further(other)
        terms = self.loss(self.usable["loss"]) if "loss" in self.usable else {}
        if teacher is not None:
            teacher = self.head(("teacher",), teacher, self.usable["teacher"].head, None)
        if student is not None:
            own, loss = self.usable["student"].head, self.usable.get("loss", {})
            wanted = own if own is not None else self.attempt(("student", "head"), lambda: usual_head(loss))
            student = self.head(("student",), student, wanted, teacher)
        for name, player in self.usable.get("players", {}).items():
            self.attempt(("players", name, "model"), lambda: model_of(player, sizes, 0, weights=False))  # noqa: B023
        if "scheme" in self.usable:
            self.scheme(self.usable["scheme"])
        if self.batch is not None:
            self.dry_run(terms, student, teacher)
        lines = [(p.line or 10**9, i) for i, p in enumerate(self.problems)]
        return [self.problems[i] for _, i in sorted(lines)]

    def add(self, key: Key, message: str, **facts: str | None) -> None:
        """Note a problem."""
        self.problems.append(Problem(message, dotted(key), self.document.line(key), None, **facts))

    def attempt(self, key: Key, call: Callable[[], T]) -> T | None:
        """What a call returns; its error becomes a problem of this place, or of the option within it that it names."""
        try:
            return call()
        except LimbeckError as error:
            place = _within(key, error, self.document.data)
            self.problems.append(Problem.of(error, dotted(place), self.document.line(place)))
            return None

    def data(self, data: Data) -> None:
        """Source, augmentations, normalisation, and whether there is enough of it."""
        augments: list[Any] = []
        for i, item in enumerate(data.augment):
            try:
                augments += parse_augment([item])
            except LimbeckError as error:
                inside = (error.where or "").removeprefix("augment[0]").strip(".")
                key = ("data", "augment", i)
                where = ".".join(part for part in (dotted(key), inside) if part)
                self.problems.append(Problem.of(_without_place(error), where, self.document.line(key)))
        spec, normal = data.normalize, True
        if spec is not None:
            normal = self.attempt(("data", "normalize"), lambda: normalisation(spec)) is not None
        source = self.attempt(("data", "source"), lambda: source_of(data))
        if source is None:
            return
        self.amounts(data, source)
        self.held_out(source)
        if normal and len(augments) == len(data.augment):
            self.look(data, source)

    def amounts(self, data: Data, source: DataSource) -> None:
        """Whether there are as many samples as are asked for, and a batch of them."""
        there, teacher = source.train.samples, self.usable.get("teacher")
        if there is None:
            return
        asked = [(("data", "batch_size"), data.batch_size, there), (("data", "samples"), data.samples, there)]
        if data.samples is not None and data.batch_size <= there:
            asked[0] = (("data", "batch_size"), data.batch_size, min(data.samples, there))
        if teacher is not None and teacher.samples is not None:
            asked.append((("teacher", "samples"), teacher.samples, there))
        for key, wanted, most in asked:
            if wanted is not None and wanted > most:
                message = "there are not that many samples to train on"
                self.add(key, message, found=str(wanted), wanted=f"at most {most}")

    def look(self, data: Data, source: DataSource) -> None:
        """Read a few samples as training would."""
        split, train = source.train, fewer(source.train, data.samples)
        few = split
        if not isinstance(split, StreamSplit) and split.samples:
            few = split.subset(_few(split.samples, split.labels))
        made = self.attempt(("data",), lambda: build_loader(
            few, batch_size=_TRIED, train=False, augment=data.augment, normalise=data.normalize, workers=0
        ))  # fmt: skip
        teacher = self.usable.get("teacher")
        if teacher is not None and teacher.cache is not None:
            self.cached = self.attempt(("teacher", "cache"), lambda: self.cache(data, train))
            if self.cached is not None:
                self.batch = self.cached[1]
        elif data.views is not None and data.views % data.per_read:
            self.add(("data", "per_read"), "does not divide the views", found=f"{data.per_read} of {data.views}")
        self.loader, self.judged = made, source.validation is not None
        if made is not None and self.batch is None:
            self.batch = self.attempt(("data",), lambda: made.example(_TRIED))
        few_batches = made.plain if made is not None else None  # what is made of all samples is tried on these
        tokenizers = made.tokenizers if isinstance(made, LanguageLoader) else None
        self.info = DataInfo(
            train.samples, train.labels, split.class_count, few_batches, task=split.task, tokenizers=tokenizers
        )

    def cache(self, data: Data, train: Split) -> tuple[CachedTeacher, Batch]:
        """The cache in its teacher's place, and the first samples of the set in the view it has of them."""
        spec = self.usable["teacher"]
        # The teacher as training sees it: its own training takes over what the student's says.
        whole = Recipe(**self.usable).teacher if not self.problems else None
        spec = whole or spec.model_copy(update={"model": ""})
        cache = cache_of(spec, data)
        assert cache is not None
        loader = train_loader(data, train, 0, cache=cache, resident=False)  # a few samples tell
        sizes = Sizes.of(loader)
        return cached_teacher(spec, data, cache, loader, sizes), loader.example(_TRIED)

    def held_out(self, source: DataSource) -> None:
        """Whether there is what the training is judged by, and of the same classes."""
        train, classes = self.usable.get("train"), source.train.class_count
        if train is not None and source.validation is None:
            for name, asked in (("patience", train.patience is not None), ("select", train.select == "best")):
                if asked:
                    self.add(("train", name), "this needs validation data", remedy="give data.options.validation")
        for held in (source.validation, source.test):
            if held is not None and classes and held.class_count and held.class_count > classes:
                self.add(("data", "source"), "a held-out split has classes that the training set lacks")

    def model(self, key: Key, sizes: Sizes) -> nn.Module | None:
        """Build a model, and see whether its weights fit."""
        spec = self.spec(key)
        model = self.attempt((*key, "model"), lambda: model_of(spec, sizes, 0, weights=False))
        head = None if spec.head is None else spec.head.written()
        if head is not None and (model is None or self.batch is None):  # else it is put on the model in a moment
            self.attempt((*key, "head"), lambda: check_head(head))
        if spec.weights is None:
            return model
        where = (*key, "weights")
        if not Path(spec.weights).exists():
            self.add(
                where,
                "there is no such file",
                found=spec.weights,
                remedy="check the path; it counts from the current folder",
            )
            return None
        if model is None or self.batch is None:
            return None
        built, weights = model, spec.weights
        if head is not None:  # they may be of the model with its head
            return model
        return model if self.attempt(where, lambda: load_weights(built, weights)) is not None else None

    def head(self, key: Key, model: nn.Module | None, head: Named | None, judge: nn.Module | None) -> nn.Module | None:
        """Put a model's head on, and read weights that may be of both together."""
        spec = self.spec(key)
        if model is None or head is None or self.batch is None:
            return model
        weights = None if spec.head is None else spec.weights
        built, batch, written = model, self.batch, head.written()

        def put() -> bool:
            try:
                with_head(built, written, weights, example=batch, teacher=judge)
            except LimbeckError:
                raise
            except Exception:  # a model that does not take these data is told of by the dry run
                return True
            return True

        return model if self.attempt((*key, "head"), put) else None

    def spec(self, key: Key) -> Model:
        """The section of a model."""
        section: Any = self.usable[str(key[0])]
        found: Model = section[key[1]] if len(key) > 1 else section
        return found

    def further(self, sizes: Sizes) -> None:
        """The teachers beside the teacher: models with their heads, or caches."""
        for name, spec in self.usable.get("teachers", {}).items():
            key: Key = ("teachers", name)
            if spec.cache is not None:
                self.attempt((*key, "cache"), lambda: cache_of(spec, self.usable["data"]))  # noqa: B023
                continue
            model = self.head(key, self.teacher(key, spec, sizes), spec.head, None)
            if model is None or self.batch is None or self.places(key, model) is None:
                continue
            self.staff[name] = as_teacher(model, spec.logits)

    def teacher(self, key: Key, spec: TeacherModel, sizes: Sizes) -> nn.Module | None:
        """A teacher's model, and where its knowledge comes from."""
        if zoo.is_known(spec.model) and spec.weights is None and spec.train is None and not spec.untrained:
            self.add(
                key,
                f"{spec.model} would teach with random weights",
                remedy="give its weights, or train: {epochs: ...}, or say untrained: true where that is meant",
            )
        return self.model(key, sizes)

    def loss(self, terms: dict[str, Term]) -> dict[str, Objective]:
        """Methods, their options and weights; and what they need."""
        made: dict[str, Objective] = {}
        for name, term in terms.items():
            key: Key = ("loss", name)
            self.attempt((*key, "weight"), term.schedule)
            named = (*key, "method") if term.method else key
            method = self.attempt(named, lambda: catalogue.get(term.method or name, "loss"))  # noqa: B023
            if method is None:
                continue
            try:
                method.options.model_validate({**method.preset, **term.options})
            except ValidationError as error:
                for problem in problems_of(error, key, method.options, self.document):
                    self.problems.append(_hint(problem, term))
                continue
            objective = self.attempt(key, lambda: method.build(dotted(key), **term.options))  # noqa: B023
            if objective is None:
                continue
            made[name] = objective
            self.suits(key, method.card)
            least, data = objective.contract.least_samples, self.usable.get("data")
            if data is not None and data.batch_size < least:
                self.add(key, f"this method needs batches of {least} or more", found=str(data.batch_size))
            for need in method.card.needs:
                self.needs(key, need)
        learners = [name for name, objective in made.items() if objective.teacher_taps]
        none = self.usable.get("teacher", ...) is None and not self.usable.get("teachers")
        if learners and none and not self.own_teacher():
            self.add(
                ("teacher",),
                f"{', '.join(learners)} cannot work without a teacher",
                remedy="add a teacher, or drop the term",
            )
        return made

    def own_teacher(self) -> bool:
        """Whether the scheme makes its teacher itself."""
        scheme = self.usable.get("scheme")
        if scheme is None or scheme.name == _USUAL:
            return False
        from limbeck import schemes

        found = schemes.schemes().get(scheme.name)
        return found is not None and found.own_teacher != "no"

    def suits(self, key: Key, card: Card) -> None:
        """Whether a loss on the labels is one for labels such as these."""
        task, known = self.info.task, set(card.tasks) & set(TASKS)
        if self.batch is not None and card.knowledge == "control" and known and task not in known:
            message = "this loss is not for labels such as these data have"
            remedy = f"use {TASKS[task].control}, or say in the source what the labels mean"
            self.add(key, message, found=task, wanted=" or ".join(sorted(known)), remedy=remedy)

    def needs(self, key: Key, need: str) -> None:
        """Whether the data have what a method needs."""
        if self.batch is None:
            return
        there = {"labels": self.batch.labels, "index": self.batch.index, "samples": self.info.samples}
        if need in there and there[need] is None:
            self.add(
                key,
                f"this method needs {need}, and the data have none",
                remedy="use another method, or data that have them",
            )

    def scheme(self, scheme: Named) -> None:
        """Its name and options. The usual one has none; the others come with the engine, which imports slowly."""
        key: Key = ("scheme", scheme.name) if scheme.options else ("scheme",)
        if scheme.name == _USUAL and not scheme.options:
            return
        from limbeck import schemes

        options = self.attempt(key, lambda: schemes.options(scheme.name))
        if options is None:
            return
        try:
            options.model_validate(scheme.options)
        except ValidationError as error:
            self.problems += problems_of(error, key, options, self.document)

    def dry_run(self, terms: dict[str, Objective], student: nn.Module | None, teacher: nn.Module | None) -> None:
        """Both models and the loss, once, on a few samples."""
        assert self.batch is not None
        batch = self.batch
        good = student is not None and bool(terms)
        for key, model in ((("student",), student), (("teacher",), teacher)):
            places = None if model is None else self.places(key, model)
            good &= model is None or places is not None
            for name, objective in terms.items() if places is not None else ():
                for tap in objective.student_taps if key == ("student",) else objective.teacher_taps:
                    good &= tap == "logits" or self.found(("loss", name), key[0], tap, places)
        if not good or student is None or any(p.where.split(".")[0] in _BUILT for p in self.problems):
            return
        specs: dict[str, Any] = self.usable
        loss = Terms(list(terms.values()), [specs["loss"][name].schedule() for name in terms], list(terms))
        judge: Teacher | None = None if self.cached is None else self.cached[0]
        if teacher is not None:
            judge = as_teacher(teacher, specs["teacher"].logits)
        if judge is not None:
            self.staff = {"teacher": judge, **self.staff}
        elif self.staff:
            judge = SeveralTeachers(self.staff.values())
        if len(self.staff) < len(self.usable.get("teachers", {})):
            return  # some are wrong, and were told of, or are caches that only a run reads
        stages = self.attempt(("scheme",), lambda: self.stages(student, judge, loss))
        for distiller in stages or ():
            if isinstance(self.loader, LanguageLoader) and not self.reads(distiller, self.loader, batch):
                return
            self.attempt(("loss",), lambda: _once(distiller, batch, self.info))  # noqa: B023

    def reads(self, distiller: Distiller, loader: LanguageLoader, batch: Batch) -> bool:
        """Whether both models can learn from these texts."""
        from limbeck.engine.language import check_language

        before = len(self.problems)
        self.attempt(("data",), lambda: check_language(distiller, loader, batch))
        return len(self.problems) == before

    def stages(self, student: nn.Module, teacher: Teacher | None, loss: Terms) -> list[Distiller]:
        """What the scheme trains with, one after the other."""
        specs: dict[str, Any] = self.usable
        logits, scheme = specs["student"].logits, specs.get("scheme")
        if scheme is None or scheme.name == _USUAL or set(Recipe.model_fields) - set(specs):
            return [Distiller(student, loss, teacher, logits=logits)]
        recipe = Recipe(**specs)
        held = self.loader if self.judged else None
        cast = cast_of(recipe, self.sizes, student, teacher, self.loader, held, teachers=self.staff)
        cast = replace(cast, loss=loss)
        first = next(iter(scheme_of(scheme).trainings(cast)))  # those that follow stand on what it learns
        if callable(first.train) and not first.judged:
            return []  # of another task, on data that are only made when it begins
        return [stage.distiller for stage in first.stages]

    def found(self, key: Key, whose: str, tap: str, places: dict[str, Place] | None) -> bool:
        """Whether a tap is a place of a model that was surveyed."""
        if places is None:
            return False
        try:
            resolve(tap, places)
        except TapError as error:
            place = _within(key, error, self.document.data)
            said = TapError(
                f"in the {whose} {error.message}", found=error.found, wanted=error.wanted, remedy=error.remedy
            )
            self.problems.append(Problem.of(said, dotted(place), self.document.line(place)))
            return False
        return True

    def places(self, key: Key, model: nn.Module) -> dict[str, Place] | None:
        """Where one can listen to a model on this data."""
        assert self.batch is not None
        try:
            places = survey(model, self.batch.inputs)
            with dry(model):
                output = call_model(model, self.batch.inputs)
        except LimbeckError as error:
            self.problems.append(Problem.of(error, dotted(key), self.document.line(key)))
        except Exception as error:  # a model raises whatever it likes on inputs it does not take
            first = "".join(str(error).strip().splitlines()[:1])
            self.add((*key, "model"), f"the model does not take these data: {type(error).__name__}: {first}")
        else:
            where = self.spec(key).logits
            if self.attempt((*key, "logits"), lambda: logits_of(output, where)) is not None:
                return places
        return None


def _few(samples: int, labels: Tensor | None) -> Tensor:
    """The first samples, and of labelled and unlabelled ones both."""
    rows = torch.arange(samples)
    if labels is not None and not labels.is_floating_point():
        labelled = (labels.cpu() >= 0).reshape(samples, -1).any(dim=1)
        own, none = rows[labelled], rows[~labelled]
        if len(own) and len(none):
            rows = torch.cat([own[: _TRIED - 1], none[:1]])
    return rows[:_TRIED]


def _once(distiller: Distiller, batch: Batch, info: DataInfo) -> None:
    """One forward of a stage; nothing of it stays in the models."""
    try:
        with torch.no_grad():
            distiller.setup(batch, info)(batch)
    finally:
        distiller.close()


def _within(key: Key, error: LimbeckError, data: Any) -> Key:
    """The option inside a place that an error names: by its own place, or as what it found."""
    value = data
    for step in key:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            break
    beside = data.get(str(key[0])) if isinstance(data, dict) else None
    for base, options in (
        (key, value),
        ((key[0], "options"), beside.get("options") if isinstance(beside, dict) else None),
    ):
        for name, option in options.items() if isinstance(options, dict) else ():
            named = error.where is not None and (error.where == name or error.where.endswith(f".{name}"))
            tap = isinstance(error, TapError) and error.where == option
            if named or tap or error.found == repr(name):
                return (*base, name)
    return key


def _without_place(error: LimbeckError) -> LimbeckError:
    return type(error)(error.message, found=error.found, wanted=error.wanted, remedy=error.remedy)


def _hint(problem: Problem, term: Term) -> Problem:
    """A schedule written as an option is a weight in the wrong place."""
    name = problem.where.rpartition(".")[2]
    if name in Schedule.known and name in term.options:
        return Problem(problem.message, problem.where, problem.line, remedy=f"write weight: {{{name}: ...}}")
    return problem

"""From a recipe's sections to the things they name: data, models, losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from limbeck.cache.folder import Cache
from limbeck.core import catalogue
from limbeck.core.batch import Batch
from limbeck.core.errors import ModelError
from limbeck.core.hashing import key
from limbeck.core.objective import Objective, Terms
from limbeck.core.teacher import Teacher, as_teacher
from limbeck.data.build import Resident, build_loader
from limbeck.data.language.loader import LanguageLoader
from limbeck.data.language.split import LanguageSplit
from limbeck.data.language.tokens import Tokens
from limbeck.data.loader import Loader
from limbeck.data.order import epoch_order
from limbeck.data.sources.load import load_source
from limbeck.data.sources.source import DataSource
from limbeck.data.sources.split import Split
from limbeck.models.load import load_model, with_head
from limbeck.recipes.schema import Data, Model, Named, Recipe, Term

if TYPE_CHECKING:
    from limbeck.schemes import Cast, Scheme


def source_of(data: Data) -> DataSource:
    """The source of a recipe's data, with all its samples."""
    return load_source(data.source, **data.options)


def as_teacher_reads(data: Data, source: DataSource, sizes: Sizes) -> tuple[Data, DataSource, Sizes]:
    """Data, their source and models' sizes in the tokens of a teacher that has others; else what was given."""
    if not isinstance(source.train, LanguageSplit) or source.train.teacher_tokens is None:
        return data, source, sizes
    options = {name: value for name, value in data.options.items() if name not in ("tokenizer", "template")}
    for name in ("tokenizer", "template"):
        if f"teacher_{name}" in options:
            options[name] = options.pop(f"teacher_{name}")
    data = data.model_copy(update={"options": options})
    return data, source_of(data), teacher_sizes(source.train, sizes)


def teacher_sizes(split: Split, sizes: Sizes) -> Sizes:
    """What a teacher is built for: what the student is, but for its own tokens where it has such."""
    tokens = split.teacher_tokens if isinstance(split, LanguageSplit) else None
    return sizes if tokens is None else replace(sizes, vocabulary=tokens.size, marks=marks_of(tokens))


def fewer(split: Split, samples: int | None, seed: int = 0) -> Split:
    """So many samples of a split, evenly from the classes and the same for everybody; ``None``: all of them.

    >>> fewer(load_source("digits").train, 30).labels.bincount().tolist()
    [3, 3, 3, 3, 3, 3, 3, 3, 3, 3]
    """
    count = split.samples
    if samples is None or count is None or samples >= count:
        return split
    order, labels = epoch_order(count, seed, 0), split.labels
    if labels is not None and labels.ndim == 1 and not labels.is_floating_point():
        order = order[labels[order].argsort(stable=True)]
        _, sizes = labels[order].unique_consecutive(return_counts=True)
        place = torch.arange(count) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        order = order[((place + 0.5) / sizes.repeat_interleave(sizes)).argsort(stable=True)]
    return split.subset(order[:samples].sort().values)


def train_loader(
    data: Data,
    split: Split,
    seed: int,
    device: torch.device | str = "cpu",
    *,
    cache: Cache | None = None,
    resident: Resident = "auto",
) -> Loader:
    """Shuffled and augmented batches of a split; in the views that a cache has, where there is one."""
    views, view_seed = data.views, data.view_seed
    if cache is not None:
        views = cache.header.views if views is None else views
        view_seed = cache.header.data["view_seed"] if view_seed is None else view_seed
    return build_loader(
        split,
        batch_size=data.batch_size,
        train=True,
        augment=data.augment,
        normalise=data.normalize,
        seed=seed,
        device=device,
        views=views,
        view_seed=view_seed,
        per_read=data.per_read,
        resident=resident,
    )


def check_loader(data: Data, split: Split, device: torch.device | str = "cpu") -> Loader:
    """Plain batches of a split, in order, for measuring."""
    return build_loader(split, batch_size=split.measured, train=False, normalise=data.normalize, device=device)


def marks_of(tokens: Tokens) -> dict[str, int | None]:
    """Ids of the tokens that begin, end and fill up a text."""
    return {name: getattr(tokens, name) for name in ("bos", "eos", "pad")}


_PLAYERS = 10  # keeps the seeds of further models apart from other draws
_BESIDE = {"spec", "weights", "auto", "pretrained", "head"}


@dataclass(frozen=True)
class Sizes:
    """What models are built for.

    Args:
        num_classes: How many classes the data have, ``None`` where they have none.
        in_channels: Channels of an image, ``None`` where inputs are no images.
        image_size: Height of an image.
        in_features: Length of a feature vector, ``None`` where inputs are none.
        vocabulary: Number of token ids, ``None`` where inputs are no texts.
        marks: Ids of the tokens that begin, end and fill up a text (``bos``, ``eos``, ``pad``), of language models.
    """

    num_classes: int | None = None
    in_channels: int | None = None
    image_size: int | None = None
    in_features: int | None = None
    vocabulary: int | None = None
    marks: dict[str, int | None] | None = None

    @classmethod
    def of(cls, loader: Loader, example: Batch | None = None) -> Sizes:
        """The sizes that a loader knows, and those that its batches show."""
        inputs = (loader.example(1) if example is None else example).inputs
        if isinstance(inputs, torch.Tensor) and inputs.is_floating_point() and inputs.ndim in (2, 4):
            shape = inputs.shape[1:]
            return cls(loader.classes, *shape[:2]) if inputs.ndim == 4 else cls(loader.classes, in_features=shape[0])
        known = marks_of(loader.split.tokens) if isinstance(loader, LanguageLoader) else None
        return cls(loader.classes, vocabulary=loader.vocabulary, marks=known)

    def options(self) -> dict[str, Any]:
        """Those that are known, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


def model_of(
    spec: Model,
    sizes: Sizes,
    seed: int,
    *,
    weights: bool = True,
    example: Batch | None = None,
    teacher: nn.Module | None = None,
) -> nn.Module:
    """A recipe's model, its random start drawn from a seed; nothing else is drawn from anywhere.

    Args:
        spec: Which.
        sizes: What it is built for.
        seed: Of its start.
        weights: Read its weights and put its head on.
        example: Tells which layer the head replaces.
        teacher: Whose classifier the head may reuse.
    """
    for name in _BESIDE & spec.options.keys():
        raise ModelError("this is said beside the options, not in them", where=f"options.{name}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = load_model(
            spec.model, auto=spec.auto, pretrained=spec.pretrained, **{**sizes.options(), **spec.options}
        )
        if weights:
            head = None if spec.head is None else spec.head.written()
            with_head(model, head, spec.weights, example=example, teacher=teacher)
    return model


def objective_of(name: str, term: Term) -> Objective:
    """The objective of one term of the loss."""
    return catalogue.get(term.method or name, f"loss.{name}").build(f"loss.{name}", **term.options)


def loss_of(terms: dict[str, Term]) -> Terms:
    """A recipe's loss."""
    objectives = [objective_of(name, term) for name, term in terms.items()]
    return Terms(objectives, [term.schedule() for term in terms.values()], list(terms))


def cast_of(
    recipe: Recipe,
    sizes: Sizes,
    student: nn.Module,
    teacher: nn.Module | Teacher | None,
    train: Loader | None = None,
    validation: Loader | None = None,
    *,
    teachers: Mapping[str, Teacher] | None = None,
) -> Cast:
    """Everything that a recipe's scheme has to work with.

    Every further model starts from a seed of its own, which follows from the recipe's and from its name or number.

    Args:
        recipe: Which.
        sizes: What its models are built for.
        student: Who is wanted.
        teacher: From whom it learns in the first place.
        train, validation: The data.
        teachers: All teachers by name; default the one.
    """
    from limbeck.schemes import Cast  # with the engine, whose imports take seconds

    spec, example = recipe.teacher, None if train is None else train.example(2).to("cpu")
    where = None if spec is None else spec.logits
    first = None if teacher is None else as_teacher(teacher, where)
    if teachers is None:
        teachers = {} if first is None else {"teacher": first}
    return Cast(
        student=student,
        loss=loss_of(recipe.loss),
        teacher=first,
        teachers=teachers,
        config=recipe.train,
        train=train,
        validation=validation,
        players={
            name: model_of(player, sizes, _own_seed(recipe.seed, *name.encode()), example=example)
            for name, player in recipe.players.items()
        },
        fresh=lambda number: model_of(recipe.student, sizes, _own_seed(recipe.seed, number), example=example),
        logits=recipe.student.logits,
        seed=recipe.seed,
    )


def scheme_of(scheme: Named) -> Scheme:
    """A recipe's scheme."""
    from limbeck import schemes

    return schemes.build(scheme.name, **scheme.options)


def _own_seed(*counters: int) -> int:
    return key(_PLAYERS, *counters) >> 33

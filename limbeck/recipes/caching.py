"""A recipe's teacher and its cache: building it, and learning from it in the teacher's absence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from limbeck.cache.build import HALF, CodecSpec, build
from limbeck.cache.folder import Cache
from limbeck.cache.prints import describe_teacher
from limbeck.cache.verify import ask_again
from limbeck.core.errors import ConfigError
from limbeck.core.teacher import FrozenTeacher
from limbeck.data.loader import IndexedLoader, Loader
from limbeck.data.sources.source import DataSource
from limbeck.recipes.build import Sizes, check_loader, fewer, loss_of, source_of, train_loader
from limbeck.recipes.schema import Data, Recipe, TeacherModel
from limbeck.recipes.teacher import origin_of, teacher_of
from limbeck.teachers.cached import CachedTeacher

TRAIN = "train"  # the folder of what is learned from, beside that of what is reported on


def build_cache(
    recipe: Recipe,
    folder: str | Path | None = None,
    *,
    views: int | None = None,
    store: Mapping[str, CodecSpec | None] | None = None,
    batch: int = 128,
    part: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
    quiet: bool = False,
) -> list[Cache]:
    """Ask a recipe's teacher about its training data, view by view, and about the data that are reported on.

    Args:
        recipe: Its teacher is a model; its loss says what has to be stored.
        folder: Of the cache; default ``teacher.cache``.
        views: Of each training sample; default ``data.views``, or one where nothing is augmented.
        store: Taps, with a codec each; ``None`` for a codec: half precision. Default what the loss asks its teacher.
        batch: Samples the teacher sees at once.
        part: ``(i, n)``: every n-th shard from the i-th on.
        device: Where the teacher runs.
        progress: Told the folder, rows done and rows in all.
        quiet: Show no progress of a teacher's training.

    Returns:
        The caches of the training data and of those held out; none where only a part was built.

    Raises:
        ConfigError: No folder, no teacher, or nothing says how many views there shall be.
        CacheError: The folder holds another cache.
    """
    spec = recipe.teacher
    if spec is None or not spec.model:
        raise ConfigError("there is no teacher to ask", where="teacher.model", remedy="name the teacher's model")
    place = folder or spec.cache
    if place is None:
        raise ConfigError("no folder for the cache", where="teacher.cache", remedy="name one there, or give --out")
    views = views or recipe.data.views or (None if recipe.data.augment else 1)
    if views is None:
        raise ConfigError(
            "a new view each epoch cannot be stored",
            where="data.views",
            found=None,
            remedy="say how many views a sample has there, or give --views",
        )
    folder, source = Path(place), source_of(recipe.data)
    loader = _indexed(train_loader(recipe.data, fewer(source.train, recipe.data.samples), recipe.seed, device))
    sizes = Sizes.of(loader)
    teacher = teacher_of(recipe, source, sizes, folder.parent / "teachers", device=device, quiet=quiet)
    assert teacher is not None
    codecs = {tap: HALF if codec is None else codec for tap, codec in (store or _asked(recipe)).items()}
    same: dict[str, Any] = {
        "batch": batch,
        "logits": spec.logits,
        "origin": origin_of(recipe.data, spec, sizes),
        "part": part,
    }

    def told(name: str) -> Callable[[int, int], None]:
        return lambda done, total: progress(name, done, total) if progress is not None else None

    made = [build(teacher, loader, folder / TRAIN, store=codecs, views=views, progress=told(TRAIN), **same)]
    name = held_out_name(source)
    if name is not None:
        held = _indexed(check_loader(recipe.data, source.split(name), device))
        logits = {"logits": codecs.get("logits", HALF)}
        made.append(build(teacher, held, folder / name, store=logits, progress=told(name), **same))
    return [cache for cache in made if cache is not None]


def verify_cache(recipe: Recipe, caches: Sequence[Cache], samples: int = 64) -> list[dict[str, Any]]:
    """Ask a recipe's teacher again about some rows of its caches.

    What is stored may differ from what is said now by as much as the codec lost when it was stored, and half as much
    again, since another machine rounds otherwise.

    Args:
        recipe: Its teacher is a model.
        caches: As :func:`build_cache` made them.
        samples: How many rows of each are asked again, evenly spread.

    Returns:
        For each cache how many rows were asked, and the largest error by signal and measure.

    Raises:
        CacheError: The teacher, its data or its views are others, or it says something else.
    """
    spec = recipe.teacher
    if spec is None or not spec.model:
        raise ConfigError("there is no teacher to ask", where="teacher.model", remedy="name the teacher's model")
    source = source_of(recipe.data)
    teacher: FrozenTeacher | None = None
    said = []
    for cache in caches:
        name = cache.folder.name if cache.folder.name in ("validation", "test") else TRAIN
        split = fewer(source.train, recipe.data.samples) if name == TRAIN else source.split(name)
        loader = _indexed(
            train_loader(recipe.data, split, recipe.seed, cache=cache)
            if name == TRAIN
            else check_loader(recipe.data, split)
        )
        cache.refuse_other_views(loader)
        if teacher is None:
            sizes = Sizes.of(loader)
            model = teacher_of(recipe, source, sizes, cache.folder.parent.parent / "teachers", quiet=True)
            assert model is not None
            teacher = FrozenTeacher(model, logits=spec.logits)
        cache.header.refuse_other({"teacher": describe_teacher(teacher.model, spec.logits)}, "teacher")
        said.append(ask_again(cache, teacher, loader, samples))
    return said


def cache_of(spec: TeacherModel | None, data: Data) -> Cache | None:
    """The cache that is learned from; ``None`` where there is none.

    Raises:
        CacheError: It is damaged or unfinished.
        ConfigError: It has fewer views than the recipe shows.
    """
    if spec is None or spec.cache is None:
        return None
    cache, views = Cache(Path(spec.cache) / TRAIN), data.views
    if views is not None and views > cache.header.views:
        raise ConfigError(
            "the cache has fewer views", where="data.views", found=views, wanted=f"at most {cache.header.views}"
        )
    return cache


def cached_teacher(spec: TeacherModel | None, data: Data, cache: Cache, loader: Loader, sizes: Sizes) -> CachedTeacher:
    """The cache in its teacher's place.

    Raises:
        CacheError: It is of other data or views than the loader gives, or of another teacher than the recipe names.
    """
    cache.refuse_other_views(loader)
    if spec is not None and spec.model and cache.header.origin is not None:
        named, was = origin_of(data, spec, sizes), dict(cache.header.origin)
        if named["weights"] is None:  # the weights need not be there any more
            named["weights"] = was["weights"]
        cache.header.refuse_other({"origin": named}, "teacher")
    return CachedTeacher(cache)


def held_out_teacher(spec: TeacherModel | None, source: DataSource, loader: Loader) -> CachedTeacher | None:
    """What the teacher said of the data that are reported on, where that was stored."""
    name = held_out_name(source)
    if spec is None or spec.cache is None or name is None:
        return None
    folder = Path(spec.cache) / name
    if not folder.is_dir():
        return None
    cache = Cache(folder)
    cache.refuse_other_views(loader)
    return CachedTeacher(cache)


def held_out_name(source: DataSource) -> str | None:
    """The split that is reported on, where it is not the training set."""
    return next((name for name in ("test", "validation") if getattr(source, name) is not None), None)


def _asked(recipe: Recipe) -> dict[str, CodecSpec | None]:
    """What the loss asks its teacher for."""
    return dict.fromkeys(dict.fromkeys(["logits", *loss_of(recipe.loss).teacher_taps]))


def _indexed(loader: Loader) -> IndexedLoader:
    if not isinstance(loader, IndexedLoader):
        raise ConfigError(
            "these data can only be walked through",
            where="data.source",
            found=type(loader).__name__,
            wanted="samples that can be asked for by index",
        )
    return loader

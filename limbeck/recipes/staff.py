"""The teachers of a recipe, be it one or several: loaded, trained first, or the caches of what they said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from limbeck.cache.folder import Cache
from limbeck.core.teacher import FrozenTeacher, Teacher
from limbeck.data.loader import Loader
from limbeck.data.sources.source import DataSource
from limbeck.recipes.build import Sizes
from limbeck.recipes.caching import cache_of, cached_teacher
from limbeck.recipes.schema import Recipe, TeacherModel
from limbeck.recipes.teacher import teacher_of
from limbeck.teachers.several import SeveralTeachers


@dataclass
class Staff:
    """Who teaches.

    Args:
        teachers: All of them by name, as schemes take them; the first is the one that is reported on.
        models: Those that are models.
        first: What the recipe says of the first.
        alone: The section ``teacher`` names the teacher; else all of them together are it.
    """

    teachers: dict[str, Teacher] = field(default_factory=dict)
    models: dict[str, nn.Module] = field(default_factory=dict)
    first: TeacherModel | None = None
    alone: bool = True

    @property
    def teacher(self) -> Teacher | None:
        """From whom a scheme of one teacher learns."""
        if not self.teachers:
            return None
        several = not self.alone and len(self.teachers) > 1
        return SeveralTeachers(self.teachers.values()) if several else next(iter(self.teachers.values()))

    @property
    def model(self) -> nn.Module | None:
        """The first teacher, where it is a model."""
        return self.models.get(next(iter(self.teachers), ""))


def caches_of(recipe: Recipe) -> dict[str, Cache]:
    """The caches of those teachers that have one, by the teachers' names."""
    found = {name: cache_of(spec, recipe.data) for name, spec in recipe.staff.items()}
    return {name: cache for name, cache in found.items() if cache is not None}


def staff_of(
    recipe: Recipe,
    source: DataSource,
    sizes: Sizes,
    loader: Loader,
    caches: Mapping[str, Cache],
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    main: bool = True,
    quiet: bool = False,
) -> Staff:
    """All teachers of a recipe, ready to teach.

    Args:
        recipe: Which.
        source: Its data.
        sizes: What models are built for.
        loader: Of the training data; caches must have the views that it gives.
        caches: As :func:`caches_of` found them.
        folder: Where trained teachers are kept.
        device: Where they train.
        main: This process writes; in distributed runs one does.
        quiet: Show no progress bar.
    """
    specs = recipe.staff
    staff = Staff(first=next(iter(specs.values()), None), alone=recipe.teacher is not None)
    for name, spec in specs.items():
        if name in caches:
            staff.teachers[name] = cached_teacher(spec, recipe.data, caches[name], loader, sizes)
            continue
        model = teacher_of(recipe, source, sizes, folder, spec=spec, device=device, main=main, quiet=quiet)
        assert model is not None  # a section without a cache names a model
        staff.models[name], staff.teachers[name] = model, FrozenTeacher(model, logits=spec.logits)
    return staff

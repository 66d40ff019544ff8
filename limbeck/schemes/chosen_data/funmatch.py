"""Function matching: teacher and student see the very same strong views, and the labels are not used."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Literal

import torch  # noqa: F401  for the example

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller, Losses
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.hashing import key
from limbeck.core.reduction import check_positive
from limbeck.core.teacher import as_teacher  # noqa: F401  for the example
from limbeck.core.trace import Trace
from limbeck.data.area_crop import AreaCrop
from limbeck.data.augment import Augment
from limbeck.data.loader import IndexedLoader
from limbeck.data.mixing import Mixup
from limbeck.engine.config import TrainConfig
from limbeck.engine.stage import Stage
from limbeck.schemes.parts.looking import indexed, only_teacher, seen_again
from limbeck.schemes.scheme import Cast, Scheme, Training, register
from limbeck.teachers.cached import CachedTeacher

_OTHER = 11  # keeps the views of a teacher that sees others apart from the student's
_PLAIN = ("fixed", "independent")


@register(
    Card(
        key="funmatch",
        name="Function matching",
        title="Knowledge distillation: A good teacher is patient and consistent",
        year=2021,
        arxiv="2106.05237",
        code="google-research/big_vision",
        knowledge="scheme",
        equation=r"L = T^2\, KL(p_T(\tilde x) \| p_S(\tilde x)), \qquad "
        r"\tilde x = \lambda a(x_i) + (1 - \lambda) a(x_j)",
        use="Where the teacher is far better than the student will be: as many views as there is time for, and no "
        "labels. Give it long trainings; it goes on improving where training on labels overfits.",
        defaults={
            "views": "function_matching, the paper's method; the others are its controls",
            "area": "5 to 100 percent, the authors' inception_crop",
            "mixup": "1: shares drawn evenly, for every image, as in the authors' configurations",
            "longer": "1; the paper trains 300 to 1200 epochs where 90 are usual",
        },
        evidence="formula",
        evidence_note="the released loss computed independently; that both models are given one tensor, mixed images "
        "included; that labels change nothing",
        choices=(
            "images are mixed by the loader with any of the set, each by its own share, so that a view can be made "
            "again; the released code mixes neighbours in a batch by one share, and never below one half",
            "crops take the nearest pixel, where the authors resize bilinearly",
            "settings: paper takes Adam with decoupled decay, a cosine, clipping at 1 and a warm-up of 5 percent; "
            "rate, decay and length stay the recipe's, since the paper searches them for each task",
            "several teachers: the sum of each one's loss, as in the released code",
        ),
    )
)
class FunMatch(Scheme):
    r"""One long training in which the teacher labels exactly what the student sees.

    .. math:: L = T^2\, KL(p_T(\tilde x) \| p_S(\tilde x)), \qquad \tilde x = \lambda a(x_i) + (1 - \lambda) a(x_j)

    The loss is the recipe's, of terms that ask a teacher; the paper's is ``{kd: {temperature: 1}}``.

    Args:
        views: ``function_matching``; or, without mixing, ``consistent``: both see one crop, ``independent``: each has
            a crop of its own, ``fixed``: the teacher always sees the image as it is.
        area: Least and most area of a crop, in front of the recipe's own augmentation; ``None``: no such crop.
        mixup: Shares of mixed images come from Beta(mixup, mixup); where the recipe mixes already, its way stays.
        longer: How many times as long as the recipe says.
        settings: ``recipe``, or ``paper`` for its optimizer; see the card.

    Source: Knowledge distillation: A good teacher is patient and consistent, arXiv 2106.05237.

    >>> from limbeck.core.objective import Terms
    >>> from limbeck.data.resident import ResidentLoader
    >>> from limbeck.objectives import KD
    >>> from torch import nn
    >>> train = ResidentLoader(torch.rand(8, 1, 4, 4), torch.arange(8) % 3, batch_size=4, classes=3)
    >>> models = [nn.Sequential(nn.Flatten(), nn.Linear(16, 3)) for _ in range(2)]
    >>> cast = Cast(models[0], Terms.of(KD(1.0)), as_teacher(models[1]), TrainConfig(epochs=2), train)
    >>> (training,) = FunMatch(longer=50).trainings(cast)
    >>> training.stages[0].config.epochs, [t.name for t in training.train.augment.transforms]
    (100, ['area_crop', 'mixup'])
    """

    def __init__(
        self,
        views: Literal["function_matching", "consistent", "independent", "fixed"] = "function_matching",
        area: tuple[float, float] | None = (0.05, 1.0),
        mixup: float = 1.0,
        longer: int = 1,
        settings: Literal["recipe", "paper"] = "recipe",
    ) -> None:
        check_positive(mixup, "scheme.mixup")
        check_positive(longer, "scheme.longer")
        self.crop = None if area is None else AreaCrop(*area)
        self.views, self.mixup, self.longer, self.settings = views, mixup, longer, settings

    def trainings(self, cast: Cast) -> Iterator[Training]:
        teacher = cast.need_teacher("function matching asks")
        loss = only_teacher(cast.loss, "function matching")
        loader = self._loader(indexed(cast.train, "function matching"), isinstance(teacher, CachedTeacher))
        distiller = Matcher(cast.student, loss, teacher, logits=cast.logits)
        distiller.see(self.views, loader)
        yield Training([Stage("match", distiller, self._config(cast.config))], train=loader)

    def _loader(self, loader: IndexedLoader, cached: bool) -> IndexedLoader:
        """The recipe's data in the views that the method wants."""
        known, own = loader.augment.transforms, list(loader.augment.transforms)
        if self.crop is not None and not any(isinstance(t, AreaCrop) for t in own):
            own = [self.crop, *own]
        if self.views == "function_matching" and not loader.augment.mixes:
            own = [*own, Mixup(self.mixup)]
        if self.views != "function_matching" and loader.augment.mixes:
            raise ConfigError(
                f"views {self.views} are of single images, and the recipe mixes them",
                where="data.augment",
                remedy="leave mixup and cutmix out, or say scheme.views: function_matching",
            )
        if cached and (len(own) != len(known) or self.views in _PLAIN):
            raise ConfigError(
                "a consistent teacher is asked about the views that the student sees, and a cache has others",
                where="teacher.cache",
                remedy="give the teacher's model; or cache views of these augmentations, with scheme.area: null and "
                "scheme.views: consistent",
            )
        if len(own) == len(known):
            return loader
        if loader.example(1).inputs.ndim != 4:
            raise DataError(
                "only images can be cropped and mixed",
                where="data",
                found=f"inputs {list(loader.example(1).inputs.shape)}",
                remedy="say scheme.views: consistent and scheme.area: null",
            )
        found, before = copy.copy(loader), loader.augment
        found.augment = Augment(
            own, normalise=before.normalise, seed=before.seed, samples=loader.samples, classes=loader.classes
        )
        return found

    def _config(self, config: TrainConfig) -> TrainConfig:
        """The recipe's settings, for as long as the method wants."""
        length = {n: v * self.longer for n in ("epochs", "steps") if (v := getattr(config, n)) is not None}
        paper = {"optimizer": "adamw", "optimizer_options": {}, "schedule": "cosine", "clip": 1.0, "warmup": 0.05}
        return config.model_copy(update={**length, **(paper if self.settings == "paper" else {})})


class Matcher(Distiller):
    """A student that knows no label, and a teacher that sees what the student sees, or what a control says."""

    def see(self, views: str, loader: IndexedLoader) -> None:
        """Take what the teacher sees, and where it comes from."""
        self.views, self._loader = views, loader
        if views in _PLAIN and loader.per_read > 1:
            raise ConfigError(f"views {views} are read one by one", where="data.per_read", found=loader.per_read)

    def made(self, batch: Batch) -> Batch:
        batch = batch.replace(labels=None)
        if self.views not in _PLAIN:
            return batch
        index, view = batch.require("index"), batch.view if isinstance(batch.view, int) else 0
        if self.views == "fixed":
            seen = seen_again(self._plain(), index, 0)
        else:
            seen = seen_again(self._loader, index, key(_OTHER, view) >> 32)
        return batch.replace(teacher_inputs=seen.to(index.device).inputs)

    def _plain(self) -> IndexedLoader:
        return self._loader.bare()

    def compare(
        self, student: Trace, teacher: Trace, batch: Batch, counted: Batch | None = None, loss: object = None
    ) -> Losses:
        """The loss; of several teachers, the sum of each one's."""
        members = teacher.members or (teacher,)
        first, *others = (super(Matcher, self).compare(student, member, batch, counted) for member in members)
        for number, other in enumerate(others, 1):
            first.total = first.total + other.total
            first.terms |= {f"{name}_{number}": value for name, value in other.terms.items()}
            first.weights |= {f"{name}_{number}": value for name, value in other.weights.items()}
        return first

    def settled(self) -> dict[str, object]:
        return {"views": self.views}

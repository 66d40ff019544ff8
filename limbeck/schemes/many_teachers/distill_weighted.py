"""DistillNearest and DistillWeighted: models of other tasks teach, each as much as its task resembles the student's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller
from limbeck.core.divergences import kl_rows, soften
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.hashing import draw_bits, key, key_tensor
from limbeck.core.objective import Contract, DataInfo, Objective, Terms
from limbeck.core.reduction import check_inside, check_positive
from limbeck.core.relations import pooled
from limbeck.core.schedules import Constant
from limbeck.core.task_similarity import nearest_neighbours, parc, source_weights
from limbeck.core.teacher import Teacher
from limbeck.core.trace import Trace
from limbeck.data.loader import IndexedLoader
from limbeck.engine.stage import Stage
from limbeck.schemes.parts.looking import indexed, need_labels, said_of_all
from limbeck.schemes.scheme import Cast, Scheme, Training, register
from limbeck.teachers.several import SeveralTeachers

Metric = Literal["parc", "neighbours", "equal"]
Norm = Literal["clip", "minmax"]
_PROBE = 15  # keeps this draw apart from others


@register(
    Card(
        key="distill_weighted",
        name="DistillWeighted",
        title="Distilling from Similar Tasks for Transfer Learning on a Budget",
        year=2023,
        arxiv="2304.12314",
        code="Kennethborup/DistillWeighted",
        knowledge="scheme",
        equation=r"L = \lambda\, \mathrm{CE}(h_t(f(x)), y) + (1 - \lambda) \sum_s w_s\, \mathrm{KL}(q_s(x) \| "
        r"\mathrm{softmax}(h_s(f(x)))), \qquad w_s = \frac{g(e_s)^p}{\sum_j g(e_j)^p}",
        use="For few labels, many samples without (label -1) and several models of other tasks, whatever their "
        "classes. `keep: 1` is DistillNearest. The recipe's loss is what labels teach, such as `cross_entropy`.",
        defaults={
            "similarity": "parc, the paper's",
            "share": "0.5, our choice",
            "power": "10, our choice",
            "samples": "500, the most that the paper looks at",
        },
        evidence="reading",
        choices=(
            "Of the paper the abstract and the introduction could be read; the repository holds no code. Loss, weights "
            "and a head for each source are from memory of it.",
            "Similarities below 0 count as 0.",
            "A batch has labelled and unlabelled samples as the data have; cross-entropy is their mean over the "
            "labelled, the divergence over all.",
        ),
        needs=("labels",),
        tasks=("classification", "several teachers"),
        cost="Every source that counts answers each batch.",
    )
)
class DistillWeighted(Scheme):
    r"""One stage: cross-entropy with the labels there are, and answers to the questions of all sources.

    Each source s has a linear head :math:`h_s` on the student's feature f for its own classes, which is dropped in the
    end; :math:`q_s` is what the source says.

    Args:
        similarity: How :math:`e_s` is told, from the source's features of labelled samples: ``"parc"``,
            ``"neighbours"`` (leave-one-out accuracy), or ``"equal"``.
        power: p.
        keep: Only so many of the best sources; 1 is DistillNearest.
        norm: g; see :func:`limbeck.core.task_similarity.source_weights`.
        share: :math:`\lambda`.
        samples: Labelled ones that are looked at, at most.
        reduce: Principal components of features that PARC looks at; ``None``: all of it.
        tap: Where features are, of sources and student.
        tied: A source with as many classes as the student has no head of its own: the student's logits learn from it.
        temperature: Of the divergence.

    Source: Distilling from Similar Tasks for Transfer Learning on a Budget, arXiv 2304.12314.

    >>> DistillWeighted(keep=1).power
    10.0
    """

    def __init__(
        self,
        similarity: Metric = "parc",
        power: float = 10.0,
        keep: int | None = None,
        norm: Norm = "clip",
        share: float = 0.5,
        samples: int = 500,
        reduce: int | None = None,
        tap: str = "penultimate",
        tied: bool = False,
        temperature: float = 1.0,
    ) -> None:
        for name, value, known in (
            ("similarity", similarity, get_args(Metric)),
            ("norm", norm, get_args(Norm)),
        ):
            if value not in known:
                raise ConfigError("no such way", where=f"scheme.{name}", found=value, wanted=", ".join(known))
        if power < 0:
            raise ConfigError("must not be negative", where="scheme.power", found=power)
        check_inside(share, "scheme.share", closed=True)
        for name, number in {"keep": keep, "samples": samples, "reduce": reduce, "temperature": temperature}.items():
            if number is not None:
                check_positive(number, f"scheme.{name}")
        self.similarity, self.power, self.keep, self.norm, self.share = similarity, power, keep, norm, share
        self.samples, self.reduce, self.tap, self.tied, self.temperature = samples, reduce, tap, tied, temperature

    def trainings(self, cast: Cast) -> Iterator[Training]:
        teachers = cast.need_teachers("similar tasks are looked for among", least=1)
        if cast.loss.teacher_taps:
            found = ", ".join(cast.loss.names)
            raise ConfigError("the loss is what labels teach", where="loss", found=found, wanted="cross_entropy")
        weights = source_weights(self.scores(cast, teachers), self.power, self.norm, self.keep)
        counting = [name for name, weight in zip(teachers, weights.tolist(), strict=True) if weight > 0]
        sources = SourceAnswers(
            counting, weights[weights > 0].tolist(), tap=self.tap, tied=self.tied, temperature=self.temperature
        )
        loss = self.share * cast.loss + Terms([sources], [Constant(1 - self.share)], ["sources"])
        student = Distiller(
            cast.student, loss, SeveralTeachers(teachers[name] for name in counting), logits=cast.logits
        )
        yield Training([Stage("distill_weighted", student, cast.config)])

    def scores(self, cast: Cast, teachers: Mapping[str, Teacher]) -> Tensor:
        """How similar the task of each source is, ``[S]``."""
        if self.similarity == "equal":
            return torch.ones(len(teachers))
        loader = indexed(cast.train, "distill_weighted")
        labels, probe = need_labels(loader, "distill_weighted"), _probe(loader, self.samples)
        device = next((p.device for p in cast.student.parameters()), torch.device("cpu"))
        found = []
        for teacher in teachers.values():
            said = said_of_all(teacher, probe, (self.tap,), device)
            features, own = pooled(said[self.tap])[0], labels[said["index"]]
            found.append(
                parc(features, own, self.reduce) if self.similarity == "parc" else nearest_neighbours(features, own)
            )
        return torch.stack(found)


class SourceAnswers(Objective):
    """A head for each source on the student's feature, which answers as the source does.

    Args:
        names: Of the sources, in the order of ``trace.members``.
        weights: How much each counts.
        tap, tied, temperature: See :class:`DistillWeighted`.
    """

    contract = Contract(normalizer="samples", at_equal=None)
    teacher_taps = ("logits",)

    def __init__(
        self,
        names: list[str],
        weights: list[float],
        tap: str = "penultimate",
        tied: bool = False,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.names, self.weights, self.tap, self.tied, self.temperature = names, weights, tap, tied, temperature
        self.student_taps = (tap, "logits") if tied else (tap,)
        self.heads: nn.ModuleList | None = None

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        feature = pooled(student[self.tap])[0]
        own = student.logits.shape[-1] if self.tied else None
        classes = [member.logits.shape[-1] for member in teacher.members]
        self.heads = nn.ModuleList(
            nn.Identity() if count == own else nn.Linear(feature.shape[1], count).to(feature) for count in classes
        )

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> dict[str, Tensor]:
        feature, temperature, found = pooled(student[self.tap])[0], self.temperature, {}
        parts = zip(self.names, self.weights, self.ready("heads"), teacher.members, strict=True)
        for name, weight, head, member in parts:
            said = student.logits if isinstance(head, nn.Identity) else head(feature.to(head.weight.dtype))
            rows = kl_rows(soften(member.logits.detach(), temperature), soften(said, temperature))
            found[name] = weight * temperature**2 * rows.mean()
        return found


def _probe(loader: IndexedLoader, most: int) -> IndexedLoader:
    """Some samples that have a label, in order and without augmentation."""
    labels = need_labels(loader, "distill_weighted")
    rows = torch.arange(loader.samples) if loader.only is None else loader.only
    rows = rows[labels[rows] >= 0]
    if len(rows) < 3:
        raise DataError(
            "tasks are compared by labelled samples", where="data.labels", found=len(rows), wanted="3 or more"
        )
    bits = draw_bits(key_tensor([key(_PROBE)]), rows).squeeze(1)
    return loader.bare().chosen(rows[bits.argsort(stable=True)[:most]].sort().values)

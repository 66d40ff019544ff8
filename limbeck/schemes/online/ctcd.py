"""Co-training and co-distillation: a large and a small model learn together, each from the other."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller, Losses
from limbeck.core.divergences import kl_rows, soften
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Contract, DataInfo, Objective, Terms
from limbeck.core.reduction import Reduction, check_positive, reduce
from limbeck.core.survey import dry
from limbeck.core.teacher import Teacher
from limbeck.core.trace import Trace
from limbeck.data.language.loader import LanguageLoader
from limbeck.engine.stage import Stage
from limbeck.schemes.language.writing import same_tokens
from limbeck.schemes.scheme import Cast, Scheme, Training, register


def co_distillation(
    logits: Tensor,
    peer_logits: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    detach_peer: bool = True,
) -> Tensor:
    r"""What one model learns from the other, :math:`\tau^2 \mathrm{KL}(p \| q)`, the mean over places that count.

    Args:
        logits: ``[B, *, C]`` of who learns, :math:`q = \mathrm{softmax}(z / \tau)`.
        peer_logits: ``[B, *, C']`` of the other; of two padded vocabularies the shorter one counts.
        temperature: :math:`\tau`.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        detach_peer: The other does not move; else both draw nearer.

    >>> z = torch.tensor([[2.0, 0.0]])
    >>> co_distillation(z, z), co_distillation(z, -z)
    (tensor(0.), tensor(1.5232))
    """
    check_positive(temperature, "temperature")
    width = min(logits.shape[-1], peer_logits.shape[-1])
    given = peer_logits.detach() if detach_peer else peer_logits
    rows = kl_rows(soften(given[..., :width], temperature), soften(logits[..., :width], temperature))
    return temperature**2 * reduce(rows, mask, reduction)


@register(
    Card(
        key="ctcd",
        name="CTCD",
        title="Co-training and Co-distillation for Quality Improvement and Compression of Language Models",
        year=2023,
        arxiv="2311.02849",
        knowledge="scheme",
        equation=r"L_S = \mathrm{CE}(z_S, y) + w_s\, \tau^2 \mathrm{KL}(p_L \| p_S), \quad "
        r"L_L = \mathrm{CE}(z_L, y) + w_l\, \tau^2 \mathrm{KL}(p_S \| p_L)",
        use="Where the large model has to be trained anyway: it learns from the small one too, which makes it a better "
        "teacher than it would be by itself. Both are trained, so a step costs what both cost.",
        defaults={
            "to_student, to_large": "1 each, our choice; to_large 0 is co-training with one-way distillation",
            "temperature": "1, our choice",
            "detach_peer": "true, our choice",
        },
        evidence="reading",
        choices=(
            "the abstract and introduction could be read, which give no weights: both directions count alike, at "
            "temperature 1, and who gives is held fixed",
            "both models take their step together, on predictions of the same moment, by one optimizer; gradients are "
            "clipped by the norm of both",
            "the divergence runs over the positions that a batch says count, as kd does; for masked language models "
            "the batch's mask has to name the masked places",
            "whoever wants the small model to begin as layers of the large one starts it from such weights",
        ),
        tasks=("classification", "language"),
        cost="The large model is trained as well.",
    )
)
class CTCD(Scheme):
    r"""One training of two models, the student and a larger one, a player of the recipe.

    .. math:: L_S = L(z_S, y) + w_s D(z_L \to z_S), \qquad L_L = L(z_L, y) + w_l D(z_S \to z_L), \qquad
        D(a \to b) = \tau^2 \mathrm{KL}\left( \mathrm{softmax}(a / \tau) \| \mathrm{softmax}(b / \tau) \right)

    :math:`L` is the recipe's loss. With a teacher it is the same for both, and the teacher teaches both. Without one,
    terms that ask a teacher (features, attention) are the student's alone, and ask the large model as it is now.

    Args:
        large: Name of the player; it is trained in place, and not shipped.
        to_student: :math:`w_s`.
        to_large: :math:`w_l`.
        temperature: :math:`\tau`.
        detach_peer: Who gives knowledge is held fixed in that term.

    Source: Co-training and Co-distillation, arXiv 2311.02849.

    >>> from limbeck.engine import TrainConfig
    >>> from limbeck.objectives import CrossEntropy
    >>> student, large, batch = nn.Linear(4, 3), nn.Linear(4, 3), Batch(torch.ones(2, 4), torch.tensor([0, 2]))
    >>> cast = Cast(student, Terms.of(CrossEntropy()), None, TrainConfig(), players={"large": large})
    >>> (training,) = CTCD().trainings(cast)
    >>> sorted(training.stages[0].distiller.setup(batch)(batch).terms)
    ['cross_entropy', 'from_large', 'large/cross_entropy', 'large/from_student']
    """

    def __init__(
        self,
        large: str = "large",
        to_student: float = 1.0,
        to_large: float = 1.0,
        temperature: float = 1.0,
        detach_peer: bool = True,
    ) -> None:
        for name, value in (("to_student", to_student), ("to_large", to_large)):
            if value < 0:
                raise ConfigError("must not be negative", where=f"scheme.{name}", found=value)
        check_positive(temperature, "scheme.temperature")
        self.large, self.to_student, self.to_large = large, to_student, to_large
        self.temperature, self.detach_peer = temperature, detach_peer

    def trainings(self, cast: Cast) -> Iterator[Training]:
        large = cast.player(self.large)
        if cast.teacher is None and cast.loss.teacher_taps and isinstance(cast.train, LanguageLoader):
            same_tokens(cast.train, "ctcd")
        pair = Pair(cast.student, large, cast.loss, cast.teacher, self, logits=cast.logits)
        yield Training([Stage("ctcd", pair, cast.config)])


class Exchange(Objective):
    """What one of the two learns from the other; see :func:`co_distillation`."""

    contract = Contract(normalizer="positions", mask=True, temperature="squared", spare_class=True)
    student_taps = teacher_taps = ("logits",)

    def __init__(self, temperature: float, detach_peer: bool) -> None:
        super().__init__()
        self.temperature, self.detach_peer = temperature, detach_peer

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        options: dict[str, Any] = {"temperature": self.temperature, "detach_peer": self.detach_peer}
        return co_distillation(student.logits, teacher.logits, mask=batch.mask, **options)


class Pair(Distiller):
    """Both models, each with its loss and what it learns from the other; see :class:`CTCD`.

    Args:
        student, large: The two.
        loss: The student's; the large model has a copy of what it can learn too.
        teacher: Of both; ``None``: there is none.
        scheme: Weights and temperature.
        logits: Where logits stand in the student's output.
    """

    def __init__(
        self,
        student: nn.Module,
        large: nn.Module,
        loss: Objective | Terms,
        teacher: nn.Module | Teacher | None,
        scheme: CTCD,
        *,
        logits: str | None = None,
    ) -> None:
        loss = Terms.of(loss)
        own = loss if teacher is not None else _without_teacher(loss)
        asked = () if teacher is not None else loss.teacher_taps
        other = Distiller(large, copy.deepcopy(own), teacher, also=("logits", *asked))
        beside = _Beside(other) if teacher is None and asked else teacher
        super().__init__(student, loss, beside, logits=logits, also=("logits",))
        self.large, self.exchange = other, Exchange(scheme.temperature, scheme.detach_peer)
        self.weights = {"from_large": scheme.to_student, "large/from_student": scheme.to_large}

    def objectives(self) -> Iterator[Objective]:
        yield from self.loss
        yield from self.large.loss
        yield self.exchange

    def setup(self, batch: Batch, data: DataInfo | None = None) -> Pair:
        self.close()
        self.large.setup(self.prepare(batch), data)  # first, since the student's helpers may be sized by it
        super().setup(batch, data)
        return self

    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        prepared = self.prepare(batch)
        large = self.large.heard(prepared)
        given = large.detach() if isinstance(self.teacher, _Beside) else self._teach(prepared)
        student = self.heard(prepared)
        whole = self.compare(student, given, prepared, counted=batch)
        other = self.large.compare(large, given, prepared, counted=batch) if len(self.large.loss.names) else None
        if other is not None:
            whole.total = whole.total + other.total
            whole.terms |= {f"large/{name}": value for name, value in other.terms.items()}
            whole.weights |= {f"large/{name}": value for name, value in other.weights.items()}
        share = batch.share(self.exchange.contract.normalizer)
        for name, learner, giver in (("from_large", student, large), ("large/from_student", large, student)):
            value = self.exchange(learner, giver, prepared) * share
            weight = value.new_tensor(self.weights[name])
            if self.weights[name]:
                whole.total = whole.total + weight * value
            whole.terms[name], whole.weights[name] = value.detach(), weight
        return Losses(whole.total, whole.terms, whole.weights, whole.logits)

    def settled(self) -> dict[str, Any]:
        shapes = {name: list(value.shape) for name, value in self.large.student.state_dict().items()}
        exchange = {"temperature": self.exchange.temperature, "detach_peer": self.exchange.detach_peer}
        return {"large": shapes, "weights": self.weights, **exchange}

    def close(self) -> None:
        if self._listener is not None:
            self.large.close()
        super().close()


class _Beside:
    """A teacher that learns as well: it answers as the model beside the student."""

    def __init__(self, other: Distiller) -> None:
        self.other = other

    def attach(self, taps: tuple[str, ...], batch: Batch) -> None:
        """Its taps are known from the beginning."""

    def __call__(self, batch: Batch) -> Trace:
        with dry(self.other.student):
            return self.other.heard(batch)

    def to(self, device: torch.device | str) -> _Beside:
        return self


def _without_teacher(loss: Terms) -> Terms:
    """The terms that ask no teacher."""
    kept = [(name, objective, weight) for name, objective, weight in loss.items() if not objective.teacher_taps]
    if not kept:
        raise ConfigError(
            "the large model would learn from the student alone",
            where="loss",
            found=", ".join(loss.names),
            wanted="a term that asks no teacher, such as cross_entropy, or a teacher",
        )
    names, objectives, weights = (list(column) for column in zip(*kept, strict=True))
    return Terms(objectives, weights, names)

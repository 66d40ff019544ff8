"""ACID and ACED: a large model picks, from a larger batch, what the student learns from; and teaches it, if wanted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller, Losses
from limbeck.core.divergences import cross_entropy_rows, soften
from limbeck.core.errors import DataError
from limbeck.core.labels import soft_labels
from limbeck.core.objective import DataInfo, Objective, Terms
from limbeck.core.ranks import as_on_first, mean_over_ranks, rows_of_ranks
from limbeck.core.reduction import check_inside, check_positive
from limbeck.core.schedules import Schedule
from limbeck.core.survey import dry
from limbeck.core.teacher import FrozenTeacher, Teacher
from limbeck.core.trace import Trace
from limbeck.engine.stage import Stage
from limbeck.schemes.chosen_data.super_batches import dealt, device_of, gathered, picked
from limbeck.schemes.parts.looking import whole_batches
from limbeck.schemes.scheme import Cast, Scheme, Training, register


def pair_losses(logits: Tensor) -> Tensor:
    r"""The sigmoid loss of every pair, :math:`-\log \sigma(l_{ij} z_{ij})`, :math:`l` 1 on the diagonal, else -1.

    Args:
        logits: ``[B, B]``, image i with text j.

    >>> pair_losses(torch.zeros(2, 2)).round(decimals=4)
    tensor([[0.6931, 0.6931],
            [0.6931, 0.6931]])
    """
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    return F.softplus(torch.where(own, -logits, logits))


def joint_sample(scores: Tensor, count: int, chunks: int = 16, temperature: float = 1.0) -> Tensor:
    r"""Draw samples that are worth most together, chunk by chunk.

    .. math:: P(i) \propto \exp \frac{1}{\tau} \Big( s_{ii} + \sum_{j \in S} (s_{ij} + s_{ji}) \Big)

    S is what was drawn so far. Draws are without replacement, by Gumbel noise of torch's global random state.

    Args:
        scores: ``[B, B]``: what each pair adds to the score of a batch; a diagonal one has samples apart.
        count: How many are drawn.
        chunks: In how many turns, alike up to one sample.
        temperature: :math:`\tau`; towards 0 the best are taken.

    Returns:
        ``[count]`` rows, in the order in which they were drawn.

    Source: Evans et al., "Data curation via joint example selection further accelerates multimodal learning", 2024,
    arXiv 2406.17711, algorithm 1.

    >>> joint_sample(torch.diag(torch.tensor([0.0, 9.0, 5.0])), 2, temperature=1e-6)
    tensor([1, 2])
    """
    alone, both = scores.diagonal().float(), (scores + scores.T).float()
    value, drawn = alone.clone(), list[Tensor]()
    for part in torch.arange(count).tensor_split(min(chunks, count)):
        noise = -torch.empty_like(value).exponential_().log()
        rows = (value / temperature + noise).topk(len(part)).indices
        drawn.append(rows)
        value = (value + both[rows].sum(dim=0)).index_fill(0, rows, -torch.inf)
    return torch.cat(drawn)


@register(
    Card(
        key="aced",
        name="ACID / ACED",
        title="Active Data Curation Effectively Distills Large-Scale Multimodal Models",
        year=2024,
        arxiv="2411.18674",
        knowledge="scheme",
        equation=r"s(B) = L(B; \theta) - L(B; \theta_{ref}), \qquad L = L_{labels}[B] + \lambda L_{dist}[B]",
        use="Where data are many and noisy: a larger trained model tells which samples of a super-batch the student "
        "can still learn from. Without terms that ask a teacher it is ACID, with them ACED. Made for pairs of image "
        "and text; classes work too.",
        defaults={
            "filter": "0.8, the paper's",
            "score": "learnability (H-ACID), the better of the paper's two",
            "chunks": "16, as in JEST",
            "temperature": "1, as in JEST's algorithm",
            "contrast": "sigmoid, the paper's default loss",
        },
        evidence="formula",
        evidence_note="drawing against JEST's algorithm written as loops, by frequencies; losses of pairs against the "
        "paper's equations",
        choices=(
            "the recipe's batch is the super-batch; an epoch goes through all samples, of which a part is learned",
            "pairs: the model's logits are the matrix of image i with text j, such as logits_per_image; each term of "
            "the loss is taken of it and of its transpose, and the two are averaged",
            "sigmoid: {binary_cross_entropy: 1}, softmax: {cross_entropy: 1}; Softmax-KD is {kd: {temperature: 1}}, "
            "the cross-entropy up to a constant",
            "classes: a sample's score is its own cross-entropy, and samples are drawn apart from one another",
            "the student is asked in evaluation mode, the first chunk is drawn by its own scores",
            "on several ranks the super-batch is that of all; what is picked of classes is dealt out evenly, of pairs "
            "every rank learns all, since they are compared with one another",
        ),
        cost="every step asks student and reference about the whole super-batch",
    )
)
class ACED(Scheme):
    r"""One training on curated batches.

    .. math:: s_{learn}(B) = L(B; \theta) - L(B; \theta_{ref}), \qquad s_{easy}(B) = -L(B; \theta_{ref})

    Args:
        filter: The part of a super-batch that is left out, 1 - b / B.
        score: ``learnability``, or ``easy``: what the reference knows best (I-ACID).
        chunks: Turns in which a batch is drawn.
        temperature: Of the draw.
        data: ``classes``, or ``pairs``: the models' logits are ``[B, B]``, one row a sample and one column a sample.
        contrast: Of pairs: ``sigmoid`` labels them yes and no, ``softmax`` by their place.
        reference: Who scores: ``None``: the teacher, or the name of a player.
        teaches: ``curated``: the terms that ask a teacher see the curated batch (ACIDistill); ``random``: as many
            samples drawn evenly.

    Source: Active Data Curation Effectively Distills Large-Scale Multimodal Models, arXiv 2411.18674.

    >>> ACED(filter=0.75).size(64)
    16
    """

    def __init__(
        self,
        filter: float = 0.8,
        score: Literal["learnability", "easy"] = "learnability",
        chunks: int = 16,
        temperature: float = 1.0,
        data: Literal["classes", "pairs"] = "classes",
        contrast: Literal["sigmoid", "softmax"] = "sigmoid",
        reference: str | None = None,
        teaches: Literal["curated", "random"] = "curated",
    ) -> None:
        check_inside(filter, "scheme.filter", closed=True)
        check_positive(temperature, "scheme.temperature")
        check_positive(chunks, "scheme.chunks")
        self.filter, self.score, self.chunks, self.temperature = filter, score, chunks, temperature
        self.data, self.contrast, self.reference, self.teaches = data, contrast, reference, teaches

    def size(self, whole: int) -> int:
        """Samples that are taken of a super-batch."""
        return max(1, round((1 - self.filter) * whole))

    def trainings(self, cast: Cast) -> Iterator[Training]:
        whole_batches(cast.config.accumulate, "ACED", "chooses within a batch")
        reference: Teacher = (
            cast.need_teacher("batches are picked by")
            if self.reference is None
            else FrozenTeacher(cast.player(self.reference), logits=cast.logits)
        )
        teacher = cast.need_teacher("this loss asks") if cast.loss.teacher_taps else None
        distiller = Curated(cast.student, cast.loss, teacher, logits=cast.logits, also=("logits",))
        distiller.curate(self, reference)
        yield Training([Stage("curated", distiller, cast.config)])


class Curated(Distiller):
    """A student that sees the samples which are worth most to it; see :class:`ACED`."""

    def curate(self, scheme: ACED, reference: Teacher) -> None:
        """Take the scheme's settings and who scores."""
        self.scheme, self._reference = scheme, (reference,)
        entries = list(self.loss.items())
        self._sides = tuple(_part(entries, asks) for asks in (False, True))

    def setup(self, batch: Batch, data: DataInfo | None = None) -> Curated:
        """Also make the reference ready."""
        super().setup(self._labelled(batch), data)
        taps = dict.fromkeys([*self.loss.teacher_taps, "logits"])
        self._reference[0].to(next((p.device for p in self.student.parameters()), torch.device("cpu")))
        self._reference[0].attach(tuple(taps), batch)
        return self

    @torch.no_grad()
    def made(self, batch: Batch) -> Batch:
        """The samples of all ranks' super-batch that are learned from; of classes, this rank's part of them."""
        rows, pairs = rows_of_ranks(batch.size, device_of(batch)), self.scheme.data == "pairs"
        count = self.scheme.size(rows.whole)
        whole = gathered(batch, rows) if pairs or count < rows.whole else batch
        if count == rows.whole:
            return self._labelled(whole)
        asked = whole if pairs else batch
        with dry(self.student):
            student = self.heard(asked).logits
        scores = self.scores(student, self._reference[0](asked).logits, asked)
        if not pairs:
            scores = torch.diag(rows.gather(scores.diagonal()))
        drawn = [joint_sample(scores, count, self.scheme.chunks, self.scheme.temperature)]
        if self.scheme.teaches == "random":
            drawn.append(torch.randperm(rows.whole, device=drawn[0].device)[:count])
        as_on_first(drawn)
        if not pairs:
            drawn = [each[dealt(count, rows)] for each in drawn]
        found, *taught = (self._labelled(picked(whole, each)) for each in drawn)
        if taught:
            found.extras = {**found.extras, "taught": taught[0]}
        return found

    def scores(self, student: Tensor, reference: Tensor, batch: Batch) -> Tensor:
        """What each pair of samples adds to the score of a batch, ``[B, B]``.

        Args:
            student, reference: Logits: of pairs ``[B, B]``, of classes ``[B, C]``.
            batch: Whose.
        """
        if self.scheme.data == "pairs":
            size = batch.size
            if student.shape != (size, size) or reference.shape != (size, size):
                raise DataError(
                    "of pairs, logits are one row and one column a sample",
                    where="scheme.data",
                    found=f"{list(student.shape)} and {list(reference.shape)}",
                    wanted=[size, size],
                )
            hard, easy = pair_losses(student.float()), pair_losses(reference.float())
        else:
            labels = batch.require("labels")
            hard, easy = (
                torch.diag(cross_entropy_rows(soft_labels(labels, z.shape[-1]), soften(z)))
                for z in (student, reference)
            )
        return -easy if self.scheme.score == "easy" else hard - easy

    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        taught = batch.extras.get("taught")
        if taught is None:
            return self._both(self._labelled(batch), self.loss)
        if batch.totals:  # counted over ranks, as the engine counted what is curated
            counts = {unit: torch.as_tensor(taught.count(unit), device=device_of(batch)) for unit in batch.totals}
            taught = taught.replace(totals={unit: mean_over_ranks(count.float()) for unit, count in counts.items()})
        first, *others = (
            self._both(each, side) for each, side in zip((batch, taught), self._sides, strict=True) if side is not None
        )
        for other in others:
            first.total = first.total + other.total
            first.terms |= other.terms
            first.weights |= other.weights
        return first

    def _both(self, batch: Batch, loss: Terms) -> Losses:
        """The loss of a batch; of pairs, the mean of images against texts and of texts against images."""
        prepared = self.prepare(batch)
        student, teacher = self.traces(prepared)
        losses = self.compare(student, teacher, prepared, counted=batch, loss=loss)
        if self.scheme.data == "pairs":
            turned = self.compare(_turned(student), _turned(teacher), prepared, counted=batch, loss=loss)
            losses.total = (losses.total + turned.total) / 2
            losses.terms = {name: (value + turned.terms[name]) / 2 for name, value in losses.terms.items()}
        return losses

    def _labelled(self, batch: Batch) -> Batch:
        """Pairs are labelled by their places: each belongs to its own."""
        if self.scheme.data != "pairs":
            return batch
        place = torch.arange(batch.size, device=device_of(batch))
        own = F.one_hot(place).float() if self.scheme.contrast == "sigmoid" else place
        return batch.replace(labels=own)

    def settled(self) -> dict[str, object]:
        return dict(vars(self.scheme))


def _part(entries: list[tuple[str, Objective, Schedule]], asks: bool) -> Terms | None:
    """Those terms of a loss that ask a teacher, or the others."""
    own = [entry for entry in entries if bool(entry[1].teacher_taps) == asks]
    return Terms([o for _, o, _ in own], [w for *_, w in own], [n for n, *_ in own]) if own else None


def _turned(trace: Trace) -> Trace:
    if trace.output is None and not trace.taps:  # nobody was asked
        return trace
    return Trace(None, {"logits": trace.logits.T})

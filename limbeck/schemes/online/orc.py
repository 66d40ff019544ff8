"""ORC: of a group of students the best one of each batch teaches the others, beside a teacher that keeps learning."""

from __future__ import annotations

import copy
import struct
from collections.abc import Iterator, Sequence
from typing import Any, Literal
from typing import cast as known

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller, Losses
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.objective import DataInfo, Objective, Terms
from limbeck.core.ranks import as_on_first, drawn_alike, rows_of_ranks
from limbeck.core.reduction import check_inside, check_positive
from limbeck.core.survey import call_model, dry
from limbeck.core.teacher import FrozenTeacher, Teacher
from limbeck.core.trace import Trace, logits_of
from limbeck.engine.stage import Stage
from limbeck.objectives.response.cross_entropy import CrossEntropy, cross_entropy_loss
from limbeck.objectives.response.kd import KD
from limbeck.schemes.online.orc_feedback import both_labels, feedback_rows
from limbeck.schemes.parts.looking import whole_batches
from limbeck.schemes.scheme import Cast, Scheme, Training, register

Feedback = Literal["mixed", "alone", "none"]


@register(
    Card(
        key="orc",
        name="ORC",
        title="ORC: Network Group-based Knowledge Distillation using Online Role Change",
        year=2022,
        arxiv="2206.01186",
        code="choijunyong/ORCKD",
        knowledge="scheme",
        equation=r"L_I = \lambda H(y_t, P(\tilde x)) + (1 - \lambda) H(y_F, P(\tilde x)), \quad "
        r"L_P = (1 - \beta) H + \beta KL(p_P \| p_T), \quad "
        r"L_G = (1 - \beta) H + \beta (KL(p_T \| p_i) + KL(p_P \| p_i))",
        use="With a trained teacher and models of sizes between it and the student: in each step the best of them "
        "teaches besides, and the teacher learns what they get wrong.",
        defaults={
            "peers": "one model of a size between, a player called peer",
            "promoted": "1, the paper's best",
            "beta": "0.5, as no number is given",
            "temperature": "4, as in KD: no number is given",
            "alpha": "1, mixup's uniform share: no number is given",
            "feedback": "mixed, the paper's best",
        },
        evidence="reading",
        evidence_note="every turn's loss and gradient against the definition; with one student the group's loss is "
        "plain distillation",
        choices=(
            "The authors released no training code; a summary of the paper with its equations was read.",
            "Students are ranked, and asked for what they get wrong, in evaluation mode and without a trace; so does "
            "who teaches.",
            "How many of its worst samples each student gives follows from a softmax over their mean losses. One "
            "share of the mixture is drawn for a batch.",
            "Divergences are KD's, times the square of the temperature. H is each model's own recipe loss.",
            "The teacher that learns is a copy: the recipe's own stays as it is.",
        ),
    )
)
class ORC(Scheme):
    r"""One training of a group. In every step, one after the other:

    1. All students are judged on the batch. The best become temporary teachers; what all get wrong is mixed into it.
    2. Intensive teaching: the pivot, a copy of the teacher, learns from the mixture,
       :math:`\lambda H(y_t, P(\tilde x)) + (1 - \lambda) H(y_F, P(\tilde x))`.
    3. Private teaching: a temporary teacher learns from labels and pivot, :math:`(1 - \beta) H + \beta KL(p_P \| p_T)`.
    4. Group teaching: the others learn from labels, pivot and each temporary teacher,
       :math:`(1 - \beta) H + \beta (KL(p_P \| p_i) + \sum KL(p_T \| p_i))`.

    Every model has its own optimizer and turn; who teaches has learned before. Only the student is kept.

    Args:
        peers: Names of players: the other members of the group.
        promoted: How many students become temporary teachers.
        beta: :math:`\beta`.
        temperature: Of the divergences.
        alpha: The mixture's share is drawn from Beta(alpha, alpha).
        feedback: ``"mixed"``; for comparison ``"alone"``, what was got wrong and nothing else, or ``"none"``.
        pivot: A player that is the pivot; default a copy of the teacher.
        pivot_lr: The pivot's learning rate; default the one of the settings.

    Source: ORC: Network Group-based Knowledge Distillation using Online Role Change, arXiv 2206.01186.

    >>> from limbeck.engine import TrainConfig
    >>> student, peer, large = (nn.Linear(4, 3) for _ in range(3))
    >>> loss = Terms.of(CrossEntropy())
    >>> cast = Cast(student, loss, FrozenTeacher(large), TrainConfig(), players={"peer": peer})
    >>> (training,) = ORC().trainings(cast)
    >>> batch = Batch(torch.randn(6, 4), torch.arange(6) % 3)
    >>> group = training.stages[0].distiller.setup(batch)
    >>> batch = group.made(batch)
    >>> group.turns[0], sorted(group.turns[1:])
    ('pivot', ['peer_1', 'student'])
    """

    def __init__(
        self,
        peers: list[str] = ["peer"],  # noqa: B006  never changed
        promoted: int = 1,
        beta: float = 0.5,
        temperature: float = 4.0,
        alpha: float = 1.0,
        feedback: Feedback = "mixed",
        pivot: str | None = None,
        pivot_lr: float | None = None,
    ) -> None:
        if not 1 <= promoted <= len(peers) + 1:
            found = f"{promoted} of {len(peers) + 1}"
            raise ConfigError("so many cannot be promoted", where="scheme.promoted", found=found)
        check_inside(beta, "scheme.beta", closed=True)
        check_positive(temperature, "scheme.temperature")
        check_positive(alpha, "scheme.alpha")
        self.peers, self.promoted, self.beta, self.temperature = list(peers), promoted, beta, temperature
        self.alpha, self.feedback, self.pivot, self.pivot_lr = alpha, feedback, pivot, pivot_lr

    def trainings(self, cast: Cast) -> Iterator[Training]:
        whole_batches(cast.config.accumulate, "ORC", "gives out roles over a whole batch")
        peers = [cast.player(name) for name in self.peers]
        group = Group(cast.student, cast.loss, cast.teacher, self._pivot(cast), peers, self, cast.logits)
        group.seed = cast.seed
        yield Training([Stage("orc", group, cast.config)])

    def _pivot(self, cast: Cast) -> Distiller:
        """Who teaches throughout, and learns."""
        if self.pivot is not None:
            return Distiller(cast.player(self.pivot), CrossEntropy(), logits=cast.logits)
        teacher = cast.need_teacher("the group learns from")
        if not isinstance(teacher, FrozenTeacher):
            raise ConfigError(
                "the pivot keeps learning, so it is a model",
                where="teacher",
                found=type(teacher).__name__,
                remedy="give the teacher as a model, or scheme.pivot, the name of a player",
            )
        model = copy.deepcopy(teacher.model).requires_grad_(True)
        return Distiller(model, CrossEntropy(), logits=teacher.where)


class Group(Distiller):
    """Student, further students and the pivot, whose roles change from step to step; see :class:`ORC`."""

    seed = 0

    def __init__(
        self,
        student: nn.Module,
        loss: Objective | Terms,
        teacher: nn.Module | Teacher | None,
        pivot: Distiller,
        peers: Sequence[nn.Module],
        scheme: ORC,
        logits: str | None = None,
    ) -> None:
        super().__init__(student, loss, teacher, logits=logits, also=("logits",))
        self.others = nn.ModuleList(
            Distiller(peer, copy.deepcopy(self.loss), self.teacher, logits=logits, also=("logits",)) for peer in peers
        )
        self.pivot, self.scheme, self.between = pivot, scheme, KD(temperature=scheme.temperature)
        self.names = ["student", *(f"peer_{number}" for number in range(1, len(peers) + 1))]
        self.turns = (*self.names, "pivot")  # their order is every batch's own

    @property
    def group(self) -> list[Distiller]:
        """All students, the one that is wanted first."""
        return [self, *known(list[Distiller], list(self.others))]

    def objectives(self) -> Iterator[Objective]:
        for one in self.group:
            yield from one.loss
        yield self.between

    def parameters_of(self, turn: str) -> Iterator[nn.Parameter]:
        if turn == "student":
            yield from self.student.parameters()
            yield from self.loss.parameters()
        else:
            one = self.pivot if turn == "pivot" else self.others[self.names.index(turn) - 1]
            yield from one.parameters()

    def settings_of(self, turn: str) -> dict[str, Any]:
        rate = self.scheme.pivot_lr
        return {} if turn != "pivot" or rate is None else {"lr": rate}

    def settled(self) -> dict[str, Any]:
        return dict(vars(self.scheme))

    def setup(self, batch: Batch, data: DataInfo | None = None) -> Group:
        super().setup(batch, data)
        for one in (*self.group[1:], self.pivot):
            one.setup(self.prepare(batch), data)
        return self

    @torch.no_grad()
    def made(self, batch: Batch) -> Batch:
        """Roles for this batch, whole whatever processes share it, and what the pivot learns from."""
        labels = batch.require("labels")
        if not isinstance(batch.inputs, Tensor) or not batch.inputs.is_floating_point():
            found = type(batch.inputs).__name__
            raise DataError("what students get wrong is mixed in", where="batch.inputs", found=found, wanted="floats")
        as_on_first(self.buffers())  # each process's statistics of normalisation layers are of what it saw
        answers = [self._answer(one, batch) for one in self.group]
        losses = torch.stack([cross_entropy_loss(z, labels, mask=batch.mask, reduction="none") for z in answers])
        part = rows_of_ranks(batch.size, losses.device)
        losses = part.gather(losses.T).T
        best = losses.mean(dim=1).argsort(stable=True)[: self.scheme.promoted].tolist()
        share, rows = self._share(batch), feedback_rows(losses)
        sides = both_labels(part, rows, labels, batch.mask)
        mixed = share * batch.inputs + (1 - share) * part.gather(batch.inputs)[rows[part.own]]
        taught = [name for number, name in enumerate(self.names) if number not in best]
        self.turns = ("pivot", *(self.names[number] for number in best), *taught)
        roles = {"best": best, "rows": rows, "sides": sides, "share": share, "mixed": mixed, "said": {}}
        return batch.replace(extras={**batch.extras, "roles": roles})

    def _share(self, batch: Batch) -> Tensor:
        """How much of the mixture is the batch itself, 0-d."""
        if self.scheme.feedback == "mixed":
            alpha = torch.full((), self.scheme.alpha, dtype=torch.float64)
            with drawn_alike(torch.device("cpu"), self.seed, *struct.pack("<d", float(batch.progress))):
                drawn = torch.distributions.Beta(alpha, alpha).sample()
        else:
            drawn = torch.tensor(1.0 if self.scheme.feedback == "none" else 0.0)
        return drawn.to(batch.inputs.device, batch.inputs.dtype)

    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        roles = batch.extras.get("roles")
        if roles is None:  # it is judged, not trained
            return super().forward(batch)
        if turn == "pivot":
            return self._intensive(batch, roles)
        number = self.names.index(turn)
        one, prepared = self.group[number], self.prepare(batch)
        trace, teacher = one.traces(prepared)
        losses, beta = one.compare(trace, teacher, prepared, counted=batch), self.scheme.beta
        losses.total = (1 - beta) * losses.total
        losses.weights = {name: (1 - beta) * weight for name, weight in losses.weights.items()}
        teachers = {"pivot": self.pivot}
        if number not in roles["best"]:
            teachers |= {self.names[other]: self.group[other] for other in roles["best"]}
        for name, other in teachers.items():
            value = self.between(trace, self._taught(name, other, prepared, roles["said"]), prepared)
            value = value * batch.share(self.between.contract.normalizer)
            losses.total = losses.total + beta * value
            losses.terms[f"from_{name}"], losses.weights[f"from_{name}"] = value.detach(), value.new_tensor(beta)
        return losses

    def _intensive(self, batch: Batch, roles: dict[str, Any]) -> Losses:
        """What the pivot learns: the mixture, by both its labels."""
        share, logits = roles["share"], self.pivot.heard(batch.replace(inputs=roles["mixed"])).logits
        own, other = (
            cross_entropy_loss(logits, labels, mask=mask, reduction="sum") * part
            for labels, mask, part in roles["sides"]
        )
        total = share * own + (1 - share) * other
        terms = {"batch": own.detach(), "feedback": other.detach()}
        return Losses(total, terms, {"batch": share, "feedback": 1 - share})

    @torch.compiler.disable
    def _taught(self, name: str, one: Distiller, batch: Batch, said: dict[str, Tensor]) -> Trace:
        """What a teacher says, once a step."""
        if name not in said:
            said[name] = self._answer(one, batch)
        return Trace(None, {"logits": said[name]})

    def _answer(self, one: Distiller, batch: Batch) -> Tensor:
        """A model's logits in evaluation mode."""
        with dry(one.student):
            return logits_of(call_model(one.student, batch.inputs), one._logits)

    def close(self) -> None:
        super().close()
        for one in (*self.group[1:], self.pivot):
            one.close()

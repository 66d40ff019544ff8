"""Deep mutual learning: models of a cohort learn from one another while they learn from the labels."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any
from typing import cast as known

import torch  # noqa: F401  for the example
from torch import nn

from limbeck.core import catalogue
from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller, Losses
from limbeck.core.errors import ConfigError
from limbeck.core.objective import DataInfo, Objective, Terms
from limbeck.core.survey import dry
from limbeck.core.teacher import Teacher
from limbeck.engine.stage import Stage
from limbeck.schemes.scheme import Cast, Scheme, Training, register


@register(
    Card(
        key="mutual",
        name="DML",
        title="Deep Mutual Learning",
        year=2018,
        arxiv="1706.00384",
        code="YingZhangDUT/Deep-Mutual-Learning",
        knowledge="scheme",
        equation=r"L_k = CE(z_k, y) + \frac{1}{K-1} \sum_{l \ne k} KL(p_l \| p_k)",
        use="Where there is no teacher: several students, alike or not, are each other's. With a teacher its loss is "
        "every student's, and they learn from one another besides.",
        defaults={
            "peers": "one more student, the paper's usual case",
            "between": "the paper's divergence, at temperature 1",
            "weight": "1, the paper's",
        },
        evidence="formula",
        evidence_note="loss and gradients of a cohort of three against plain loops",
        choices=(
            "all models of a cohort take their step together, on predictions of the same moment; the authors' update "
            "one after the other",
            "peers are fresh copies of the student, or players by name",
            "the student is the first of the cohort; the others are dropped with its helpers",
        ),
    )
)
class Mutual(Scheme):
    r"""One training of a whole cohort.

    .. math:: L_k = L_{\text{loss}}(k) + \frac{w}{K - 1} \sum_{l \ne k} KL(p_l \| p_k), \qquad p_l \text{ held fixed}

    The first part is the recipe's loss for each model: labels, and a teacher where there is one, cached or not.

    Args:
        peers: How many fresh students beside the student; or names of players.
        between: The method by which they learn from one another.
        options: Of that method.
        weight: :math:`w`.

    Source: Deep Mutual Learning, arXiv 1706.00384.

    >>> from limbeck.engine import TrainConfig
    >>> from limbeck.objectives import CrossEntropy
    >>> student, peer, batch = nn.Linear(4, 3), nn.Linear(4, 3), Batch(torch.ones(2, 4), torch.tensor([0, 2]))
    >>> cast = Cast(student, Terms.of(CrossEntropy()), None, TrainConfig(), fresh=lambda number: peer)
    >>> (training,) = Mutual().trainings(cast)
    >>> sorted(training.stages[0].distiller.setup(batch)(batch).terms)
    ['cross_entropy', 'peer_1/cross_entropy', 'peer_1/with_0', 'with_1']
    """

    def __init__(
        self,
        peers: int | list[str] = 1,
        between: str = "kd",
        options: dict[str, Any] = {"temperature": 1.0},  # noqa: B006  never changed
        weight: float = 1.0,
    ) -> None:
        if not peers or (isinstance(peers, int) and peers < 1):
            raise ConfigError("a cohort has two models at least", where="scheme.peers", found=peers)
        self.peers, self.weight = peers, weight
        self.between = catalogue.get(between, "scheme.between").build("scheme.options", **options)

    def trainings(self, cast: Cast) -> Iterator[Training]:
        if isinstance(self.peers, int):
            peers = [cast.another(number) for number in range(1, self.peers + 1)]
        else:
            peers = [cast.player(name) for name in self.peers]
        cohort = Cohort(cast.student, cast.loss, cast.teacher, peers, self.between, self.weight, logits=cast.logits)
        yield Training([Stage("mutual", cohort, cast.config)])


class Cohort(Distiller):
    """Several students at once: each with the loss, each with every other as a further teacher.

    Args:
        student: The first of them.
        loss: Each one's; the others have copies.
        teacher: Of all; it answers once for all.
        peers: The others.
        between: What each asks of the others.
        weight: Of that.
        logits: Where logits stand in the students' outputs.
    """

    def __init__(
        self,
        student: nn.Module,
        loss: Objective | Terms,
        teacher: nn.Module | Teacher | None,
        peers: Sequence[nn.Module],
        between: Objective,
        weight: float,
        *,
        logits: str | None = None,
    ) -> None:
        also = (*between.student_taps, *between.teacher_taps)
        super().__init__(student, loss, teacher, logits=logits, also=also)
        self.others = nn.ModuleList(
            Distiller(peer, copy.deepcopy(self.loss), self.teacher, logits=logits, also=also) for peer in peers
        )
        self.between = nn.ModuleList(copy.deepcopy(between) for _ in range(len(peers) + 1))
        self.weight = weight

    @property
    def cohort(self) -> list[Distiller]:
        """All of them, the student first."""
        return [self, *known(list[Distiller], list(self.others))]

    def objectives(self) -> Iterator[Objective]:
        for one in self.cohort:
            yield from one.loss
        yield from known(list[Objective], list(self.between))

    def setup(self, batch: Batch, data: DataInfo | None = None) -> Cohort:
        super().setup(batch, data)
        batch = self.prepare(batch)
        for one in self.cohort[1:]:
            one.setup(batch, data)
        with ExitStack() as stack:
            for one in self.cohort:
                stack.enter_context(dry(one.student))
            traces = [one.heard(batch) for one in self.cohort]
        for number, objective in enumerate(known(list[Objective], list(self.between))):
            objective.setup(traces[number], traces[number - 1], batch, data or DataInfo())
        return self

    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        prepared = self.prepare(batch)
        first, teacher = self.traces(prepared)
        traces = [first, *(one.heard(prepared) for one in self.cohort[1:])]
        fixed = [trace.detach() for trace in traces]
        whole: Losses | None = None
        for number, one in enumerate(self.cohort):
            losses = one.compare(traces[number], teacher, prepared, counted=batch)
            objective = known(Objective, self.between[number])
            share = batch.share(objective.contract.normalizer)
            for other in (n for n in range(len(traces)) if n != number):
                value = objective(traces[number], fixed[other], prepared) * share
                weight = value.new_tensor(self.weight / (len(traces) - 1))
                losses.total = losses.total + weight * value
                losses.terms[f"with_{other}"], losses.weights[f"with_{other}"] = value.detach(), weight
            whole = losses if whole is None else _together(whole, losses, f"peer_{number}")
        assert whole is not None
        return whole

    def settled(self) -> dict[str, Any]:
        shapes = [{n: list(t.shape) for n, t in one.student.state_dict().items()} for one in self.cohort[1:]]
        return {"peers": shapes, "between": repr(self.between[0]), "weight": self.weight}

    def close(self) -> None:
        super().close()
        for one in self.cohort[1:]:
            one.close()


def _together(first: Losses, other: Losses, name: str) -> Losses:
    """Two models' losses as one sum; the logits are the first one's."""
    return Losses(
        first.total + other.total,
        {**first.terms, **{f"{name}/{key}": value for key, value in other.terms.items()}},
        {**first.weights, **{f"{name}/{key}": value for key, value in other.weights.items()}},
        first.logits,
    )

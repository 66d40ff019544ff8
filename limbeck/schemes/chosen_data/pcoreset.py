"""PCoreSet: active distillation, in which a teacher teaches in every round and labels are asked for where it pays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller
from limbeck.core.errors import DataError
from limbeck.core.files import write_json
from limbeck.core.ranks import rank_here
from limbeck.core.reduction import check_inside, check_positive
from limbeck.core.teacher import FrozenTeacher
from limbeck.data.loader import IndexedLoader
from limbeck.data.order import epoch_order
from limbeck.engine.stage import Stage
from limbeck.schemes.chosen_data.querying import Halves, badge, balanced, k_center_greedy
from limbeck.schemes.parts.looking import as_first_found, indexed, need_labels, said_of_all
from limbeck.schemes.scheme import Cast, Scheme, Training, register

_ASKED = "asked_samples.json"


@register(
    Card(
        key="pcoreset",
        name="ActiveKD / PCoreSet",
        title="PCoreSet: Effective Active Learning through Knowledge Distillation from Vision-Language Models",
        year=2025,
        arxiv="2506.00910",
        code="erjui/PCoreSet",
        knowledge="scheme",
        equation=r"x^* = \arg\max_{x \in U} \min_{s \in S} \| p(x) - s \|_2, \qquad S \leftarrow S \cup \{ p(x^*) \}",
        use="When labels are dear, there are many samples without one, and a general teacher knows a little of "
        "everything. With {cross_entropy: 0.5, dho: 1.0} and the head {dual: {alpha: 0.5, beta: 1, search: false}}, "
        "the paper's.",
        defaults={
            "strategy": "pcoreset",
            "rounds": "15, of the authors' scripts",
            "budget": "as many as there are classes, of the same",
            "shots": "1 a class, of the same",
        },
        evidence="parity",
        evidence_note="choices of pcoreset, entropy and coreset against erjui/PCoreSet@075a76a; badge against "
        "its definition",
        choices=(
            "The training set's own labels are those that are asked for; a sample without one (-1) is never asked "
            "about and teaches by the teacher alone.",
            "Half of a batch has labels and half has none, so the mean of a term on all is the mean of the authors' "
            "two; {cross_entropy: 0.5, dho: 1.0} is their loss.",
            "Each round trains a fresh student for the recipe's length. What it is asked in evaluation mode counts, of "
            "a dual head the mixture of both.",
            "The teacher stays as it is; the authors' second one, refitted in each round, belongs to another paper.",
            "BADGE starts from the longest gradient; in the code all have length 1 there, so its first is any.",
        ),
        tasks=("classification",),
        cost="One training a round, and each ends with a look at all samples, on every rank.",
    )
)
class PCoreSet(Scheme):
    r"""Train, ask for labels, train anew: ``rounds`` times, and once more for the student.

    .. math:: x^* = \arg\max_{x \in U} \min_{s \in S} \| p(x) - s \|_2

    S are the model's predictions on labelled samples, and on those that were chosen before in this round.

    Args:
        strategy: ``pcoreset``; or ``random``, ``entropy`` of predictions, ``coreset`` of features, ``badge``,
            ``class_balanced``.
        rounds: How often labels are asked for.
        budget: How many at a time; ``None``: as many as there are classes.
        shots: Labels of each class in the beginning.

    Source: PCoreSet, arXiv 2506.00910.

    >>> PCoreSet("random", rounds=2).rounds
    2
    """

    def __init__(
        self,
        strategy: Literal["pcoreset", "random", "entropy", "coreset", "badge", "class_balanced"] = "pcoreset",
        rounds: int = 15,
        budget: int | None = None,
        shots: int = 1,
    ) -> None:
        check_inside(rounds, "scheme.rounds", 0.0, float("inf"), closed=True)
        for name, value in (("budget", 1 if budget is None else budget), ("shots", shots)):
            check_positive(value, f"scheme.{name}")
        self.strategy, self.rounds, self.budget, self.shots = strategy, rounds, budget, shots

    def trainings(self, cast: Cast) -> Iterator[Training]:
        loader = indexed(cast.train, "active learning")
        labels = need_labels(loader, "active learning")
        known = first_shots(loader, labels, self.shots, cast.seed)
        told: list[dict[str, object]] = [{"asked": known.tolist()}]
        for number in range(self.rounds):
            pool = _pool(loader, labels, known)
            if not len(pool):
                break
            model = cast.another(number + 1)
            yield self._training(cast, model, loader, known, f"round-{number}")
            rows = as_first_found(self.asked(model, cast, loader, known, pool, number))
            told.append({"asked": rows.tolist()})
            known = torch.cat([known, rows])
        if cast.folder is not None and rank_here() == 0:
            write_json(cast.folder / _ASKED, {"strategy": self.strategy, "rounds": told})
        yield self._training(cast, cast.student, loader, known, "")

    def _training(
        self, cast: Cast, model: torch.nn.Module, loader: IndexedLoader, known: Tensor, name: str
    ) -> Training:
        loss = cast.again()
        teacher = cast.need_teacher("this loss asks") if loss.teacher_taps else None
        distiller = Distiller(model, loss, teacher, logits=cast.logits)
        return Training([Stage("active", distiller, cast.config)], name, train=Halves(loader, known))

    def asked(
        self, model: torch.nn.Module, cast: Cast, loader: IndexedLoader, known: Tensor, pool: Tensor, number: int
    ) -> Tensor:
        """The ids whose labels are asked for.

        Args:
            model: Trained in this round.
            cast: Seed and where logits stand.
            loader: Of all.
            known: Ids that have a label.
            pool: Ids that may be asked about.
            number: Of the round.
        """
        order = epoch_order(len(pool), cast.seed, number + 1)
        labels = need_labels(loader, "active learning")
        classes = loader.classes or int(labels.max()) + 1
        budget = min(classes if self.budget is None else self.budget, len(pool))
        if self.strategy == "random":
            return pool[order[:budget]]
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        taps = ("logits", "penultimate") if self.strategy in ("coreset", "badge") else ("logits",)
        said = said_of_all(FrozenTeacher(model, logits=cast.logits), loader, taps, device)
        place = torch.full((loader.samples,), -1)
        place[said["index"]] = torch.arange(len(said["index"]))
        chances = said["logits"].softmax(dim=-1)
        own, old = chances[place[pool]], chances[place[known]]
        if self.strategy == "pcoreset":
            return pool[k_center_greedy(own, old, budget)]
        if self.strategy == "entropy":
            return pool[torch.special.entr(own).sum(dim=1).topk(budget).indices]
        if self.strategy == "class_balanced":
            return pool[balanced(own.argmax(dim=1), labels[known].bincount(minlength=classes), order, budget)]
        features = said["penultimate"].flatten(1)
        if self.strategy == "badge":
            return pool[badge(own, features[place[pool]], budget)]
        unit = torch.nn.functional.normalize(features, dim=1)
        return pool[k_center_greedy(unit[place[pool]], unit[place[known]], budget)]


def first_shots(loader: IndexedLoader, labels: Tensor, shots: int, seed: int) -> Tensor:
    """So many samples of each class, by chance; ids ``[S]``.

    Raises:
        DataError: No sample has a label.
    """
    rows = torch.arange(len(labels)) if loader.only is None else loader.only
    rows = rows[labels[rows] >= 0]
    if not len(rows):
        raise DataError("no sample has a label that could be asked for", where="data.labels")
    mixed = rows[epoch_order(len(rows), seed, 0)]
    own = torch.nn.functional.one_hot(labels[mixed]).cumsum(dim=0).gather(1, labels[mixed, None]).squeeze(1)
    return mixed[own <= shots]


def _pool(loader: IndexedLoader, labels: Tensor, known: Tensor) -> Tensor:
    """Ids with a label that was not told yet."""
    free = labels >= 0
    free[known] = False
    rows = torch.arange(len(labels)) if loader.only is None else loader.only
    return rows[free[rows]]

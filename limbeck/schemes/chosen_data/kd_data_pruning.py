"""Distillation on a part of the data: the teacher saw all of them, the student sees those that were kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.files import write_json
from limbeck.core.objective import Terms
from limbeck.core.ranks import rank_here
from limbeck.core.reduction import check_inside
from limbeck.core.teacher import FrozenTeacher
from limbeck.data.loader import IndexedLoader
from limbeck.data.order import epoch_order
from limbeck.engine.config import TrainConfig
from limbeck.engine.stage import Stage
from limbeck.objectives.response.cross_entropy import CrossEntropy
from limbeck.schemes.chosen_data.pruning_scores import (
    Forgetful,
    Forgetting,
    coverage,
    el2n,
    gradient_norms,
    herding,
    quotas,
)
from limbeck.schemes.parts.looking import as_first_found, indexed, need_labels, said_of_all
from limbeck.schemes.parts.sides import weigh_sides
from limbeck.schemes.scheme import Cast, Scheme, Training, register

_KEPT = "kept_samples.json"
_WHO = "pruning of data"
_BY_PROBES = ("el2n", "grand", "forgetting", "coverage")


def alpha_of(fraction: float) -> float:
    r"""How much the teacher counts on a part of the data, :math:`\min(1, \max(1/2, 1 - f / 2))`.

    >>> alpha_of(1.0), alpha_of(0.2)
    (0.5, 0.9)
    """
    return min(1.0, max(0.5, 1 - 0.5 * fraction))


@register(
    Card(
        key="kd_data_pruning",
        name="KD on pruned data",
        title="Distilling the Knowledge in Data Pruning",
        year=2024,
        arxiv="2403.07854",
        knowledge="scheme",
        equation=r"L = \frac{1}{|D_f|} \sum_{i \in D_f} (1 - \alpha)\, CE(z_i, y_i) + \alpha T^2 KL(p_i \| q_i)",
        use="To train on a part of the data at little loss: with a teacher that saw all of them a random part does as "
        "well as any choice. Loss {cross_entropy: 1, kd: 1}; the scheme weighs the two.",
        defaults={
            "fraction": "0.5, at which the paper's ImageNet student beats training on all data",
            "score": "random, what the paper recommends",
            "alpha": "grows as the fraction falls, which is the paper's finding; the line is ours",
            "probes": "10 models for EL2N and GraNd, 1 for forgetting, as in their papers",
            "probe_share": "a tenth of the training, as in EL2N's paper; forgetting watches all of one",
        },
        evidence="formula",
        evidence_note="scores against plain loops and autograd; all of the data is plain distillation bit for bit",
        choices=(
            "a part has the recipe's epochs, and so fewer steps; same_steps makes them as many as all of the data has",
            "probes learn from the labels of all data; samples are scored as they are, without augmentation",
            "coverage is by EL2N; herding by the teacher's features, class by class where balanced",
            "scores of memorisation need hundreds of trainings and are not among these",
        ),
    )
)
class KDDataPruning(Scheme):
    r"""Score, keep a part, distil on it.

    .. math:: L = \frac{1}{|D_f|} \sum_{i \in D_f} (1 - \alpha)\, CE(z_i, y_i) + \alpha\, T^2 KL(p_i \| q_i)

    Args:
        fraction: f, the part that is kept: ``round(f N)`` samples.
        score: ``random``, ``el2n``, ``grand``, ``forgetting`` (of these the hardest stay), ``herding`` or
            ``coverage``.
        balanced: As many of each class as there can be.
        alpha: :math:`\alpha`, the weight of the terms that ask a teacher; ``rule``: from the fraction, see
            :func:`alpha_of`; ``loss``: the weights are the recipe's.
        same_steps: Train for as many steps as all of the data would take.
        probes: Models whose scores are averaged; ``None``: as the card says.
        probe_share: How long they train, a part of the recipe's length; ``None``: as the card says.
        cutoff: Of ``coverage``: the part of the hardest that is left out.

    Source: Distilling the Knowledge in Data Pruning, arXiv 2403.07854.

    >>> from limbeck.data.resident import ResidentLoader
    >>> from limbeck.objectives import KD, CrossEntropy
    >>> from torch import nn
    >>> train = ResidentLoader(torch.rand(40, 4), torch.arange(40) % 3, batch_size=4, classes=3)
    >>> teacher = FrozenTeacher(nn.Linear(4, 3))
    >>> cast = Cast(nn.Linear(4, 3), CrossEntropy() + KD(), teacher, TrainConfig(epochs=2), train)
    >>> (training,) = KDDataPruning(0.25).trainings(cast)
    >>> training.train.shown, [float(w(0)) for w in training.stages[0].distiller.loss.weights]
    (10, [0.125, 0.875])
    """

    def __init__(
        self,
        fraction: float = 0.5,
        score: Literal["random", "el2n", "grand", "forgetting", "herding", "coverage"] = "random",
        balanced: bool = False,
        alpha: float | Literal["rule", "loss"] = "rule",
        same_steps: bool = False,
        probes: int | None = None,
        probe_share: float | None = None,
        cutoff: float = 0.0,
    ) -> None:
        check_inside(fraction, "scheme.fraction", closed=True)
        check_inside(cutoff, "scheme.cutoff", closed=True)
        if not isinstance(alpha, str):
            check_inside(alpha, "scheme.alpha", closed=True)
        elif alpha not in ("rule", "loss"):
            raise ConfigError("no such weight", where="scheme.alpha", found=alpha, wanted="0 to 1, 'rule' or 'loss'")
        if probes is not None and probes < 1:
            raise ConfigError("there must be one at least", where="scheme.probes", found=probes)
        if probe_share is not None:
            check_inside(probe_share, "scheme.probe_share", closed=True)
        whole = score == "forgetting"
        self.fraction, self.score, self.balanced, self.alpha = fraction, score, balanced, alpha
        self.same_steps, self.cutoff = same_steps, cutoff
        self.probes = probes if probes is not None else 1 if whole else 10
        self.probe_share = probe_share if probe_share is not None else 1.0 if whole else 0.1

    def trainings(self, cast: Cast) -> Iterator[Training]:
        loader = indexed(cast.train, _WHO)
        scores = torch.zeros(loader.samples)
        for number in range(1, 1 + self.probes * (self.score in _BY_PROBES)):
            probe = self._probe(cast, loader, number)
            yield probe
            scores += as_first_found(self._scores(probe, cast, loader)) / self.probes
        rows = self.chosen(cast, loader, scores)
        if cast.folder is not None and rank_here() == 0:
            facts = {"fraction": self.fraction, "score": self.score, "alpha": self._alpha(), "samples": rows.tolist()}
            write_json(cast.folder / _KEPT, facts)
        loss, config = cast.loss, cast.config
        alpha = self._alpha()
        if alpha is not None:
            loss = weigh_sides(loss, 1 - alpha, alpha, _WHO)
        if self.same_steps:
            steps = config.total_steps(loader.steps_per_epoch)
            config = config.model_copy(update={"epochs": None, "steps": steps})
        teacher = cast.need_teacher("this loss asks") if loss.teacher_taps else None
        distiller = Distiller(cast.student, loss, teacher, logits=cast.logits)
        part = loader if self.fraction == 1 else loader.chosen(rows)
        yield Training([Stage("distill", distiller, config)], train=part)

    def _alpha(self) -> float | None:
        return None if self.alpha == "loss" else alpha_of(self.fraction) if self.alpha == "rule" else float(self.alpha)

    def _probe(self, cast: Cast, loader: IndexedLoader, number: int) -> Training:
        """The training of a model that scores."""
        need_labels(loader, f"score {self.score}")
        model, loss = cast.another(number), Terms.of(CrossEntropy())
        config = _shorter(cast.config, self.probe_share)
        if self.score != "forgetting":
            stage = Stage("probe", Distiller(model, loss, logits=cast.logits), config)
            return Training([stage], f"probe-{number}")
        if loader.augment.mixes:
            raise ConfigError("forgetting is told by classes", where="data.augment", remedy="leave the mixing out")
        distiller = Forgetful(model, loss, logits=cast.logits)
        distiller.forgetting = Forgetting(loader.samples)
        return Training([Stage("probe", distiller, config)], f"probe-{number}", keeps={"seen": distiller.forgetting})

    def _scores(self, probe: Training, cast: Cast, loader: IndexedLoader) -> Tensor:
        """What a trained probe says of all samples, by id."""
        model = probe.student
        if self.score == "forgetting":
            return probe.keeps["seen"].scores()  # type: ignore[operator]
        if self.score == "grand":
            return gradient_norms(model, loader, cast.logits)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        said = said_of_all(FrozenTeacher(model, logits=cast.logits), loader, device=device)
        scores = torch.zeros(loader.samples)
        scores[said["index"]] = el2n(said["logits"], need_labels(loader, "EL2N")[said["index"]])
        return scores

    def chosen(self, cast: Cast, loader: IndexedLoader, scores: Tensor) -> Tensor:
        """The ids that are kept, ascending, of a set with these scores by id.

        Raises:
            DataError: None would be.
        """
        count = round(self.fraction * loader.samples)
        if count < 1:
            raise DataError("no sample would be kept", where="scheme.fraction", found=self.fraction)
        order = epoch_order(loader.samples, cast.seed, 0)
        values = self._features(cast, loader) if self.score == "herding" else scores
        if not self.balanced:
            return self._best(values, count, order)
        labels = need_labels(loader, "an even choice")
        parts = []
        for label, own in enumerate(quotas(labels[labels >= 0], min(count, int((labels >= 0).sum()))).tolist()):
            rows = (labels == label).nonzero().flatten()
            place = torch.full((loader.samples,), -1)
            place[rows] = torch.arange(len(rows))
            within = place[order][place[order] >= 0]
            parts.append(rows[self._best(values[rows], own, within)])
        return torch.cat(parts).sort().values

    def _best(self, values: Tensor, count: int, order: Tensor) -> Tensor:
        """Rows of the values that are kept; equals go by the order."""
        if self.score == "random":
            return order[:count].sort().values
        if self.score == "herding":
            return herding(values, count).sort().values
        if self.score == "coverage":
            return coverage(values, count, order, self.cutoff)
        hardest = values[order].argsort(descending=True, stable=True)
        return order[hardest[:count]].sort().values

    def _features(self, cast: Cast, loader: IndexedLoader) -> Tensor:
        device = next((p.device for p in cast.student.parameters()), torch.device("cpu"))
        said = said_of_all(cast.need_teacher("herding asks"), loader, ("penultimate",), device)
        features = said["penultimate"].flatten(1)
        found = torch.zeros(loader.samples, features.shape[1])
        found[said["index"]] = features
        return as_first_found(found)


def _shorter(config: TrainConfig, share: float) -> TrainConfig:
    """The same settings for a part of the length."""
    length = {n: max(1, round(v * share)) for n in ("epochs", "steps") if (v := getattr(config, n)) is not None}
    return config.model_copy(update=length)

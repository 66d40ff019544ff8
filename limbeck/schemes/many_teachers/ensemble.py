"""An ensemble of teachers: the student learns from what they say together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch  # noqa: F401  for the example
from torch import nn  # noqa: F401

from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, did_you_mean
from limbeck.engine.stage import Stage
from limbeck.schemes.scheme import Cast, Scheme, Training, register
from limbeck.teachers.ensemble import By, Ensemble, Of, check_voice


@register(
    Card(
        key="ensemble",
        name="Ensemble",
        title="Distilling the Knowledge in a Neural Network",
        year=2015,
        arxiv="1503.02531",
        knowledge="scheme",
        equation=r"p = \sum_k w_k\, \mathrm{softmax}(z_k / T)",
        use="Where several models of one task are there: the student learns from what they say together, by any loss.",
        defaults={"of": "probabilities, the paper's arithmetic mean; logits for its geometric one", "weights": "alike"},
        evidence="formula",
        evidence_note="means and weights against the definition",
        choices=("the features of an ensemble are its first teacher's",),
        tasks=("several teachers",),
        cost="Every teacher answers each batch.",
    )
)
class FromEnsemble(Scheme):
    r"""One stage with all teachers as one: the recipe's loss, whatever it is, hears the mean of what they say.

    .. math:: p = \sum_k w_k\, \mathrm{softmax}(z_k / T) \quad \text{or} \quad z = \sum_k w_k z_k

    Of features, and of whatever is no logits, the first teacher's are heard.

    Args:
        weights: Of each teacher by its name, relative; one that is not named counts 1. ``None``: all alike.
        of: ``"probabilities"`` or ``"logits"``.
        by: ``"fixed"``; or weights sample by sample: ``"confidence"``, by each teacher's own cross-entropy (CA-MKD;
            see also the method ``ca_mkd``, which weighs features too), or ``"entropy"`` (EBKD).
        temperature: At which probabilities are averaged; to distil the mean of softened ones, that of the loss.

    Source: Hinton, Vinyals and Dean, arXiv 1503.02531; weights by confidence of arXiv 2201.00007.

    >>> from limbeck.core.objective import Terms
    >>> from limbeck.core.teacher import FrozenTeacher
    >>> from limbeck.engine import TrainConfig
    >>> from limbeck.objectives import KD
    >>> student, teachers = nn.Linear(4, 3), {name: FrozenTeacher(nn.Linear(4, 3)) for name in "ab"}
    >>> cast = Cast(student, Terms.of(KD()), None, TrainConfig(), teachers=teachers)
    >>> (training,) = FromEnsemble({"a": 3}).trainings(cast)
    >>> training.stages[0].distiller.teacher.weights
    [0.75, 0.25]
    """

    def __init__(
        self,
        weights: dict[str, float] | None = None,
        of: Of = "probabilities",
        by: By = "fixed",
        temperature: float = 1.0,
    ) -> None:
        check_voice(of, by, temperature, weighted=weights is not None, where="scheme.")
        self.weights, self.of, self.by, self.temperature = weights, of, by, temperature

    def trainings(self, cast: Cast) -> Iterator[Training]:
        teachers = cast.need_teachers("an ensemble has")
        weights = None if self.weights is None else weights_by_name(self.weights, list(teachers))
        voice = Ensemble(teachers.values(), weights, of=self.of, by=self.by, temperature=self.temperature)
        distiller = EnsembleDistiller(cast.student, cast.loss, voice, logits=cast.logits)
        yield Training([Stage("ensemble", distiller, cast.config)])


class EnsembleDistiller(Distiller):
    """A student of an ensemble; how its members are mixed is part of what the run is."""

    def settled(self) -> dict[str, Any]:
        voice = self.teacher
        assert isinstance(voice, Ensemble)
        return {name: getattr(voice, name) for name in ("weights", "of", "by", "temperature")}


def weights_by_name(given: dict[str, float], names: list[str], where: str = "scheme.weights") -> list[float]:
    """A number for each of several teachers, 1 where none is given.

    Raises:
        ConfigError: A name is no teacher's.
    """
    for name in given:
        if name not in names:
            raise ConfigError(
                "there is no such teacher",
                where=f"{where}.{name}",
                found=f"teachers {', '.join(names)}",
                remedy=did_you_mean(name, names),
            )
    return [float(given.get(name, 1.0)) for name in names]

"""DFAD: a generator looks for what the student gets wrong, and the student learns from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Losses
from limbeck.core.reduction import check_positive
from limbeck.engine.stage import Stage
from limbeck.schemes.data_free.losses import discrepancy
from limbeck.schemes.data_free.made import Generating, teacher_at_hand, without_data
from limbeck.schemes.scheme import Cast, Scheme, Training, register


@register(
    Card(
        key="dfad",
        name="DFAD",
        title="Data-Free Adversarial Distillation",
        year=2019,
        arxiv="1912.11006",
        code="VainF/DFAD",
        knowledge="scheme",
        equation=r"\min_\theta \max_G \; \mathbb{E}_\epsilon \left[ \tfrac 1 C \left\| z^T(G(\epsilon)) - "
        r"z^S_\theta(G(\epsilon)) \right\|_1 \right]",
        use="When there are no data at all: the generator asks of images nothing but that the student be wrong, so "
        "it suits any teacher whose logits the student shares. It wants many steps.",
        defaults={
            "every": "5 steps of the student for one of the generator, as in the paper",
            "by": "the paper's mean absolute error of logits",
            "lr": "0.001 with Adam, of the authors' script for CIFAR",
            "latent": "256, of the same",
        },
        evidence="parity",
        evidence_note="both players' losses and their gradients to the image against VainF/DFAD@c161591, in float64",
        choices=(
            "A step is one of the student's; in every fifth the generator moves as well.",
            "With `by: loss` the student learns by the recipe's loss in the place of the paper's.",
            "The student is in training mode while the generator moves, as in the code.",
        ),
        cost="In every fifth step the generator runs twice, and both models once more, with gradients; of several "
        "processes each does so for the whole batch.",
    )
)
class DFAD(Scheme):
    r"""One training with two players, ``student`` and ``generator``; no sample of the data is read.

    .. math:: L_S = \tfrac{1}{BC} \| z^S - z^T \|_1, \qquad L_G = - L_S

    Args:
        every: Steps of the student for one of the generator.
        by: What the student learns by: ``"discrepancy"``, :math:`L_S`, or the recipe's ``"loss"``.
        lr: Of the generator's Adam.
        latent: Width of the noise.
        width: Of the generator.

    Source: Data-Free Adversarial Distillation, arXiv 1912.11006.

    >>> DFAD().every
    5
    """

    def __init__(
        self,
        every: int = 5,
        by: Literal["discrepancy", "loss"] = "discrepancy",
        lr: float = 1e-3,
        latent: int = 256,
        width: int = 64,
    ) -> None:
        for name, value in (("every", every), ("lr", lr), ("latent", latent), ("width", width)):
            check_positive(value, f"scheme.{name}")
        self.every, self.by, self.lr, self.latent, self.width = every, by, lr, latent, width

    def trainings(self, cast: Cast) -> Iterator[Training]:
        teacher, loader = teacher_at_hand(cast, "dfad"), without_data(cast, "dfad")
        distiller = Adversarial(cast.student, cast.loss, teacher, logits=cast.logits)
        sizes: dict[str, Any] = {"latent": self.latent, "width": self.width, "lr": self.lr}
        distiller.plan(self, loader, seed=cast.seed, **sizes, every=self.every)
        yield Training([Stage("dfad", distiller, cast.config)], train=loader)


class Adversarial(Generating):
    """What the student lessens, the generator raises; see :class:`DFAD`."""

    who = "dfad"

    def learn(self, batch: Batch) -> Losses:
        if self.scheme.by == "loss" or not self.training:  # judged on other data, a student is judged by its loss
            return super().learn(batch)
        logits = self.said(batch.inputs)
        with torch.no_grad():
            wanted = self.inverted(batch.inputs).logits
        value = discrepancy(logits, wanted) * self.rows_of(batch).share
        terms = {"discrepancy": value.detach()}
        return Losses(value, terms, {"discrepancy": torch.ones_like(value)}, logits.detach(), {"distill": value})

    def judge(self, inputs: Tensor, drawn: dict[str, Tensor]) -> dict[str, tuple[float, Tensor]]:
        return {"apart": (-1.0, discrepancy(self.said(inputs), self.inverted(inputs).logits))}

"""SHIKE: experts of several depths learn from one another what none of them may say too loudly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller, Losses
from limbeck.core.divergences import kl_rows, log_among_others, soften
from limbeck.core.errors import ConfigError
from limbeck.core.labels import class_labels
from limbeck.core.objective import DataInfo, Objective
from limbeck.core.reduction import check_inside, widen
from limbeck.engine.config import TrainConfig
from limbeck.engine.stage import Stage
from limbeck.objectives.response.kd import KD
from limbeck.schemes.scheme import Cast, Scheme, Training, register
from limbeck.schemes.self_taught.experts import Experts, log_prior, tail_of

_MASKED = -30.0  # the authors' logit of the class that is left out


def excavated(said: Tensor, target: Tensor) -> Tensor:
    r"""What experts together know of the classes that are not the label's, as logits ``[B, C]``.

    .. math:: r_c = \max_i z_{ic} \;(c \ne h), \qquad r_h = \frac{1}{M} \sum_i z_{ih}, \qquad
        h = \arg\max_{c \ne y} \sum_i z_{ic}

    So each class has the best expert's logit, but the hardest negative is toned down. The label's own place holds its
    best logit too and is not to be used.

    Args:
        said: ``[M, B, C]`` logits of the experts.
        target: ``[B]`` labels.

    >>> said = torch.tensor([[[9.0, 4.0, 1.0, 0.0]], [[9.0, 2.0, 0.0, 2.0]]])
    >>> excavated(said, torch.tensor([0]))
    tensor([[9., 3., 1., 2.]])
    """
    mean, best = said.mean(dim=0), said.max(dim=0).values
    hardest = mean.detach().scatter(-1, target.unsqueeze(-1), -torch.inf).argmax(dim=-1, keepdim=True)
    return best.scatter(-1, hardest, mean.gather(-1, hardest))


def transfer_rows(said: Tensor, target: Tensor, *, detach: bool = False, masked: bool = True) -> Tensor:
    r"""Divergence of each expert from what all know of the other classes, summed over experts, ``[B]``.

    .. math:: \sum_i KL\left( \mathrm{softmax}_{c \ne y}(r) \,\|\, \mathrm{softmax}_{c \ne y}(z_i) \right)

    Args:
        said, target: As :func:`excavated` takes them.
        detach: What all know is a constant.
        masked: Leave the label's class out on both sides. If not, as in the authors' code: it has the logit 0 in what
            all know, and -30 in what an expert says.

    >>> transfer_rows(torch.tensor([[[9.0, 1.0, 0.0]]] * 2), torch.tensor([0]))
    tensor([0.])
    """
    goal = excavated(widen(said), target)
    goal = goal.detach() if detach else goal
    if masked:
        first, others = log_among_others(goal, target), target.expand(len(said), -1)
        return kl_rows(first, log_among_others(widen(said), others)).sum(dim=0)
    place = target.unsqueeze(-1)
    own = widen(said).scatter(-1, place.expand(len(said), -1, -1), _MASKED)
    return kl_rows(soften(goal.scatter(-1, place, 0.0)), soften(own)).sum(dim=0)


def mutual_rows(said: Tensor, *, detach: bool = False) -> Tensor:
    r"""What every expert has yet to learn from every other, :math:`\sum_i \sum_{j \ne i} KL(p_j \| p_i)`, ``[B]``.

    Args:
        said: ``[M, B, C]`` logits.
        detach: The one that teaches is a constant.

    >>> mutual_rows(torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]]))
    tensor([3.0464])
    """
    log_p = soften(said)
    taught = log_p.detach() if detach else log_p
    # Sums of p_j (log p_j - log p_i) over both experts; what one says of itself adds nothing.
    return len(said) * (taught.exp() * taught).sum(dim=(0, -1)) - (taught.exp().sum(dim=0) * log_p.sum(dim=0)).sum(-1)


@register(
    Card(
        key="shike",
        name="SHIKE",
        title="Long-Tailed Visual Recognition via Self-Heterogeneous Integration with Knowledge Excavation",
        year=2023,
        arxiv="2304.01279",
        code="jinyan-06/SHIKE",
        knowledge="scheme",
        equation=r"L = \sum_i CE(z_i, y) + \alpha\, KL(r \| z_i)_{c \ne y} + \beta \sum_{j \ne i} KL(p_j \| p_i)",
        use="Without a teacher, where few classes have most of the samples: a student of experts that read several "
        "depths (resnet32_experts with shared: 2, fuse: true). Their classifiers are trained anew on balanced terms.",
        defaults={
            "transfer": "10, divided by the number of classes: how the authors' code takes its mean",
            "mutual": "1, divided alike",
            "retrain": "20 of 200 epochs, as in the authors' script",
            "imbalance": "none: the data are as they are; the paper cuts CIFAR to a factor of 100",
        },
        evidence="parity",
        evidence_note="loss and gradients of jinyan-06/SHIKE@2b04b62 with masked: false; its masks against loops",
        choices=(
            "the label's class is left out of both sides of the transfer; in the authors' code it keeps a logit of 0 "
            "in the target, which masked: false does",
            "nothing is detached, as in the authors' code; detach makes constants of all that teaches",
            "the second stage draws the classifiers anew in place of training a second set that lay idle before",
            "what is frozen in the second stage stays as it is, normalisation statistics included; the authors' go on",
            "both stages have the recipe's schedule; the authors warm up over 5 epochs, to another rate in each",
        ),
    )
)
class SHIKE(Scheme):
    r"""Two stages: experts that learn from one another, then their classifiers alone on a balanced loss.

    .. math::
        L_1 = \sum_i \Big[ L_{\text{loss}}(z_i, y) + \frac{\alpha}{C} KL(r \| z_i)_{c \ne y} +
        \frac{\beta}{C} \sum_{j \ne i} KL(p_j \| p_i) \Big], \qquad L_2 = \sum_i L_{\text{loss}}(z_i + \log n, y)

    r is what all experts know of the classes that are not the label's, see :func:`excavated`; :math:`n_c` is how often
    class c is seen.

    Args:
        transfer: :math:`\alpha`.
        mutual: :math:`\beta`.
        retrain: The second stage's share of the training; 0: there is none.
        classifiers: Which of the student's parameters that trains: patterns over their names.
        detach: What teaches is a constant.
        masked: See :func:`transfer_rows`.
        imbalance: Cut the set to a long tail of this factor first, see
            :func:`~limbeck.data.long_tail.long_tailed`; ``None``: leave it as it is.

    Source: SHIKE, arXiv 2304.01279.

    >>> SHIKE().split(TrainConfig(epochs=200))
    (180, 20)
    """

    def __init__(
        self,
        transfer: float = 10.0,
        mutual: float = 1.0,
        retrain: float = 20 / 200,
        classifiers: list[str] = ["experts.*.linear.*"],  # noqa: B006  never changed
        detach: bool = False,
        masked: bool = True,
        imbalance: float | None = None,
    ) -> None:
        for name, value in {"transfer": transfer, "mutual": mutual}.items():
            check_inside(value, f"scheme.{name}", 0.0, float("inf"), closed=True)
        check_inside(retrain, "scheme.retrain", closed=True)
        self.transfer, self.mutual, self.retrain, self.classifiers = transfer, mutual, retrain, list(classifiers)
        self.detach, self.masked, self.imbalance = detach, masked, imbalance

    def trainings(self, cast: Cast) -> Iterator[Training]:
        loader, counts = tail_of(cast, self.imbalance, "shike")
        first, second = self.split(cast.config)
        name = "steps" if cast.config.steps is not None else "epochs"
        none = torch.zeros(1, len(counts))
        learning = Excavating(cast.student, cast.loss, cast.teacher, none, "shike", cast.logits)
        learning.scheme = self
        stages = [Stage("experts", learning, cast.config.model_copy(update={name: first}))]
        if second:
            prior = log_prior(counts).unsqueeze(0)
            balanced = Rebalanced(cast.student, cast.again(), cast.teacher, prior, "shike", cast.logits)
            balanced.scheme = self
            config = cast.config.model_copy(update={name: second})
            stages.append(Stage("classifiers", balanced, config, learn=tuple(self.classifiers)))
        yield Training(stages, train=loader)

    def split(self, config: TrainConfig) -> tuple[int, int]:
        """Epochs, or steps, of both stages; they add up to the whole."""
        name = "steps" if config.steps is not None else "epochs"
        whole = getattr(config, name)
        if not self.retrain:
            return whole, 0
        if whole < 2:
            raise ConfigError(f"two stages need two {name} or more", where=f"train.{name}", found=whole)
        second = min(max(round(whole * self.retrain), 1), whole - 1)
        return whole - second, second


class Excavating(Experts):
    """The first stage; see :class:`SHIKE`."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.unit = KD()  # what experts learn from one another is counted as its divergence is
        self.scheme: SHIKE

    def objectives(self) -> list[Objective]:  # type: ignore[override]
        return [*super().objectives(), self.unit]

    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        prepared = self.prepare(batch)
        student, teacher = self.traces(prepared)
        said = self.said(student)
        losses = self.each(said, student, teacher, prepared, batch)
        stacked, scheme = torch.stack(list(said)), self.scheme
        target, known = class_labels(prepared.labels, stacked.shape[-1], "SHIKE", others=True, soft=True)
        rows = transfer_rows(stacked, target, detach=scheme.detach, masked=scheme.masked)
        share, classes = batch.share(self.unit.contract.normalizer), stacked.shape[-1]
        self.add(losses, "transfer", share * torch.where(known, rows, 0.0).mean(), scheme.transfer / classes)
        rows = mutual_rows(stacked, detach=scheme.detach)
        self.add(losses, "mutual", share * rows.mean(), scheme.mutual / classes)
        return losses

    def settled(self) -> dict[str, Any]:
        return dict(vars(self.scheme))


class Rebalanced(Experts):
    """The second stage: classifiers that are drawn anew learn as if all classes were as frequent."""

    scheme: SHIKE

    def setup(self, batch: Batch, data: DataInfo | None = None) -> Distiller:  # type: ignore[override]
        """Also draw the classifiers anew; a resumed stage loads what they had come to."""
        for module in self._classifiers():
            module.reset_parameters()
        return super().setup(batch, data)

    def _classifiers(self) -> Sequence[Any]:
        """The modules that are trained.

        Raises:
            ConfigError: One of them cannot be drawn anew.
        """
        found = []
        for name, module in self.student.named_modules():
            own = [f"{name}.{n}" for n, _ in module.named_parameters(recurse=False)]
            if any(fnmatch(parameter, pattern) for parameter in own for pattern in self.scheme.classifiers):
                if not hasattr(module, "reset_parameters"):
                    raise ConfigError(
                        "this classifier cannot be drawn anew",
                        where="scheme.classifiers",
                        found=f"{name}, a {type(module).__name__}",
                        remedy="give it reset_parameters(), as torch's layers have, or say scheme.retrain: 0",
                    )
                found.append(module)
        return found

    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        prepared = self.prepare(batch)
        student, teacher = self.traces(prepared)
        return self.each(self.said(student), student, teacher, prepared, batch)

    def settled(self) -> dict[str, Any]:
        return {"classifiers": self.scheme.classifiers}

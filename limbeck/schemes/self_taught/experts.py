"""Experts: a student of several ends, each with logits of its own, trained together on a long tail."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller, Losses
from limbeck.core.errors import ConfigError
from limbeck.core.objective import DataInfo, Objective, Terms
from limbeck.core.survey import dry
from limbeck.core.teacher import Teacher
from limbeck.core.trace import Trace
from limbeck.data.loader import IndexedLoader
from limbeck.data.long_tail import class_counts, long_tailed
from limbeck.schemes.parts.looking import indexed
from limbeck.schemes.scheme import Cast


def expert_names(student: nn.Module, who: str) -> list[str]:
    """The modules of a student whose outputs are its experts' logits.

    Raises:
        ConfigError: It has none, or one.

    >>> from limbeck.models import create
    >>> expert_names(create("resnet8_experts"), "doctest")
    ['experts.0', 'experts.1', 'experts.2']
    """
    experts = getattr(student, "experts", None)
    if not isinstance(experts, (nn.ModuleList, nn.Sequential)) or len(experts) < 2:
        raise ConfigError(
            f"{who} trains a student of several experts",
            where="student",
            found=type(student).__name__,
            wanted="a model whose logits are the mean of what its modules `experts` give",
            remedy="student: {model: resnet32_experts}",
        )
    return [f"experts.{number}" for number in range(len(experts))]


def tail_of(cast: Cast, imbalance: float | None, who: str) -> tuple[IndexedLoader, Tensor]:
    """What is learned from, cut to a long tail where that is wanted, and how often it shows each class."""
    loader = indexed(cast.train, who)
    if imbalance is not None:
        loader = long_tailed(loader, imbalance, who)
    return loader, class_counts(loader, who)


def log_prior(counts: Tensor) -> Tensor:
    r"""Logarithms of how often each class is seen; a class that is never seen counts as seen once.

    >>> log_prior(torch.tensor([0, 1, 100]))
    tensor([0.0000, 0.0000, 4.6052])
    """
    return counts.float().clamp(min=1).log()


class Experts(Distiller):
    """A student of experts, each of which has those terms of the loss that need no more than logits.

    Args:
        student: Who learns.
        loss: Each expert's.
        teacher: Where the loss asks one.
        shifts: What is added to each expert's logits where it learns from the loss, ``[E, C]`` or one row for all.
        who: The scheme, for errors.
        logits: Where the student's logits stand.
    """

    shifts: Tensor

    def __init__(
        self,
        student: nn.Module,
        loss: Objective | Terms,
        teacher: nn.Module | Teacher | None,
        shifts: Tensor,
        who: str,
        logits: str | None = None,
    ) -> None:
        self.names: Sequence[str] = expert_names(student, who)
        super().__init__(student, loss, teacher, logits=logits, also=("logits", *self.names))
        others = [name for name, objective, _ in self.loss.items() if objective.student_taps != ("logits",)]
        if others:
            raise ConfigError(
                "experts learn from logits alone, and this term listens elsewhere",
                where=f"loss.{others[0]}",
                found=", ".join(self.loss.names),
                remedy="leave it out, such as loss: cross_entropy",
            )
        self.further = nn.ModuleList(copy.deepcopy(self.loss) for _ in self.names[1:])
        self.register_buffer("shifts", shifts.expand(len(self.names), -1).clone())

    def objectives(self) -> list[Objective]:  # type: ignore[override]
        return [o for terms in (self.loss, *self.further) for o in terms]

    def setup(self, batch: Batch, data: DataInfo | None = None) -> Experts:
        """Also size the helpers of every expert's loss."""
        super().setup(batch, data)
        prepared = self.prepare(batch)
        with dry(self.student):
            student, teacher = self.traces(prepared)
        classes = student.logits.shape[-1]
        if classes != self.shifts.shape[1]:
            raise ConfigError(
                "the student has another number of classes than the data",
                where="student",
                found=classes,
                wanted=self.shifts.shape[1],
            )
        for terms in self.further:
            for objective in terms:  # type: ignore[attr-defined]
                objective.setup(*self._common(objective, student, teacher), prepared, data or DataInfo())
                objective.to(student.logits.device)
        return self

    def said(self, trace: Trace) -> list[Tensor]:
        """Every expert's logits."""
        return [trace[name] for name in self.names]

    def each(self, said: Sequence[Tensor], mean: Trace, teacher: Trace, prepared: Batch, counted: Batch) -> Losses:
        """The sum of all experts' losses, on logits that are shifted."""
        parts = []
        for logits, shift, terms in zip(said, self.shifts, (self.loss, *self.further), strict=True):
            own = Trace(None, {"logits": logits + shift.to(logits.dtype)})
            parts.append(self.compare(own, teacher, prepared, counted=counted, loss=terms))
        losses = parts[0]
        for number, part in enumerate(parts[1:], 1):
            losses.total = losses.total + part.total
            losses.terms |= {f"expert_{number}/{key}": value for key, value in part.terms.items()}
            losses.weights |= {f"expert_{number}/{key}": value for key, value in part.weights.items()}
        losses.logits = mean.logits.detach()
        return losses

    def add(self, losses: Losses, name: str, value: Tensor, weight: Tensor | float) -> None:
        """Add a further term to what a step came to."""
        losses.total = losses.total + weight * value
        losses.terms[name] = value.detach()
        losses.weights[name] = torch.as_tensor(weight, dtype=torch.float32, device=value.device)

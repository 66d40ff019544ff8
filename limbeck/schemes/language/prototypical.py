"""Trainings that ask where classes lie: a teacher that aligns two languages, and a student that labels its own."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller, Losses
from limbeck.core.errors import ConfigError
from limbeck.core.objective import DataInfo, Objective, Terms
from limbeck.core.ranks import sum_over_ranks
from limbeck.core.reduction import widen
from limbeck.core.survey import dry
from limbeck.core.teacher import Teacher
from limbeck.core.trace import Trace
from limbeck.objectives.parts.class_prototypes import ClassPrototypes, alignment, likely

IGNORED = -100  # of labels: no word begins here, whatever the language


@dataclass(frozen=True)
class Settings:
    """What ``ProKD`` says; see there."""

    tap: str = "penultimate"
    align: float = 1.0
    self_train: float = 1.0
    momentum: float = 0.95
    temperature: float = 0.1
    distance_temperature: float = 0.1
    warmup: float = 0.1
    confidence: bool = False


class Prototypical(Distiller):
    """What both trainings have in common: features beside logits, and batches that are not cut.

    Args:
        student: Who learns here.
        loss: Beside what prototypes tell.
        teacher: From whom.
        settings: See :class:`Settings`.
        logits: Where logits stand in the output of who learns.
    """

    def __init__(
        self,
        student: nn.Module,
        loss: Objective | Terms,
        teacher: Teacher | None,
        settings: Settings,
        *,
        logits: str | None = None,
    ) -> None:
        super().__init__(student, loss, teacher, logits=logits, also=(settings.tap, "logits"))
        self.settings = settings

    def prototypes(self, batch: Batch) -> ClassPrototypes:
        """New ones, sized by what the model says of an example."""
        with dry(self.student):
            said = self.heard(self.prepare(batch))
        feature, logits = said[self.settings.tap], said.logits
        if feature.shape[:-1] != logits.shape[:-1]:
            raise ConfigError(
                "here is no feature for each thing that is classified",
                where="scheme.tap",
                found=f"{list(feature.shape)} beside logits {list(logits.shape)}",
                remedy="name the place before the last layer",
            )
        found = ClassPrototypes(logits.shape[-1], feature.shape[-1], self.settings.momentum)
        return found.to(feature.device, widen(feature).dtype)

    def settled(self) -> dict[str, Any]:
        return asdict(self.settings)

    def add(self, losses: Losses, name: str, value: Tensor, weight: float, batch: Batch) -> Losses:
        """One more term, whose weight is 0 before the warm-up is over."""
        progress = torch.as_tensor(batch.progress, device=value.device)
        scale = torch.where(progress < self.settings.warmup, value.new_zeros(()), value.new_tensor(weight))
        losses.total = losses.total + scale * value
        losses.terms[name], losses.weights[name] = value.detach(), scale
        return losses


class AlignedTeacher(Prototypical):
    """The teacher's training: labels of the source, and prototypes of both languages drawn together."""

    def setup(self, batch: Batch, data: DataInfo | None = None) -> AlignedTeacher:
        super().setup(batch, data)
        if not hasattr(self, "source"):
            self.source, self.target = self.prototypes(batch), self.prototypes(batch)
        return self

    @torch.compiler.disable
    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        prepared = self.prepare(batch)
        said = self.heard(prepared)
        losses = self.compare(said, Trace(None), prepared, counted=batch)
        if not self.training:
            return losses
        feature, labels = said[self.settings.tap], prepared.require("labels")
        guesses = widen(said.logits.detach()).softmax(-1).max(dim=-1)
        known, target = labels >= 0, of_target(prepared)
        weights = guesses.values[target] if self.settings.confidence else None
        source = self.source.folded(feature[known], labels[known])
        other = self.target.folded(feature[target], guesses.indices[target], weights)
        value = alignment(source[0], other[0], source[1] & other[1], temperature=self.settings.temperature)
        self.source.keep(source)
        self.target.keep(other)
        return self.add(losses, "alignment", value, self.settings.align, batch)


class SelfTrainer(Prototypical):
    """The student's training: the teacher's answers, and labels that prototypes have set right."""

    def setup(self, batch: Batch, data: DataInfo | None = None) -> SelfTrainer:
        super().setup(batch, data)
        assert self.teacher is not None
        taps = dict.fromkeys([*self.loss.teacher_taps, "logits"])
        self.teacher.attach(tuple(taps), self.prepare(batch))
        if not hasattr(self, "own"):
            self.own = self.prototypes(batch)
        return self

    @torch.compiler.disable
    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        prepared = self.prepare(batch)
        if prepared.mask is None and prepared.labels is not None:  # what stands for no word counts nowhere
            prepared = prepared.replace(mask=prepared.labels != IGNORED)
        assert self.teacher is not None
        teacher, said = self.teacher(prepared), self.heard(prepared)
        losses = self.compare(said, teacher, prepared, counted=batch)
        if not self.training:
            return losses
        counts = of_target(prepared)
        labels = self.pseudo(said[self.settings.tap].detach()[counts], teacher.logits[counts])
        rows = -widen(said.logits[counts]).log_softmax(-1).gather(1, labels.unsqueeze(1))
        total, count = sum_over_ranks(torch.stack([rows.sum(), rows.new_tensor(len(labels))]))
        return self.add(losses, "self_training", total / count.clamp(min=1), self.settings.self_train, batch)

    @torch.no_grad()
    def pseudo(self, features: Tensor, teacher_logits: Tensor) -> Tensor:
        """Labels ``[N]`` that teacher and distances agree on; prototypes move on by them."""
        said = widen(teacher_logits).softmax(-1)
        first = said.argmax(dim=1)
        # A class that has no prototype yet takes that of the teacher's guesses in this batch.
        fresh, seen = self.own.folded(features, first)
        known = self.own.seen.clone()
        value = torch.where(known.unsqueeze(1), self.own.value, fresh)
        near = likely(features, value, seen, temperature=self.settings.distance_temperature)
        labels = (near.to(said.dtype) * said).argmax(dim=1)
        folded, now = self.own.folded(features, labels)
        self.own.keep((torch.where((seen & ~now).unsqueeze(1), fresh, folded), seen | now))
        return labels


def of_target(batch: Batch) -> Tensor:
    """Words ``[B, *]`` of samples that have no label at all."""
    labels = batch.require("labels")
    counts = labels != IGNORED
    if batch.mask is not None:
        counts = counts & batch.mask.reshape(batch.mask.shape + (1,) * (labels.ndim - batch.mask.ndim))
    there = batch.inputs.get("attention_mask") if isinstance(batch.inputs, dict) else None
    if there is not None and there.shape == labels.shape:
        counts = counts & (there > 0)
    none = (labels < 0).flatten(1).all(dim=1) if labels.ndim > 1 else labels < 0
    return counts & none.reshape(none.shape + (1,) * (labels.ndim - 1))

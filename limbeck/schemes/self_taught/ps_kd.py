"""Progressive self-distillation (PS-KD): what a model said in the last epoch softens its labels, more and more."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller, Losses
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.labels import soft_labels
from limbeck.core.memory import everywhere
from limbeck.core.objective import DataInfo, Terms
from limbeck.core.reduction import check_inside
from limbeck.core.survey import call_model, dry
from limbeck.core.teacher import FrozenTeacher
from limbeck.core.trace import Trace, logits_of
from limbeck.engine.stage import Stage
from limbeck.schemes.parts.sides import TeacherShare, epoch_at, weigh_sides
from limbeck.schemes.scheme import Cast, Scheme, Training, register

NEVER = 1e-13  # probability of other classes where a label stands for a prediction that is not there


@register(
    Card(
        key="ps_kd",
        name="PS-KD",
        title="Self-Knowledge Distillation with Progressive Refinement of Targets",
        year=2021,
        arxiv="2006.12000",
        code="lgcnsai/PS-KD-Pytorch",
        knowledge="scheme",
        equation=r"L_t = H\big((1 - \alpha_t)\, y + \alpha_t\, p_{t-1}(x),\ p_t(x)\big), \qquad "
        r"\alpha_t = \alpha_T\, t / T",
        use="Without a teacher, for next to no cost: better calibrated, and less sure of what is hard. With loss "
        "{cross_entropy: 1, kd: {temperature: 1}} it is the paper's; any response loss may stand for kd.",
        defaults={
            "alpha": "0.8, the paper's",
            "past": "predictions, as in the authors' code; the paper speaks of the model of the last epoch",
        },
        evidence="parity",
        evidence_note="value and gradient of lgcnsai/PS-KD-Pytorch@9aa0828 on its targets over three epochs",
        choices=(
            "kept predictions are those of the training step itself, in its augmentation and mode, as in the code; "
            "past: model asks the last epoch's model anew, at twice the cost",
            "in the first epoch labels stand alone, as in the code, and later on for samples not seen before",
            "divergence where the code has cross-entropy: the same gradient",
        ),
    )
)
class PSKD(Scheme):
    r"""One training; labels and the last epoch's predictions share the target.

    .. math:: L = (1 - \alpha_t)\, L_{\text{labels}} + \alpha_t\, L_{\text{teacher}}, \qquad
        \alpha_t = \alpha_T\, \frac{t}{T} \quad (t > 1), \qquad \alpha_1 = 0

    Args:
        alpha: :math:`\alpha_T`, the share of predictions in the last epoch.
        past: ``"predictions"``: kept of every sample, ``[N, C]`` numbers; ``"model"``: a copy of the model.

    Source: Self-Knowledge Distillation with Progressive Refinement of Targets, arXiv 2006.12000.

    >>> PSKD().alpha
    0.8
    """

    own_teacher = "only"

    def __init__(self, alpha: float = 0.8, past: Literal["predictions", "model"] = "predictions") -> None:
        check_inside(alpha, "scheme.alpha", closed=True)
        if past not in ("predictions", "model"):
            raise ConfigError("no such past", where="scheme.past", found=past, wanted="'predictions' or 'model'")
        self.alpha, self.past = alpha, past

    def trainings(self, cast: Cast) -> Iterator[Training]:
        if cast.teacher is not None:
            raise ConfigError(
                "what the student said before is the teacher",
                where="teacher",
                remedy="write teacher: null in the recipe",
            )
        steps = None if cast.train is None else cast.train.steps_per_epoch
        if steps is None:
            raise DataError("the length of an epoch is not known", where="scheme ps_kd", remedy="use a map-style set")
        epochs = cast.config.total_steps(steps) / steps
        labels, teacher = (TeacherShare(self.alpha, epochs=epochs, left=left) for left in (True, False))
        loss = weigh_sides(cast.loss, labels, teacher, "progressive self-distillation")
        kind = Remembering if self.past == "predictions" else LastEpoch
        yield Training([Stage("ps_kd", kind(cast.student, loss, epochs, cast.logits), cast.config)])


class LastEpoch(Distiller):
    """A student and its copy from the end of the last epoch; see :class:`PSKD`.

    Args:
        student: Who learns.
        loss: Of labels and of the copy.
        epochs: Of the training.
        logits: Where logits stand in the output.
    """

    epoch: Tensor

    def __init__(self, student: nn.Module, loss: Terms, epochs: float, logits: str | None = None) -> None:
        before = copy.deepcopy(student)
        super().__init__(student, loss, FrozenTeacher(before, logits=logits), logits=logits)
        self.before, self.epochs = before.requires_grad_(False), epochs
        self.register_buffer("epoch", torch.zeros(()))

    @torch.no_grad()
    def made(self, batch: Batch) -> Batch:
        epoch = epoch_at(torch.as_tensor(batch.progress, dtype=torch.float32), self.epochs).to(self.epoch.device)
        if bool(epoch > self.epoch):
            self.before.load_state_dict(self.student.state_dict())
            self.epoch.copy_(epoch)
        return batch

    def settled(self) -> dict[str, Any]:
        return {"epochs": self.epochs}


class Remembering(Distiller):
    """A student and what it said of every sample when it saw that last; see :class:`PSKD`.

    Args:
        student: Who learns.
        loss: Of labels and of what was said.
        epochs: Of the training.
        logits: Where logits stand in the output.
    """

    bank: Tensor
    known: Tensor

    def __init__(self, student: nn.Module, loss: Terms, epochs: float, logits: str | None = None) -> None:
        super().__init__(student, loss, Past(self), logits=logits, also=("logits",))
        self.epochs = epochs

    def setup(self, batch: Batch, data: DataInfo | None = None) -> Remembering:
        """Also make room for what will be said."""
        if data is None or data.samples is None:
            raise DataError(
                "what was said is kept by sample, and their number is not known",
                where="scheme ps_kd",
                remedy="use a map-style set, or scheme.past: model",
            )
        self.close()
        with dry(self.student):
            logits = logits_of(call_model(self.student, batch.inputs), self._logits)
        if logits.ndim != 2 or len(logits) != batch.size:
            found = f"logits {list(logits.shape)} of {batch.size} samples"
            raise DataError("one prediction a sample is kept", where="scheme ps_kd", found=found)
        self.register_buffer("bank", torch.zeros(data.samples, logits.shape[1], device=logits.device))
        self.register_buffer("known", torch.zeros(data.samples, dtype=torch.bool, device=logits.device))
        super().setup(batch, data)
        return self

    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        prepared = self.prepare(batch)
        student, teacher = self.traces(prepared)
        losses = self.compare(student, teacher, prepared, counted=batch)
        if self.training:
            self.remember(batch.require("index"), student.logits[: batch.size])  # of several views the first
        return losses

    @torch.no_grad()
    def remember(self, index: Tensor, logits: Tensor) -> None:
        """Keep what was said of these samples, on all ranks alike."""
        index, logits = everywhere(index, logits.to(self.bank.dtype))
        self.bank[index] = logits
        self.known[index] = True

    def settled(self) -> dict[str, Any]:
        return {"epochs": self.epochs}


class Past:
    """The teacher that says what was kept of each sample, and its label where nothing was.

    Args:
        owner: Who keeps it; held-out samples have no place there.
    """

    def __init__(self, owner: Remembering) -> None:
        self.owner = owner

    def attach(self, taps: tuple[str, ...], batch: Batch) -> None:
        others = [tap for tap in taps if tap != "logits"]
        if others:
            remedy = "say scheme.past: model, or leave out the terms that compare features"
            raise ConfigError("past predictions alone are kept", where="scheme ps_kd", found=others, remedy=remedy)

    def __call__(self, batch: Batch) -> Trace:
        owner, index = self.owner, batch.require("index")
        bank = owner.bank
        label = soft_labels(batch.require("labels"), bank.shape[1]).to(bank.dtype).clamp(min=NEVER).log()
        if not owner.training:
            return Trace(None, {"logits": label})
        return Trace(None, {"logits": torch.where(owner.known[index].unsqueeze(1), bank[index], label)})

    def to(self, device: torch.device | str) -> Past:
        return self

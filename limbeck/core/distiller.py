"""The student and its losses as one module: one graph to compile, wrap in DDP or FSDP, and step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, ModelError
from limbeck.core.objective import DataInfo, Objective, Terms
from limbeck.core.survey import dry
from limbeck.core.taps import Listener
from limbeck.core.teacher import Teacher, as_teacher
from limbeck.core.trace import Trace


@dataclass
class Losses:
    """What one step came to.

    Args:
        total: The weighted sum, with gradient.
        terms: Each term before its weight, detached; a term of several parts stands as ``name/part``.
        weights: Each term's weight now.
        logits: The student's logits, detached, where some term asked for them.
        apart: The two parts of ``total``, with gradient, where ``Distiller.keeps_apart`` asks for them: ``"task"``, the
            weighted sum of terms that are controls, and ``"distill"``, that of all others.
    """

    total: Tensor
    terms: dict[str, Tensor]
    weights: dict[str, Tensor]
    logits: Tensor | None = None
    apart: dict[str, Tensor] = field(default_factory=dict)


class Distiller(nn.Module):
    """Student and objectives are its children; the teacher stands outside the module tree.

    ``Distiller(student, loss, teacher).setup(batch)`` makes it ready: one dry run of both models resolves taps and
    sizes projectors. Make the optimizer after that. Calling it with a batch gives ``Losses``; any training loop can
    do the rest.

    A scheme with several players (a generator and a student, say) subclasses it: ``turns`` names who learns in which
    order within one step, ``parameters_of`` gives each player's parameters, ``settings_of`` what is its own in how it
    trains, and ``forward`` is told whose turn it is. One whose batches are made, not read (texts the student writes,
    images of a generator), gives ``made``.

    Args:
        student: Any module that is called with ``batch.inputs``.
        loss: An objective or a weighted sum of objectives.
        teacher: A module (it is frozen), or anything that answers like a ``Teacher``; ``None`` where no term needs one.
        logits: Where logits stand in the student's output (see ``logits_of``).
        teacher_logits: The same for a teacher given as a module.
        also: Taps of the student that are wanted beside those of the loss, by who builds on its traces.

    Raises:
        ConfigError: A term needs a teacher and none is given.
        ModelError: Teacher and student share modules.

    >>> from torch import nn
    >>> from limbeck.objectives import KD, CrossEntropy
    >>> batch = Batch(torch.randn(8, 4), labels=torch.arange(8) % 3)
    >>> distiller = Distiller(nn.Linear(4, 3), CrossEntropy() + 0.9 * KD(temperature=4.0), nn.Linear(4, 3)).setup(batch)
    >>> losses = distiller(batch)
    >>> losses.total.backward(); sorted(losses.terms)
    ['cross_entropy', 'kd']
    """

    turns: tuple[str, ...] = ("student",)
    keeps_apart: bool = False  # set by who steps with the gradients of task and teacher apart

    def __init__(
        self,
        student: nn.Module,
        loss: Objective | Terms,
        teacher: nn.Module | Teacher | None = None,
        *,
        logits: str | None = None,
        teacher_logits: str | None = None,
        also: Iterable[str] = (),
    ) -> None:
        super().__init__()
        self.student = student
        self.loss = Terms.of(loss)
        self._logits = logits
        self._taps = tuple(dict.fromkeys([*self.loss.student_taps, *also]))
        # In a tuple, not as an attribute: a module among attributes would become a child.
        self._teacher = (as_teacher(teacher, teacher_logits) if teacher is not None else None,)
        self._listener: Listener | None = None
        self._vocabulary: int | None = None
        if self.loss.teacher_taps and teacher is None:
            needy = [name for name, o, _ in self.loss.items() if o.teacher_taps]
            raise ConfigError(f"{', '.join(needy)} cannot work without a teacher", where="teacher", found="none")
        shares_with = getattr(self.teacher, "shares_with", None)
        if shares_with is not None and shares_with(student.modules()):
            raise ModelError(
                "teacher and student share modules, so freezing the one would freeze the other",
                where="teacher",
                remedy="teach from copy.deepcopy(student)",
            )

    @property
    def teacher(self) -> Teacher | None:
        """The teacher, outside of ``parameters()``, ``state_dict()`` and ``train()``."""
        return self._teacher[0]

    def setup(self, batch: Batch, data: DataInfo | None = None) -> Distiller:
        """Resolve taps and size every objective's helpers by one dry run that leaves both models as they were.

        Args:
            batch: An example; a few samples are enough.
            data: What is known about the training set, for objectives that need it.
        """
        self.close()
        batch = self.prepare(batch)
        device = next((p.device for p in self.student.parameters()), torch.device("cpu"))
        if self.teacher is not None:
            self.teacher.to(device)
            if self.loss.teacher_taps:
                self.teacher.attach(self.loss.teacher_taps, batch)
        self._listener = Listener(self.student, self._taps, batch.inputs, logits=self._logits)
        data = data or DataInfo()
        self._vocabulary = data.vocabulary
        if data.batches is not None and data.answers is None and self.teacher is not None:
            data = replace(data, answers=partial(self._answers, data.batches, device))
        with dry(self.student):
            student, teacher = self.traces(batch)
        for objective in self.loss:
            objective.setup(*self._common(objective, student, teacher), batch, data)
            objective.to(device)
        return self

    def objectives(self) -> Iterator[Objective]:
        """Every objective of every player; what they count is counted over a step."""
        return iter(self.loss)

    def made(self, batch: Batch) -> Batch:
        """What a step learns from, made of what was read: here, the same. It runs before units are counted.

        What it draws comes from torch's global random state, which checkpoints keep and each rank has for itself, or
        follows from seed, progress and sample, where ranks have to agree.
        """
        return batch

    def prepare(self, batch: Batch) -> Batch:
        """The batch as every objective wants it."""
        for objective in self.loss:
            batch = objective.prepare(batch)
        return batch

    def _answers(self, batches: Callable[[], Iterable[Batch]], device: torch.device) -> Iterator[tuple[Trace, Batch]]:
        for batch in batches():
            batch = batch.to(device)
            yield self._teach(batch), batch

    def _teach(self, batch: Batch) -> Trace:
        if self.teacher is None or not self.loss.teacher_taps:
            return Trace(None)
        return self.teacher(batch)

    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        """The losses of one batch, weighted by progress and by the batch's share of its step."""
        prepared = self.prepare(batch)
        return self.compare(*self.traces(prepared), prepared, counted=batch)

    def traces(self, batch: Batch) -> tuple[Trace, Trace]:
        """What student and teacher say about a prepared batch; a model that no term taps is not run."""
        self._ready()
        teacher = self._teach(batch)  # first, so that its working memory is free again when the student runs
        return self.heard(batch), teacher

    def heard(self, batch: Batch) -> Trace:
        """What the student says about a prepared batch."""
        listener = self._ready()
        return listener(batch.inputs) if self._taps else Trace(None)

    def _ready(self) -> Listener:
        if self._listener is None:
            raise ConfigError(
                "not set up yet", where="distiller", remedy="call distiller.setup(batch) before making the optimizer"
            )
        return self._listener

    def compare(
        self, student: Trace, teacher: Trace, batch: Batch, counted: Batch | None = None, loss: Terms | None = None
    ) -> Losses:
        """The weighted sum of all terms over two traces.

        Args:
            student, teacher: What both said.
            batch: The prepared batch.
            counted: The batch as it was counted into ``totals``: before ``prepare``, which may multiply samples.
            loss: The terms, where they are another player's.
        """
        loss = self.loss if loss is None else loss
        counted = batch if counted is None else counted
        total: Tensor | float = 0.0
        terms: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}
        apart: dict[str, Tensor] = {}
        for name, objective, schedule in loss.items():
            if batch.mask is not None and not objective.contract.mask:
                raise ConfigError(
                    "this objective knows no mask, and would count what the batch hides",
                    where=name,
                    remedy="leave it out, or give a batch without a mask",
                )
            value = objective(*self._common(objective, student, teacher), batch)
            share = counted.share(objective.contract.normalizer)
            parts = (
                {f"{name}/{k}": v * share for k, v in value.items()}
                if isinstance(value, dict)
                else {name: value * share}
            )
            # The weight takes the loss's device; a 0-d CPU tensor would do in eager mode, but not in CUDA graphs.
            first = next(iter(parts.values()))
            weights[name] = schedule(batch.progress).to(first.device)
            side = "task" if _is_task(objective) else "distill"
            for key, part in parts.items():
                weighted = weights[name] * part
                total = total + weighted
                terms[key] = part.detach()
                if self.keeps_apart:
                    apart[side] = apart[side] + weighted if side in apart else weighted
        assert isinstance(total, Tensor)
        logits = student.logits.detach() if "logits" in loss.student_taps else None
        return Losses(total, terms, weights, logits, apart)

    def _common(self, objective: Objective, student: Trace, teacher: Trace) -> tuple[Trace, Trace]:
        """What an objective that compares both models sees of them: of logits those that both have."""
        if self._vocabulary is None or not objective.teacher_taps:
            return student, teacher
        return student.narrowed(self._vocabulary), teacher.narrowed(self._vocabulary)

    def close(self) -> None:
        """Take every hook off the student, so that it can be pickled, exported or distilled again."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def parameters_of(self, turn: str) -> Iterator[nn.Parameter]:
        """What one player trains. Here: all there is."""
        return self.parameters()

    def settings_of(self, turn: str) -> dict[str, Any]:
        """Settings of training (optimizer, lr ...) that are this player's own. Here: none, all are the stage's."""
        return {}

    def settled(self) -> dict[str, Any]:
        """What weights depend on beside losses and settings, as plain values; a resumed run must find the same."""
        return {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves take the teacher along; casts do not reach it (its precision is its own)."""
        super()._apply(fn, recurse)
        device = next((p.device for p in self.student.parameters()), None)
        if self.teacher is not None and device is not None:
            self.teacher.to(device)
        return self


def _is_task(objective: Objective) -> bool:
    """Whether a term is the task itself: a control, or, without a card, what asks no teacher."""
    card = getattr(objective, "card", None)
    return not objective.teacher_taps if card is None else card.knowledge == "control"

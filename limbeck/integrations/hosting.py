"""A distiller in somebody else's loop: what a step counts, what an evaluation says, and hooks that come off."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch, Unit
from limbeck.core.distiller import Distiller, Losses
from limbeck.core.errors import ConfigError
from limbeck.core.objective import DataInfo, Objective, Terms
from limbeck.core.taps import Listener
from limbeck.core.trace import Trace
from limbeck.data.randomness import OwnRandomness

NEEDS_IDS = frozenset(("index", "samples"))  # of the training set: those of held-out data would be taken for them


def needs_of(objective: Objective) -> frozenset[str]:
    """What an objective wants of its batches, by its card."""
    return frozenset(getattr(getattr(objective, "card", None), "needs", ()))


class Hosted(Distiller):
    """A distiller that a trainer of another library steps.

    It listens only within ``listening``, so that before and afterwards the student is plain. What a trainer wrapped
    around the student alone (where it shards weights) is called in the student's place: ``calls``.
    """

    through: bool = False  # a model that keeps weights in parts is called

    @property
    def listens(self) -> bool:
        """Whether hooks are on the student."""
        return self._listener is not None

    def ready(self, example: Batch, data: DataInfo, seed: int, *, sharded: bool = False) -> None:
        """Size helpers, drawn from a seed that disturbs nobody; the student is plain afterwards.

        Args:
            example, data: See ``setup``.
            seed: Of helpers.
            sharded: The student's weights will be cut into parts, which are whole only while a module runs.

        Raises:
            ConfigError: An objective needs more of a sharded student than what its modules say.
        """
        with OwnRandomness.kept():
            OwnRandomness.seed(seed)
            self.setup(example, data)
        spots = self._ready().spots
        self.close()
        for name, objective, _ in self.loss.items() if sharded else ():
            found = [spots[tap] for tap in objective.student_taps if tap in spots]
            weights = any(spot.held for each in found for spot in (each if isinstance(each, list) else [each]))
            if weights or any(p.requires_grad for p in objective.parameters()):
                raise ConfigError(
                    "this objective reads the student's weights"
                    if weights
                    else "this objective has weights of its own",
                    where=f"loss.{name}",
                    found="FSDP or DeepSpeed, which keep each process a part of the student's",
                    remedy="use an objective on what the student says, or DDP",
                )

    def ready_sharded(self, example: Batch, vocabulary: int | None) -> None:
        """The same where the student's weights are in parts already, and it cannot run yet.

        Raises:
            ConfigError: An objective listens to more than logits, or has to be sized.
        """
        for name, objective, _ in self.loss.items():
            if set(objective.student_taps) - {"logits"} or type(objective).setup is not Objective.setup:
                raise ConfigError(
                    "this objective looks into the student, whose weights are in parts before training begins",
                    where=f"loss.{name}",
                    found="FSDP's first version, or a student that was made in parts",
                    remedy="use an objective on logits, FSDP's second version and a student that is made whole, or DDP",
                )
        self._vocabulary = vocabulary
        if self.teacher is not None and self.loss.teacher_taps:
            self.teacher.attach(self.loss.teacher_taps, self.prepare(example))

    @contextlib.contextmanager
    def listening(self, example: Batch) -> Iterator[None]:
        """Listen to the student for as long as this lasts; within another ``listening`` it is that one's."""
        if self._listener is not None:
            yield
            return
        with OwnRandomness.kept():
            prepared = self.prepare(example)
        self._listener = Listener(self.student, self._taps, prepared.inputs, logits=self._logits)
        try:
            yield
        finally:
            self.close()

    def calls(self, model: nn.Module) -> None:
        """Call this, which holds the student, in its place, and to the end: it gathers weights and lets go of them."""
        listener = self._ready()
        listener.model, listener.to_end, self.through = model, True, True

    def compare(
        self, student: Trace, teacher: Trace, batch: Batch, counted: Batch | None = None, loss: Terms | None = None
    ) -> Losses:
        losses = super().compare(student, teacher, batch, counted, loss)
        if self.through and "logits" not in self.loss.student_taps:  # weights are gathered on a gradient's way back
            return replace(losses, total=losses.total + 0 * student.logits.sum())
        return losses

    def judge(self, batch: Batch, terms: Terms | None) -> tuple[dict[str, Tensor], Any]:
        """Terms of a batch that nobody learns from, and the student's output where it said all.

        Args:
            batch: Of held-out data.
            terms: Those that can be told of it; ``None``: none can.
        """
        if terms is None:
            return {}, self.heard(batch).output
        prepared = self.prepare(batch)
        teacher = self._teach(prepared) if terms.teacher_taps else Trace(None)
        student = self.heard(prepared)
        values = self.compare(student, teacher, prepared, counted=batch, loss=terms).terms
        return values, student.output if prepared is batch else None

    def judged(self, labelled: bool = True) -> Terms | None:
        """The terms that can be told of held-out data: no cache knows them, no bank of samples does.

        Args:
            labelled: They have labels.
        """
        absent = getattr(self.teacher, "looks_up", False)
        missing = NEEDS_IDS if labelled else NEEDS_IDS | {"labels"}
        kept = [
            (name, objective, weight)
            for name, objective, weight in self.loss.items()
            if not (absent and objective.teacher_taps) and not needs_of(objective) & missing
        ]
        if not kept:
            return None
        names, objectives, weights = zip(*kept, strict=True)
        return Terms(list(objectives), list(weights), list(names))

    @contextlib.contextmanager
    def unmoved(self) -> Iterator[None]:
        """Objectives in evaluation mode; their buffers and the random state are put back afterwards."""
        kept = {name: buffer.clone() for name, buffer in self.loss.named_buffers()}
        modes = {module: module.training for module in self.loss.modules()}
        device = next((p.device for p in self.student.parameters()), torch.device("cpu"))
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                self.loss.eval()
                yield
        finally:
            for module, training in modes.items():
                module.training = training
            with torch.no_grad():
                for name, buffer in self.loss.named_buffers():
                    buffer.copy_(kept[name])


def totals_of(
    batches: Sequence[Batch],
    distiller: Distiller,
    device: torch.device | str,
    world: int = 1,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor | float]:
    """What a whole optimizer step holds of every unit that the objectives count.

    A rank's part of it, since DDP averages gradients over ranks. Empty where this batch is the whole step.

    Args:
        batches: This rank's micro-batches.
        distiller: Whose objectives count.
        device: Where it is counted.
        world: How many ranks.
        reduce: Adds a tensor up over ranks.
    """
    if len(batches) == 1 and world == 1:
        return {}
    units: list[Unit] = sorted({o.contract.normalizer for o in distiller.objectives()})
    counts = torch.zeros(len(units), dtype=torch.float32, device=device)
    for batch in batches:
        counts += torch.stack([torch.as_tensor(batch.count(u), dtype=torch.float32, device=device) for u in units])
    if world > 1 and reduce is not None:
        counts = reduce(counts) / world
    return dict(zip(units, counts.clamp(min=1e-12).unbind(), strict=True))


@dataclass
class Sums:
    """Means of terms over many batches, each weighed by what it counts: the same however the data are cut.

    >>> sums = Sums()
    >>> for value, size in ((1.0, 3), (5.0, 1)):
    ...     sums.add({"kd": torch.tensor(value)}, Batch(torch.zeros(size, 2)), {"kd": "samples"})
    >>> sums.means()
    {'kd': 2.0}
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, terms: Mapping[str, Tensor], batch: Batch, units: Mapping[str, Unit], *, counts: bool = True) -> None:
        """Add a batch's means; where it does not count it says only which terms there are."""
        for name, value in terms.items():
            wide = torch.float32 if value.device.type == "mps" else torch.float64
            count = torch.as_tensor(batch.count(units[name.partition("/")[0]]), dtype=wide, device=value.device)
            count = count * counts
            # A batch that holds none of its unit says nothing, whatever the value is.
            part = torch.where(count > 0, value.to(wide) * count, 0.0)
            self.values[name] = self.values.get(name, 0) + part
            self.counts[name] = self.counts.get(name, 0) + count

    def means(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """The means; ``reduce`` adds up over ranks."""
        if not self.values:
            return {}
        rows = torch.stack([torch.stack(list(side.values())) for side in (self.values, self.counts)])
        rows = rows if reduce is None else reduce(rows)
        found = (rows[0] / rows[1].clamp(min=1e-12)).tolist()
        return dict(zip(self.values, found, strict=True))


def units_of(terms: Terms) -> dict[str, Unit]:
    """The unit that each term's mean runs over."""
    return {name: objective.contract.normalizer for name, objective, _ in terms.items()}

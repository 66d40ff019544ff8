"""Objectives: losses that compare a student with its teacher, and sums of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from limbeck.core.batch import Batch, Unit
from limbeck.core.errors import ConfigError
from limbeck.core.schedules import Constant, Schedule
from limbeck.core.trace import Trace

if TYPE_CHECKING:
    from limbeck.core.catalogue import Card


@dataclass(frozen=True)
class Contract:
    """What an objective promises. The conformance suite checks every line of it.

    Args:
        normalizer: The unit its mean runs over: ``samples``, ``positions``, ``labels``, or a mask in ``batch.extras``.
        at_equal: Its value where student and teacher agree; ``None`` where that is no fixed number.
        mask: It honours ``batch.mask``: a position that does not count changes nothing.
        decomposes: The mean over a batch is the weighted mean over its parts.
        temperature: How its gradient scales with ``temperature``: ``"squared"`` (multiplied by T^2, so that it keeps
            its size), ``"none"`` (falls as 1/T^2), or ``None`` (it has none).
        least_samples: The smallest batch it is defined on.
        permutation: Reordering the batch leaves the value alone.
        spare_class: A class in which neither believes (a padded vocabulary) changes nothing.
        stop_gradient: Some of the student's own values are taken as constants (detached weights, straight-through
            estimates), so its gradient is not the derivative of its value.
    """

    normalizer: Unit = "samples"
    at_equal: float | None = 0.0
    mask: bool = False
    decomposes: bool = True
    temperature: Literal["squared", "none"] | None = None
    least_samples: int = 1
    permutation: bool = True
    spare_class: bool = False
    stop_gradient: bool = False


@dataclass
class DataInfo:
    """What is known about the training set as a whole, for objectives that keep something for each sample.

    Args:
        samples: How many there are; ids run from 0 to ``samples - 1``.
        labels: ``[samples]`` integer labels by id.
        classes: How many classes.
        batches: Gives the training set once, in order and without augmentation.
        answers: Gives it with what the teacher says of each batch; made by ``Distiller.setup`` from ``batches``.
        task: What the labels mean: ``"classification"``, ``"multilabel"`` (one yes or no a class) or ``"regression"``.
        vocabulary: How many logits two models have in common, where one has rows for tokens that are none.
        tokenizers: Of texts, the student's and the teacher's (``limbeck.data.language.Tokens``).
    """

    samples: int | None = None
    labels: Tensor | None = None
    classes: int | None = None
    batches: Callable[[], Iterable[Batch]] | None = None
    answers: Callable[[], Iterable[tuple[Trace, Batch]]] | None = None
    task: str = "classification"
    vocabulary: int | None = None
    tokenizers: tuple[Any, Any] | None = None

    def all_answers(self, where: str) -> Iterable[tuple[Trace, Batch]]:
        """The teacher's trace of every training batch, for class means and the like.

        Args:
            where: Who asks, for the error.

        Raises:
            ConfigError: The training set is not at hand.
        """
        if self.answers is None:
            raise ConfigError(
                "this needs the teacher's answers over the whole training set",
                where=where,
                remedy="train with limbeck's engine, or call Distiller.setup(batch, DataInfo(batches=...))",
            )
        return self.answers()


class Objective(nn.Module):
    """A loss that compares what the student said with what the teacher said.

    A subclass says which taps it needs before any forward, and returns a mean over ``contract.normalizer``. Learned
    helpers (projectors, banks) are its own submodules and buffers: they train and are saved with it, and are dropped
    when the student ships.

    ``objective * weight``, ``schedule * objective`` and ``objective + objective`` make a weighted sum (``Terms``).
    """

    contract: ClassVar[Contract] = Contract()
    card: ClassVar[Card]
    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()
    trains_student: ClassVar[bool] = True  # where False, a stage of it alone leaves the student as it is

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        """Called once, before training, with the traces of a dry run: size projectors, banks and heads here."""

    def ready(self, helper: str) -> Any:
        """A helper made by ``setup``, or an error that says how it comes about."""
        value = getattr(self, helper, None)
        if value is None:
            raise ConfigError(
                "not set up yet",
                where=f"{_name(self)}.{helper}",
                remedy="let Distiller.setup(batch) size it, or call setup(student, teacher, batch, DataInfo())",
            )
        return value

    def opening(self) -> Objective | None:
        """The loss of a first stage before the main one, for schemes with two; ``None``: it has none.

        Itself: all of it belongs into the first stage, and the second goes on without it (hints). Another objective:
        that is trained first, on helpers that the two share from their making on, and this one goes on with them
        (factor transfer). A scheme asks once; who is not asked does everything in one stage.
        """
        return None

    def prepare(self, batch: Batch) -> Batch:
        """Change the batch before any model sees it (mixing, masking, rotating). Default: as it is."""
        return batch

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor | dict[str, Tensor]:
        """The loss, or several named parts whose sum is the loss."""
        raise TypeError(f"{type(self).__name__} defines no forward(student, teacher, batch)")

    def __add__(self, other: Objective | Terms) -> Terms:
        return Terms.of(self) + other

    def __mul__(self, weight: float | Schedule) -> Terms:
        return Terms.of(self) * weight

    __rmul__ = __mul__


class Terms(nn.Module):
    """A weighted sum of objectives. ``CrossEntropy() + 0.9 * KD(temperature=4)`` makes one.

    Args:
        objectives: The objectives, in order.
        weights: One schedule for each.
        names: What each is called in logs; by default its card's key, numbered where it comes twice.
    """

    def __init__(self, objectives: list[Objective], weights: list[Schedule], names: list[str] | None = None) -> None:
        super().__init__()
        self.names: list[str] = []
        for name in names or [_name(o) for o in objectives]:
            others = (f"{name}_{i}" for i in itertools.count(2))
            self.names.append(name if name not in self.names else next(n for n in others if n not in self.names))
        self.objectives = nn.ModuleDict(dict(zip(self.names, objectives, strict=True)))
        self.weights = list(weights)

    @classmethod
    def of(cls, loss: Objective | Terms) -> Terms:
        """A loss as a sum of terms."""
        if isinstance(loss, Terms):
            return loss
        if not isinstance(loss, Objective):
            raise ConfigError(
                "not a loss limbeck can train with",
                where="loss",
                found=type(loss).__name__,
                wanted="an Objective or a weighted sum of them",
            )
        return cls([loss], [Constant(1.0)])

    def __add__(self, other: Objective | Terms) -> Terms:
        other = Terms.of(other)
        return Terms([*self, *other], self.weights + other.weights, self.names + other.names)

    def __mul__(self, weight: float | Schedule) -> Terms:
        schedule = weight if isinstance(weight, Schedule) else Constant(float(weight))
        return Terms(list(self), [_times(schedule, w) for w in self.weights], self.names)

    __rmul__ = __mul__

    def __iter__(self) -> Iterator[Objective]:
        return iter(self.objectives.values())  # type: ignore[arg-type]

    def items(self) -> Iterator[tuple[str, Objective, Schedule]]:
        """Name, objective and weight of each term."""
        return zip(self.names, self, self.weights, strict=True)

    @property
    def student_taps(self) -> tuple[str, ...]:
        """Every tap some term needs from the student."""
        return tuple(dict.fromkeys(t for o in self for t in o.student_taps))

    @property
    def teacher_taps(self) -> tuple[str, ...]:
        """Every tap some term needs from the teacher; empty where no term needs a teacher at all."""
        return tuple(dict.fromkeys(t for o in self for t in o.teacher_taps))

    def forward(self, *_: Any) -> None:
        raise TypeError("a weighted sum of objectives is run by a Distiller")


def _times(first: Schedule, second: Schedule) -> Schedule:
    if isinstance(first, Constant) and isinstance(second, Constant):
        return Constant(first.value * second.value)
    return second if first == Constant(1.0) else first if second == Constant(1.0) else first * second


def _name(objective: Objective) -> str:
    card = getattr(objective, "card", None)
    return card.key if card is not None else type(objective).__name__.lower()

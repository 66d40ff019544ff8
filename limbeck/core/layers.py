"""Objectives that compare layers: which layers, and which of the student's answers to which of the teacher's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.layout import aligned
from limbeck.core.objective import DataInfo, Objective
from limbeck.core.pairing import Mapping, pair_features, pair_layers
from limbeck.core.projectors import projector
from limbeck.core.relations import channel_dim, project
from limbeck.core.trace import Trace

Tap = str | list[str]


class LayerObjective(Objective):
    """An objective that listens at one or more layers of both models.

    Args:
        tap: A place, a role (``stages``: its layers are paired by resolution or depth), or a list, paired in order.
        teacher_tap: The teacher's, where they are called otherwise.
    """

    def __init__(self, tap: Tap, teacher_tap: Tap | None = None) -> None:
        super().__init__()
        self.student_taps = (tap,) if isinstance(tap, str) else tuple(tap)
        teacher_tap = tap if teacher_tap is None else teacher_tap
        self.teacher_taps = (teacher_tap,) if isinstance(teacher_tap, str) else tuple(teacher_tap)
        self._own = self.student_taps, self.teacher_taps  # a subclass may list further taps

    def layers(self, student: Trace, teacher: Trace) -> tuple[list[Tensor], list[Tensor]]:
        """All layers of the student and all of the teacher, not paired yet; the teacher's carry no gradient."""
        own, other = (tap_values(trace, taps) for trace, taps in zip((student, teacher), self._own, strict=True))
        return own, [feature.detach() for feature in other]

    def pairs(self, student: Trace, teacher: Trace) -> list[tuple[Tensor, Tensor]]:
        """Student and teacher features, pair by pair; the teacher's carry no gradient.

        Raises:
            ConfigError: Two lists of different lengths.
        """
        own, other = self.layers(student, teacher)
        if len(self._own[0]) == len(self._own[1]) == 1:
            pairs = pair_features(own, other)
        elif len(own) == len(other):
            pairs = list(zip(own, other, strict=True))
        else:
            raise ConfigError(
                "layers are paired in order",
                where="teacher_tap",
                found=f"{len(other)} layers",
                wanted=f"{len(own)} as in tap",
            )
        return pairs

    def mapped(self, student: Trace, teacher: Trace, mapping: Mapping) -> list[tuple[Tensor, Tensor]]:
        """Layers paired by their number alone: those of the same relative depth, or the teacher's last."""
        own, other = self.layers(student, teacher)
        return [(own[i], other[j]) for i, j in pair_layers(len(own), len(other), mapping)]

    def pair(self, student: Trace, teacher: Trace) -> tuple[Tensor, Tensor]:
        """The one pair, for objectives that compare a single layer; of a plural role the last pair."""
        return self.pairs(student, teacher)[-1]

    def each(self, helpers: str, student: Trace, teacher: Trace) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
        """The pairs, each with its own of the modules that ``setup`` made: helper, student feature, teacher feature.

        Raises:
            ConfigError: Not set up yet.
            TensorError: Other pairs than in the dry run.
        """
        modules, pairs = self.ready(helpers), self.pairs(student, teacher)
        if len(modules) != len(pairs):
            raise TensorError(
                "the layers no longer pair as in the dry run",
                where="student_feature",
                found=f"{len(pairs)} pairs",
                wanted=f"{len(modules)}",
                remedy="name the layers in tap and teacher_tap, or set up again with inputs of this size",
            )
        return ((m, s, t) for m, (s, t) in zip(modules, pairs, strict=True))


class SameWidth(LayerObjective):
    """Layers of one width, for methods that know no other.

    Where the student's layer differs from the teacher's in width, a linear map (on maps a 1x1 convolution) is learned
    beside the student; where it does not, nothing is. Args: as ``LayerObjective``.
    """

    projectors: nn.ModuleList | None

    def __init__(self, tap: Tap, teacher_tap: Tap | None = None) -> None:
        super().__init__(tap, teacher_tap)
        self.projectors = None

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        self.projectors = nn.ModuleList(
            nn.Identity() if s.shape[channel_dim(s)] == t.shape[channel_dim(t)] else projector(s, t, bias=False)
            for s, t in (aligned(s, t) for s, t in self.pairs(student, teacher))
        )

    def features(self, student: Trace, teacher: Trace) -> list[tuple[Tensor, Tensor]]:
        """Student and teacher features of equal places and width, pair by pair."""
        found = []
        for layer, s, t in self.each("projectors", student, teacher):
            s, t = aligned(s, t)
            found.append((project(layer, s, "student_feature"), t))
        return found


def tap_values(trace: Trace, taps: Sequence[str]) -> list[Tensor]:
    """What stands at some taps, in order; a plural role gives all its layers."""
    values = [trace[tap] for tap in taps]
    return [f for value in values for f in (value if isinstance(value, list) else [value])]


def check_flow(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> None:
    """Refuse what is no flow from layer to layer: fewer than two, or not as many of both models."""
    numbers = len(student_features), len(teacher_features)
    if numbers[0] != numbers[1] or numbers[0] < 2:
        raise TensorError(
            "flow is between layers",
            where="student_features",
            found=f"{numbers[0]} and {numbers[1]} layers",
            wanted="two or more of each",
            remedy="name the layers, or take tap='blocks' where a model has one stage",
        )

"""What was done to make a student, and what is left of the teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from limbeck.compression.budget import Budget
from limbeck.compression.units import Kept
from limbeck.compression.vocabulary import Vocabulary


@dataclass(frozen=True)
class ShrinkReport:
    """What was done to make a student.

    Args:
        model: The class of both.
        family: The configuration's ``model_type``.
        layers: The teacher's layers that stay, by what the configuration calls their number.
        depths: How many there were.
        sizes: Units before and after, by axis.
        kept: Indices of the units that stay, by axis and by the module that reads them (``""``: throughout).
        vocabulary: The tokens that stay and the way between ids; ``None``: all.
        parameters: Before and after.
        budgets: What was asked for and what was met.
        latency: Milliseconds of a forward before and after, where a budget of time was given.
        judged_by: ``"activations"`` on calibration batches, or ``"weights"``; ``None`` where no units were cut.
        difference: Relative difference of the student's answer from that of the teacher without what was taken away:
            rounding. ``None`` where they cannot be compared; the notes say why.
        agreement: How near the student is to the whole teacher on the calibration batches before any training.
        notes: What else to know.
    """

    model: str
    family: str
    layers: dict[str, list[int]]
    depths: dict[str, int]
    sizes: dict[str, tuple[int, int]]
    kept: Kept
    vocabulary: Vocabulary | None
    parameters: tuple[int, int]
    budgets: list[Budget] = field(default_factory=list)
    latency: tuple[float, float] | None = None
    judged_by: str | None = None
    difference: float | None = None
    agreement: dict[str, float] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """The student's parameters over the teacher's."""
        return self.parameters[1] / self.parameters[0]

    def written(self) -> dict[str, Any]:
        """As plain values that JSON knows; of units their numbers, of heads which ones."""
        return {
            "model": self.model,
            "family": self.family,
            "layers": {name: {"kept": stay, "of": self.depths[name]} for name, stay in self.layers.items()},
            "sizes": {axis: {"before": before, "after": after} for axis, (before, after) in self.sizes.items()},
            "heads": {group: units.tolist() for group, units in self.kept.get("heads", {}).items()},
            "parameters": {"before": self.parameters[0], "after": self.parameters[1], "share": self.share},
            "budgets": [budget.written() for budget in self.budgets],
            "latency_ms": None if self.latency is None else {"before": self.latency[0], "after": self.latency[1]},
            "judged_by": self.judged_by,
            "difference": self.difference,
            "agreement": self.agreement,
            "notes": list(self.notes),
        }

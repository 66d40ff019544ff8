"""CKA between the layers that taps name in a student and its teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.analysis.cka import CKA
from limbeck.core.batch import Batch
from limbeck.core.errors import TapError
from limbeck.core.roles import Spot, resolve
from limbeck.core.survey import Place, survey
from limbeck.core.taps import Listener
from limbeck.core.trace import Trace

_GRAM = 256  # samples of one Gram matrix


class Ear:
    """Listens to a model: with taps at first, then without.

    Args:
        model: Any module.
        where: Where its logits stand.
        inputs: What of a batch it is given.
    """

    def __init__(self, model: nn.Module, where: str | None, inputs: Callable[[Batch], Any]) -> None:
        self.model, self.where, self.inputs = model, where, inputs
        self.listener = Listener(model, ("logits",), logits=where)

    def __call__(self, batch: Batch) -> Trace:
        with torch.no_grad():
            return self.listener(self.inputs(batch))

    def attach(self, taps: Sequence[str] = (), places: dict[str, Place] | None = None) -> None:
        self.close()
        self.listener = Listener(self.model, (*taps, "logits"), logits=self.where, places=places)

    def close(self) -> None:
        self.listener.close()


class Layers:
    """CKA over the layers that some taps name in both models."""

    def __init__(self, own: Ear, other: Ear, taps: Sequence[str] | None, example: Batch) -> None:
        self.cka, self.ears = CKA(), (own, other)
        for ear in self.ears:
            places = survey(ear.model, ear.inputs(example))
            ear.attach(_usual_taps(places) if taps is None else [t for t in taps if t != "logits"], places)
        self.names = [_names(ear.listener.spots) for ear in self.ears]

    def update(self, student: Trace, teacher: Trace, batch: Batch) -> None:
        if not all(self.names):
            return
        heard = zip((student, teacher), self.ears, strict=True)
        first, second = ([*_features(trace, batch, ear.inputs(batch))] for trace, ear in heard)
        size = len(first[0])
        for part in torch.arange(size).tensor_split(math.ceil(size / _GRAM)):
            if len(part) >= 4:  # HSIC is not defined on fewer
                rows = slice(int(part[0]), int(part[-1]) + 1)
                self.cka.update([t[rows] for t in first], [t[rows] for t in second])

    def rest(self) -> None:
        """Enough samples: take the taps off."""
        for ear in self.ears:
            ear.attach()

    def compute(self) -> dict[str, Any] | None:
        if not self.cka.samples:
            return None
        student, teacher = self.names
        matrix = self.cka.compute().tolist()
        return {"student": student, "teacher": teacher, "matrix": matrix, "samples": self.cka.samples}


def _usual_taps(places: dict[str, Place]) -> list[str]:
    found = {role: _resolved(role, places) for role in ("stages", "blocks", "penultimate")}
    middle = "stages" if len(found["stages"]) > 1 or not found["blocks"] else "blocks"
    return [role for role in (middle, "penultimate") if found[role]]


def _resolved(role: str, places: dict[str, Place]) -> list[Spot]:
    try:
        spots = resolve(role, places)
    except TapError:  # this kind of model has none
        return []
    return spots if isinstance(spots, list) else [spots]


def _names(spots: dict[str, Spot | list[Spot]]) -> list[str]:
    """A plural role's layers by their modules, any other tap by its name."""
    return [name for tap, s in spots.items() for name in ([x.module for x in s] if isinstance(s, list) else [tap])]


def _features(trace: Trace, batch: Batch, inputs: Any) -> Iterator[Tensor]:
    """What the taps caught, one row a sample. Of token rows the mean over those that count: their number varies."""
    attention = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    for tap, value in trace.taps.items():
        for feature in [] if tap == "logits" else value if isinstance(value, list) else [value]:
            if feature.ndim == 3:
                fitting = (m for m in (batch.mask, attention) if m is not None and m.shape == feature.shape[:2])
                mask = next(fitting, torch.ones(feature.shape[:2], device=feature.device)).unsqueeze(-1)
                feature = (feature * mask).sum(1) / mask.sum(1).clamp(min=1)
            yield feature

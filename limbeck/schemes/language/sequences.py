"""A student that learns what was written beside the data themselves, each by its own mean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from limbeck.core.batch import Batch, Unit
from limbeck.core.distiller import Distiller, Losses
from limbeck.core.objective import Contract, Objective
from limbeck.data.language.split import LanguageSplit

_WRITTEN = "written"  # in a batch's extras: the same rows as the teacher wrote them


class Sequences(Distiller):
    r"""Adds up both losses, :math:`(1 - \alpha) L(\text{data}) + \alpha L(\text{written})`; see :class:`SeqKD`.

    Each is a mean over its own tokens in the whole step. Without anything taken it is an ordinary distiller.
    """

    alpha: float = 1.0
    split: LanguageSplit | None = None

    def take(self, split: LanguageSplit, rows: Tensor) -> None:
        """Take what was written, and where in it each sample stands."""
        self.split, self._rows = split, rows

    def settled(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "written": None if self.split is None else self.split.settings["written"]}

    def objectives(self) -> Iterator[Objective]:
        yield from super().objectives()
        if self.split is not None:
            for unit in {o.contract.normalizer for o in self.loss}:
                yield type("Written", (Objective,), {"contract": Contract(normalizer=_unit(unit))})()

    def made(self, batch: Batch) -> Batch:
        if self.split is None:
            return batch
        rows = self._rows[batch.require("index").cpu()]
        rows = rows[rows >= 0]
        written = self.split.rows.batch(rows).to(batch.require("index").device) if len(rows) else None
        places = {_unit(o.contract.normalizer): _counted(written, o.contract.normalizer, batch) for o in self.loss}
        return batch.replace(extras={**batch.extras, _WRITTEN: written, **places})

    def forward(self, batch: Batch, turn: str = "student") -> Losses:
        if _WRITTEN not in batch.extras:
            return super().forward(batch, turn)
        data = super().forward(batch, turn)
        found = Losses(
            (1 - self.alpha) * data.total,
            dict(data.terms),
            {name: (1 - self.alpha) * weight for name, weight in data.weights.items()},
            data.logits,
            {side: (1 - self.alpha) * value for side, value in data.apart.items()},
        )
        written: Batch | None = batch.extras[_WRITTEN]
        totals = {unit: batch.totals[_unit(unit)] for unit in batch.totals if _unit(unit) in batch.totals}
        if written is not None:
            more = super().forward(written.replace(progress=batch.progress, totals=totals), turn)
            found.total = found.total + self.alpha * more.total
            for side, value in more.apart.items():
                found.apart[side] = found.apart.get(side, 0.0) + self.alpha * value
            found.terms |= {f"written/{name}": value for name, value in more.terms.items()}
            found.weights |= {f"written/{name}": self.alpha * weight for name, weight in more.weights.items()}
        return found


def _unit(unit: Unit) -> Unit:
    """The name under which a unit of what was written is counted."""
    return f"written/{unit}"


def _counted(written: Batch | None, unit: Unit, batch: Batch) -> Tensor:
    """As many places that are True as the unit counts."""
    if written is None:
        return torch.zeros(0, dtype=torch.bool, device=batch.require("index").device)
    mask = written.require("mask")
    known = {"positions": mask, "labels": mask & (written.require("labels") >= 0), "samples": mask.any(dim=1)}
    return known[unit] if unit in known else written.extras[unit]

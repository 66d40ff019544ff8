"""Several teachers that speak with one voice."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.ensembling import confidence_weights, entropy_weights, mixed_logits, stacked
from limbeck.core.errors import ConfigError
from limbeck.core.reduction import check_positive
from limbeck.core.teacher import Teacher
from limbeck.core.trace import Trace
from limbeck.teachers.several import SeveralTeachers

Of = Literal["probabilities", "logits"]
By = Literal["fixed", "confidence", "entropy"]


class Ensemble(SeveralTeachers):
    """Asks each of several teachers; the logits are those of their weighted mean.

    Other taps are the first teacher's; ``trace.members`` are the answers of each.

    Args:
        members: Modules (they are frozen) or teachers, of the same classes.
        weights: One each, relative; ``None``: all count alike. Of ``by="fixed"`` only.
        of: What is averaged: ``"probabilities"``, or ``"logits"`` as they are.
        by: ``"fixed"``; or, sample by sample, ``"confidence"``: more of who is nearer to the label (CA-MKD), or
            ``"entropy"``: more of who is surer (EBKD).
        temperature: At which probabilities are averaged; that of the loss.
        logits: Where logits stand in the output of those given as modules (see ``logits_of``).

    Raises:
        ConfigError: There are no teachers, or weights that do not fit.

    >>> import torch
    >>> batch = Batch(torch.randn(2, 4))
    >>> teacher = Ensemble([nn.Linear(4, 3), nn.Linear(4, 3)], weights=[3, 1])
    >>> teacher.attach(("logits",), batch)
    >>> said = teacher(batch)
    >>> first, second = (member.logits.softmax(1) for member in said.members)
    >>> torch.allclose(said.logits.softmax(1), 0.75 * first + 0.25 * second)
    True
    """

    def __init__(
        self,
        members: Iterable[nn.Module | Teacher],
        weights: Sequence[float] | None = None,
        *,
        of: Of = "probabilities",
        by: By = "fixed",
        temperature: float = 1.0,
        logits: str | None = None,
    ) -> None:
        super().__init__(members, logits=logits)
        check_voice(of, by, temperature, weighted=weights is not None)
        given = [1.0] * len(self.members) if weights is None else [float(w) for w in weights]
        if len(given) != len(self.members) or min(given) < 0 or not 0 < sum(given) < math.inf:
            raise ConfigError(
                "an ensemble's weights are one number of zero or more for each teacher, not all zero",
                where="weights",
                found=given,
                wanted=f"{len(self.members)} numbers",
            )
        self.weights = [w / sum(given) for w in given]
        self.of, self.by, self.temperature = of, by, temperature

    def __call__(self, batch: Batch) -> Trace:
        said = super().__call__(batch)
        if "logits" not in said.taps:
            return said
        logits = stacked([member.logits for member in said.members])
        mixed = mixed_logits(logits, self._weights(logits, batch), of=self.of, temperature=self.temperature)
        return Trace(None, {**said.taps, "logits": mixed}, members=said.members)

    def _weights(self, logits: Tensor, batch: Batch) -> Tensor:
        if self.by == "confidence":
            return confidence_weights(logits, batch.require("labels"))
        return entropy_weights(logits) if self.by == "entropy" else logits.new_tensor(self.weights)


def check_voice(of: str, by: str, temperature: float, *, weighted: bool, where: str = "") -> None:
    """Refuse settings of an ensemble that do not exist or go together."""
    for name, value, known in (("of", of, get_args(Of)), ("by", by, get_args(By))):
        if value not in known:
            raise ConfigError("no such way", where=where + name, found=repr(value), wanted=", ".join(known))
    if weighted and by != "fixed":
        raise ConfigError("weights that are given are fixed", where=where + "by", found=by, wanted="fixed")
    check_positive(temperature, where + "temperature")

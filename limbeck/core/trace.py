"""Everything one forward pass said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from limbeck.core.batch import map_tensors
from limbeck.core.errors import ModelError, TapError, did_you_mean


class Trace:
    """What one model said about one batch: its output, its logits, and the values of its taps.

    ``trace["layer3"]`` is a tensor; a plural role (``trace["stages"]``) is a list of tensors.

    Args:
        output: What the model returned; ``None`` where the model was stopped after its last owed tap.
        taps: Captured values by the name they were asked for.
        logits: Where logits stand in the output (see ``logits_of``).
        members: The traces of an ensemble's members, where there are several.
    """

    def __init__(
        self,
        output: Any,
        taps: Mapping[str, Any] | None = None,
        logits: str | None = None,
        members: tuple[Trace, ...] = (),
    ) -> None:
        self.output = output
        self.taps = dict(taps or {})
        self.members = members
        self._where = logits

    @property
    def logits(self) -> Tensor:
        """The model's logits, found in any common form of output."""
        if "logits" in self.taps:
            value = self.taps["logits"]
            assert isinstance(value, Tensor)
            return value
        if self.output is None:
            raise TapError(
                "the model was stopped before its logits",
                where="logits",
                remedy="list 'logits' among the objective's taps",
            )
        return logits_of(self.output, self._where)

    def __getitem__(self, tap: str) -> Any:
        if tap == "logits":
            return self.logits
        if tap not in self.taps:
            raise TapError(
                "this tap was not asked for",
                where=tap,
                found=f"taps {sorted(self.taps)}",
                remedy=did_you_mean(tap, self.taps) or "list it in the objective's student_taps or teacher_taps",
            )
        return self.taps[tap]

    def map(self, function: Callable[[Tensor], Tensor]) -> Trace:
        """A copy with a function applied to every tensor; a tensor that stands in two places stays one tensor."""
        done: dict[int, tuple[Tensor, Tensor]] = {}

        def once(tensor: Tensor) -> Tensor:
            if id(tensor) not in done:
                done[id(tensor)] = tensor, function(tensor)
            return done[id(tensor)][1]

        return Trace(
            map_tensors(self.output, once),
            map_tensors(self.taps, once),
            self._where,
            tuple(m.map(function) for m in self.members),
        )

    def narrowed(self, size: int) -> Trace:
        """A copy with the first ``size`` logits alone, where it has logits and more of them."""
        logits = self.taps.get("logits")
        if not isinstance(logits, Tensor) or logits.shape[-1] <= size:
            return self
        return Trace(self.output, {**self.taps, "logits": logits[..., :size]}, self._where, self.members)

    def detach(self) -> Trace:
        """A copy whose tensors carry no gradient."""
        return self.map(Tensor.detach)


def logits_of(output: Any, where: str | None = None) -> Tensor:
    """Find the logits in a model's output.

    A tensor is its own logits; of a mapping or dataclass the entry ``logits`` (or ``out``, torchvision's segmentation
    models); of a tuple or list the first tensor.

    Args:
        output: What the model returned.
        where: The entry that holds the logits, where the rule above does not find it: a key, attribute or position,
            dots for nesting (``"heads.main"``, ``"1"``).

    Raises:
        ModelError: No logits are there; the message lists what is.

    >>> import torch
    >>> logits_of({"logits": torch.zeros(2, 3), "hidden": torch.zeros(2, 5)}).shape
    torch.Size([2, 3])
    """
    if where is not None:
        for step in where.split("."):
            output = _entry(output, step, where)
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        for key in ("logits", "out"):
            if isinstance(output.get(key), Tensor):
                return output[key]
    elif isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    elif isinstance(output, (tuple, list)):
        for value in output:
            if isinstance(value, Tensor):
                return value
    raise ModelError(
        "the model's output holds no logits",
        where="output",
        found=_contents(output),
        remedy="name the entry with logits='key' (a key, attribute or position)",
    )


def _entry(output: Any, step: str, where: str) -> Any:
    if isinstance(output, Mapping) and step in output:
        return output[step]
    if isinstance(output, (tuple, list)) and step.lstrip("-").isdigit() and -len(output) <= int(step) < len(output):
        return output[int(step)]
    if not isinstance(output, (tuple, list, Mapping)) and hasattr(output, step):
        return getattr(output, step)
    raise ModelError("the output has no such entry", where=f"logits={where!r}", found=_contents(output))


def _contents(output: Any) -> str:
    if isinstance(output, Mapping):
        return f"{type(output).__name__} with keys {sorted(map(str, output))}"
    if isinstance(output, (tuple, list)):
        return f"{type(output).__name__} of {[type(v).__name__ for v in output]}"
    return type(output).__name__

"""How many floating-point operations training takes: counted on a stage's first steps, for the whole of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.teacher import FrozenTeacher, teacher_inputs
from limbeck.core.trace import Trace
from limbeck.models.describe import flops

COUNTED = 4  # steps; those of one stage differ little, but for schemes that throw dice


class _Counter(TorchDispatchMode):
    """Counts by torch's formulas. Its own counter takes attention apart, so that sums would round otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = _FORMULAS.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> float:
    return float(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> float:
    return float(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


_FORMULAS: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    **flop_registry,
}


class Operations:
    """Floating-point operations of a stage, by who took them. What torch has no formula for counts nothing.

    Args:
        counted: Steps that were counted.
        whole: Operations of those: both models', forward and backward, and all else that a step computes.
        teacher: The teacher's part.
    """

    def __init__(self, counted: int = 0, whole: float = 0.0, teacher: float = 0.0) -> None:
        self.counted, self.whole, self.teacher = counted, whole, teacher

    @classmethod
    def estimated(cls, distiller: Distiller, example: Batch, samples: float) -> Operations:
        """Of compiled steps, into which nobody can look; see :func:`estimate`."""
        whole, teacher = estimate(distiller, example, samples)
        return cls(COUNTED, COUNTED * whole, COUNTED * teacher)

    @contextlib.contextmanager
    def counting(self, distiller: Distiller) -> Iterator[None]:
        """Count what is computed within, as one step, until there were enough of them."""
        if self.counted >= COUNTED:
            yield
            return
        ask = distiller._teach
        with _Counter() as counter:

            def asked(batch: Batch) -> Trace:
                before = counter.total
                try:
                    return ask(batch)
                finally:
                    self.teacher += counter.total - before

            distiller.__dict__["_teach"] = asked
            try:
                yield
            finally:
                distiller.__dict__.pop("_teach", None)
        self.whole += counter.total
        self.counted += 1

    def of(self, steps: int) -> dict[str, float]:
        """Of so many steps: ``total`` and, of that, ``teacher``."""
        share = steps / max(self.counted, 1)
        return {"total": self.whole * share, "teacher": self.teacher * share}


def estimate(distiller: Distiller, example: Batch, samples: float) -> tuple[float, float]:
    """Operations of a step by its forwards alone (a backward counts as two), and the teacher's part of them.

    A model that no term taps is not run, and does not count.

    Args:
        distiller: Set up.
        example: A small batch.
        samples: Samples of a step.
    """
    own = 3.0 * flops(distiller.student, example.inputs) if distiller.loss.student_taps else 0.0
    known = isinstance(distiller.teacher, FrozenTeacher) and distiller.loss.teacher_taps
    model: Any = getattr(distiller.teacher, "model", None)
    other = float(flops(model, teacher_inputs(example))) if known else 0.0
    share = samples / example.size
    return (own + other) * share, other * share


def together(parts: list[dict[str, float]]) -> dict[str, float]:
    """The operations of several stages or trainings.

    >>> together([{"total": 3.0, "teacher": 1.0}, {"total": 2.0, "teacher": 0.0}])
    {'total': 5.0, 'teacher': 1.0}
    """
    return {name: sum(part.get(name, 0.0) for part in parts) for name in ("total", "teacher")}

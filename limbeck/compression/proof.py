"""Whether a student is what it should be: the teacher without the units that were taken away; and how near it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.compression.anatomy import Anatomy
from limbeck.compression.calibration import Inputs, counts_of, hooked, made_up_inputs, run
from limbeck.compression.cutting import tied
from limbeck.compression.plan import Plan
from limbeck.compression.units import Kept
from limbeck.compression.vocabulary import Vocabulary
from limbeck.core.divergences import kl_rows, soften
from limbeck.core.errors import DataError, ModelError
from limbeck.core.reduction import widen

#: Largest difference allowed between student and masked teacher, over the length of the teacher's answer. Sums run over
#: fewer terms in another order; a unit too many or too few is off by far more.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_HALF = 5e-2


@contextmanager
def without(anatomy: Anatomy, plan: Plan, kept: Kept) -> Iterator[None]:
    """While this lasts, the teacher computes as if what the plan drops were not there; its weights are not touched."""

    def silence(units: int, width: Tensor) -> Callable[[nn.Module, Tensor, Any], Tensor]:
        stays = torch.zeros(units).index_fill_(0, width, 1.0)
        return lambda _, given, __: (
            given.unflatten(-1, (units, -1)) * stays.to(given.device, given.dtype).unsqueeze(-1)
        ).flatten(-2)

    def skip(_: nn.Module, given: Tensor, output: Any) -> Any:
        return given if isinstance(output, Tensor) else type(output)((given, *output[1:]))

    readers = {
        anatomy.modules[group]: silence(anatomy.size(axis), units)
        for axis in ("heads", "ffn")
        for group, units in kept.get(axis, {}).items()
    }
    layers = {
        anatomy.modules[f"{prefix}.{i}"]: skip
        for stack in anatomy.stacks
        for prefix in stack.prefixes
        for i in set(range(stack.depth)) - set(plan.layers[stack.field])
    }
    with ExitStack() as stack_:
        stack_.enter_context(hooked(readers, before=True))
        stack_.enter_context(hooked(layers))
        yield


def difference(
    anatomy: Anatomy, student: Any, plan: Plan, kept: Kept, batches: list[Inputs] | None
) -> tuple[float | None, str]:
    """How far the student's answer is from that of the teacher without what was taken away, over the latter's length.

    Returns:
        The difference; or ``None``, and why the two cannot be compared.

    Raises:
        ModelError: They differ by more than rounding: this family's weights cannot be cut so.
    """
    if "hidden" in plan.sizes:
        return None, "hidden units were cut: norms then divide by something else"
    if plan.tie and not tied(anatomy.teacher):
        return None, "embeddings were tied that were not"
    words = plan.words
    tokens = words.kept if words is not None else torch.arange(anatomy.sizes.get("vocabulary", 1))
    inputs = made_up_inputs(anatomy.teacher, tokens) or (batches[0] if batches else None)
    if inputs is None:
        return None, "nothing can be made up for this model and no calibration batch was given"
    with without(anatomy, plan, kept):
        wanted = _answer(run(anatomy.teacher, inputs))
    found = _answer(run(student, inputs if words is None else words.inputs(inputs)))
    if words is not None and wanted.shape[-1] == words.size:
        wanted = wanted[..., words.kept.to(wanted.device)]
    gap = float(
        torch.linalg.vector_norm((found - wanted).double()) / torch.linalg.vector_norm(wanted.double()).clamp(min=1e-12)
    )
    limit = TOLERANCE.get(anatomy.teacher.dtype, _HALF)
    if not gap <= limit:
        cut = [*plan.sizes, *(s.field for s in anatomy.stacks if len(plan.layers[s.field]) < s.depth)]
        raise ModelError(
            f"{anatomy.kind!r} cannot be cut along {', '.join(cut)}: more changes than what is taken away",
            where="teacher",
            found=f"a relative difference of {gap:.2g}",
            wanted=f"at most {limit:g}",
            remedy="cut along fewer dimensions to find which one this family does not allow",
        )
    return gap, ""


@torch.no_grad()
def agreement(
    teacher: Any, student: Any, batches: list[Inputs], words: Vocabulary | None
) -> tuple[dict[str, float] | None, str]:
    """How nearly the student answers as the teacher does, before any training, over tokens that count.

    Returns:
        ``kl`` (nats, of the student's prediction from the teacher's; of a smaller vocabulary with the teacher's
        predictions among the tokens that stay) and ``top1``; of models without logits ``cosine`` of the last hidden
        states; or ``None``, and why they cannot be compared.
    """
    sums: dict[str, float] = {}
    total = 0.0
    for inputs in batches:
        try:
            mapped = inputs if words is None else words.inputs(inputs)
        except DataError:
            return None, "calibration batches hold tokens that were dropped, and no token stands for them (unknown)"
        first, second = run(teacher, inputs), run(student, mapped)
        told, given = _answer(first), _answer(second)
        if words is not None and told.shape[-1] == words.size:
            told = told[..., words.kept.to(told.device)]
        if told.shape != given.shape:
            return None, "teacher and student answer in different widths"
        weights = counts_of(teacher, inputs, told)
        values = _compare(told, given, logits=getattr(first, "logits", None) is not None)
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + float((value * weights).sum())
        total += float(weights.sum())
    return {name: value / total for name, value in sums.items()}, ""


def _compare(teacher: Tensor, student: Tensor, *, logits: bool) -> dict[str, Tensor]:
    if not logits:
        return {"cosine": torch.nn.functional.cosine_similarity(widen(teacher), widen(student), dim=-1)}
    rows = kl_rows(soften(teacher), soften(student)).clamp(min=0)  # a divergence is never negative; rounding can be
    return {"kl": rows, "top1": (teacher.argmax(-1) == student.argmax(-1)).float()}


def _answer(output: Any) -> Tensor:
    """Logits, or the last hidden state of a model without any."""
    for name in ("logits", "last_hidden_state"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    raise ModelError("the teacher's output holds neither logits nor a hidden state", where="teacher")

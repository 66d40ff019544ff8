"""A student made from any transformers teacher in one call: fewer layers, heads, units, tokens; weights copied."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.compression.anatomy import Anatomy
from limbeck.compression.budget import Budget, Search
from limbeck.compression.calibration import Inputs, example_inputs, inputs_of
from limbeck.compression.cutting import cut
from limbeck.compression.layers import Choose, LayerChooser, Layers, asked_layers
from limbeck.compression.plan import Count, Plan, asked_sizes
from limbeck.compression.proof import agreement, difference
from limbeck.compression.report import ShrinkReport
from limbeck.compression.units import Kept, active, keep_units, magnitudes, norm_ratios
from limbeck.compression.vocabulary import (
    Vocabulary,
    most_frequent,
    special_tokens,
    token_frequencies,
)
from limbeck.core.errors import ConfigError
from limbeck.models.describe import latency as measured_latency
from limbeck.models.describe import parameters as parameters_of


@dataclass(frozen=True)
class Shrunk:
    """A student and what was done to make it."""

    student: Any
    report: ShrinkReport


def student_from(
    teacher: Any,
    *,
    layers: Layers | None = None,
    choose: Choose = "even",
    heads: Count = None,
    kv_heads: Count = None,
    hidden: Count = None,
    ffn: Count = None,
    importance: Iterable[Any] | None = None,
    tie: bool | None = None,
    vocabulary: int | Sequence[int] | Tensor | None = None,
    unknown: int | None = None,
    parameters: float | None = None,
    latency: float | None = None,
    example: Any = None,
) -> Shrunk:
    """Make a smaller model of the teacher's class from the teacher's weights. The teacher is not touched.

    The student is a plain transformers model with a configuration of its own: ``save_pretrained`` and
    ``from_pretrained`` need no limbeck. Numbers may be given as shares of the teacher's: ``ffn=0.5``.

    Args:
        teacher: A ``transformers.PreTrainedModel`` in float weights.
        layers: How many stay, as a number or share, or which, as a list; of encoder-decoders this is for both stacks,
            or a mapping by what the configuration calls their depths (``{"num_layers": 2, "num_decoder_layers": 1}``).
        choose: Which layers stay where a number is given, see :func:`choose_layers`.
        heads: Attention heads that stay in every layer. Heads keep their width. Grouped heads leave each group evenly.
        kv_heads: Heads of keys and values that stay; their groups of heads stay with them.
        hidden: Hidden units that stay, the same throughout; where heads are together as wide as the model (BERT, GPT-2)
            as many heads stay as then fit. Norms are rescaled where calibration batches tell by how much.
        ffn: Feed-forward units that stay in every layer.
        importance: Calibration batches on which units and layers are judged (see :func:`measure_importance`), token
            frequencies counted and student and teacher compared. ``None``: units are judged by their weights alone.
        tie: Make output and input embeddings one, or two; ``None`` leaves them as they are.
        vocabulary: Token ids that stay, in the student's order; or how many, the most frequent in the calibration
            batches (those with a meaning of their own always stay).
        unknown: The token that stands for dropped ones when ids are mapped.
        parameters: The student's size at most: a number of parameters, or a share (a float up to 1.0) of the teacher's.
            What is not given above is cut as far as needed, see :class:`Search` for the path.
        latency: Milliseconds a forward may take on the teacher's device.
        example: Inputs it is timed with; the first calibration batch, else one made up of two samples of 128 tokens.

    Returns:
        The student, in evaluation mode, on the teacher's device and in its precision; and the report, which holds what
        stays, sizes, budgets and how near student and teacher are before any training.

    Raises:
        ConfigError: Numbers that do not fit each other or the teacher, or a budget that cannot be met.
        ModelError: No transformers model, or this family's weights cannot be cut so; the message names the dimension.
        DataError: Calibration batches that cannot be read.

    Source: layers as in ShortGPT (arXiv 2403.03853) and Gromov et al. (2403.17887), units as in Minitron (2407.14679).

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
        >>> teacher = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
        >>> student, report = (made := student_from(teacher, layers=2, ffn=0.5)).student, made.report
        >>> student.config.num_hidden_layers, student.config.intermediate_size, report.layers
        (2, 32, {'num_hidden_layers': [0, 3]})
    """
    anatomy = Anatomy(teacher)
    batches = None if importance is None else inputs_of(teacher, importance)
    chooser = LayerChooser(anatomy, choose, batches)
    everything = {stack.field: tuple(range(stack.depth)) for stack in anatomy.stacks}
    asked = {} if layers is None else asked_layers(layers, anatomy.stacks, chooser)
    sizes = asked_sizes(anatomy, heads, kv_heads, hidden, ffn)
    words = _vocabulary(anatomy, vocabulary, unknown, batches)
    plan = Plan({**everything, **asked}, sizes, words, tie)
    given = {"layers": layers, "heads": heads if heads is not None else kv_heads, "ffn": ffn, "hidden": hidden}
    plan, limits, timed = _within(anatomy, plan, chooser, given, parameters, latency, example, batches)

    notes: list[str] = []
    axes = [axis for axis in ("heads", "ffn", "hidden") if axis in plan.sizes]
    scores = magnitudes(anatomy, axes) if batches is None else active(anatomy, batches, axes)
    kept = keep_units(anatomy, scores, plan.sizes)
    ratios = {}
    if "hidden" in plan.sizes:
        if batches is None:
            notes.append("norms are not rescaled: without calibration batches it is not known by how much")
        else:
            ratios = norm_ratios(anatomy, batches, kept["hidden"][""])
    student = cut(anatomy, plan, kept, ratios)
    gap, why = difference(anatomy, student, plan, kept, batches)
    near, why_not = (None, "") if batches is None else agreement(teacher, student, batches, words)
    notes += [f"not checked against the teacher: {why}"] * bool(why) + [f"agreement not told: {why_not}"] * bool(
        why_not
    )

    before, after = parameters_of(teacher), parameters_of(student)
    budgets = [] if parameters is None else [Budget("parameters", parameters, limits["parameters"], after)]
    times = None
    if latency is not None and timed is not None:
        own = timed if words is None else words.inputs(timed)
        times = measured_latency(teacher, timed), measured_latency(student, own)
        budgets.append(Budget("latency", latency, latency, times[1]))
    report = ShrinkReport(
        model=type(teacher).__name__,
        family=anatomy.kind,
        layers={field: list(stay) for field, stay in plan.layers.items()},
        depths={stack.field: stack.depth for stack in anatomy.stacks},
        sizes={axis: (units, plan.sizes.get(axis, units)) for axis, units in anatomy.sizes.items()}
        | ({} if words is None else {"vocabulary": (words.size, len(words))}),
        kept=_of_kept_layers(anatomy, plan, kept),
        vocabulary=words,
        parameters=(before, after),
        budgets=budgets,
        latency=times,
        judged_by=None if not axes else "weights" if batches is None else "activations",
        difference=gap,
        agreement=near,
        notes=notes,
    )
    return Shrunk(student, report)


def _vocabulary(
    anatomy: Anatomy, asked: int | Sequence[int] | Tensor | None, unknown: int | None, batches: list[Inputs] | None
) -> Vocabulary | None:
    if asked is None:
        if unknown is not None:
            raise ConfigError("no token is dropped, so none is unknown", where="unknown", remedy="give vocabulary too")
        return None
    size = anatomy.size("vocabulary")
    anatomy.layouts(["vocabulary"])
    if isinstance(asked, int):
        if batches is None:
            raise ConfigError(
                "how often tokens come is told by calibration batches",
                where="importance",
                remedy="give them, or list the token ids in vocabulary",
            )
        if not 1 <= asked <= size:
            raise ConfigError("so many tokens cannot stay", where="vocabulary", found=asked, wanted=f"1 to {size}")
        configs = [anatomy.config, getattr(anatomy.teacher, "generation_config", None)]
        named = [i for c in configs if c is not None for ids in special_tokens(c, size).values() for i in ids]
        always = named if unknown is None else [*named, unknown]
        asked = most_frequent(token_frequencies(batches, size), asked, always)
    return Vocabulary(asked, size, unknown)


def _within(
    anatomy: Anatomy,
    plan: Plan,
    chooser: LayerChooser,
    given: dict[str, Any],
    parameters: float | None,
    latency: float | None,
    example: Any,
    batches: list[Inputs] | None,
) -> tuple[Plan, dict[str, float], Inputs | None]:
    """The plan that meets the budgets, these as numbers, and the inputs it was timed with."""
    limits: dict[str, float] = {}
    timed = None
    for name, value in (("parameters", parameters), ("latency", latency)):
        if value is not None and (isinstance(value, bool) or not value > 0):
            raise ConfigError("a budget is above zero", where=name, found=value)
    if parameters is None and latency is None:
        return plan, limits, timed
    search = Search(anatomy, plan, [name for name, value in given.items() if value is None], chooser)
    if parameters is not None:
        share = isinstance(parameters, float) and parameters <= 1
        limits["parameters"] = int(parameters * parameters_of(anatomy.teacher)) if share else int(parameters)
        plan = search.within_parameters(int(limits["parameters"]))
    if latency is not None:
        tokens = torch.arange(anatomy.sizes.get("vocabulary", 1)) if plan.words is None else plan.words.kept
        timed = example_inputs(anatomy.teacher, example, batches, tokens, "example")
        plan = search.within_latency(latency, timed)
    return plan, limits, timed


def _of_kept_layers(anatomy: Anatomy, plan: Plan, kept: Kept) -> Kept:
    def stays(group: str) -> bool:
        place = anatomy.place(group)
        return place is None or place[1] in plan.layers[place[0].field]

    return {axis: {group: units for group, units in by.items() if stays(group)} for axis, by in kept.items()}

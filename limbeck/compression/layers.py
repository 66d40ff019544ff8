"""Which layers a shallower student keeps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from limbeck.compression.anatomy import Anatomy
from limbeck.compression.calibration import Inputs, Listener, inputs_of, pass_through
from limbeck.compression.layouts import Stack
from limbeck.core.errors import ConfigError
from limbeck.core.reduction import widen
from limbeck.core.relations import unit

Choose = Literal["even", "first_last", "first", "last", "similarity", "angular"]
Layers = int | float | Sequence[int] | Mapping[str, int | float | Sequence[int]]
Influence = dict[str, Tensor]


def choose_layers(depth: int, number: int, choose: Choose = "even", scores: Tensor | None = None) -> tuple[int, ...]:
    """Which of so many layers stay, counted from 0 and in order.

    ==============  ================================================================================================
    ``choose``      keeps
    ==============  ================================================================================================
    ``even``        evenly spaced, the first and the last among them (of one: the first), as sentence-transformers
                    and DistilBERT's successors do
    ``first_last``  the first half (rounded up) and the last half of the number
    ``first``       the first ones
    ``last``        the last ones
    ``similarity``  those with the largest block influence (Men et al., ShortGPT, 2024, arXiv 2403.03853)
    ``angular``     all but the run of layers whose input and output are nearest (Gromov et al., The Unreasonable
                    Ineffectiveness of the Deeper Layers, 2024, arXiv 2403.17887)
    ==============  ================================================================================================

    Args:
        depth: Layers there are.
        number: Layers to keep.
        choose: See above.
        scores: ``[depth]`` block influences for ``similarity``; ``[number + 1]`` distances, one for each place where
            the run that is left out can start, for ``angular``.

    Raises:
        ConfigError: No such choice or number, or scores are missing.

    >>> choose_layers(12, 4), choose_layers(12, 5, "first_last"), choose_layers(12, 2, "last")
    ((0, 4, 7, 11), (0, 1, 2, 10, 11), (10, 11))
    """
    if choose not in get_args(Choose):
        raise ConfigError("no such choice", where="choose", found=repr(choose), wanted=", ".join(get_args(Choose)))
    if not 1 <= number <= depth:
        raise ConfigError("so many layers cannot be kept", where="layers", found=number, wanted=f"1 to {depth}")
    if number == depth:
        return tuple(range(depth))
    if choose == "even":
        step = (depth - 1) / max(number - 1, 1)
        return tuple(math.floor(i * step + 0.5) for i in range(number))
    if choose in ("first_last", "first", "last"):
        head = {"first_last": -(-number // 2), "first": number, "last": 0}[choose]
        return (*range(head), *range(depth - number + head, depth))
    if scores is None:
        raise ConfigError(
            f"choose={choose!r} compares what layers are given with what they make of it",
            where="importance",
            remedy="give calibration batches as importance, or choose 'even'",
        )
    if choose == "similarity":
        return tuple(sorted(scores.argsort(descending=True, stable=True)[:number].tolist()))
    start = int(scores.argmin())
    return (*range(start), *range(start + depth - number, depth))


def block_influence(model: Any, batches: Iterable[Any]) -> Influence:
    r"""How much each layer changes what passes through it, by stack (what the configuration calls its depth).

    .. math:: \mathrm{BI}_l = 1 - \mathbb{E}_t \cos(h_t^{l}, h_t^{l+1})

    Args:
        model: A transformers model.
        batches: Calibration batches; padding does not count.

    Returns:
        ``[depth]`` for each stack; 0 for a layer that changes nothing, or only lengths.

    Source: Men et al., ShortGPT, 2024, arXiv 2403.03853, equation 1.
    """
    return _influence(Anatomy(model), inputs_of(model, batches))


def angular_distance(first: Tensor, second: Tensor) -> Tensor:
    r"""Angle between vectors as a share of a half turn, :math:`\frac 1 \pi \arccos \cos(a, b)`.

    Args:
        first: ``[*, D]``.
        second: ``[*, D]``.

    Returns:
        ``[*]``: 0 for parallel vectors, 0.5 for orthogonal, 1 for opposite ones.

    >>> angular_distance(torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    tensor([0.0000, 0.5000, 1.0000])
    """
    first, second = unit(widen(first)), unit(widen(second))
    # Twice the angle of half the difference keeps digits that the arc cosine loses near 0 and 1.
    apart = torch.linalg.vector_norm(first - second, dim=-1)
    return 2 / math.pi * torch.atan2(apart, torch.linalg.vector_norm(first + second, dim=-1))


def angular_block_scores(model: Any, batches: Iterable[Any], number: int) -> Influence:
    r"""Distance across each run of layers, by stack: small where the run could be left out.

    .. math:: d(l, n) = \mathbb{E}_b \frac 1 \pi \arccos \cos(h_b^{l}, h_b^{l+n})

    with :math:`h_b^l` what enters layer l at the last token of sample b that is no padding.

    Args:
        model: A transformers model.
        batches: Calibration batches.
        number: n, the length of the run; 0 gives 0 everywhere.

    Returns:
        ``[depth - n + 1]`` for each stack at least that deep.

    Source: Gromov et al., 2024, arXiv 2403.17887, equation 7.
    """
    flows = _last_tokens(Anatomy(model), inputs_of(model, batches))
    return {field: run_distances(flow, number) for field, flow in flows.items() if len(flow) > number}


def run_distances(flow: Tensor, number: int) -> Tensor:
    """Mean angular distance across each run of layers, from what entered and left them, ``[depth + 1, B, D]``."""
    return angular_distance(flow[: len(flow) - number], flow[number:]).mean(dim=1)


class LayerChooser:
    """Chooses layers for any depth, and asks the teacher once."""

    def __init__(self, anatomy: Anatomy, choose: Choose, batches: list[Inputs] | None) -> None:
        self._anatomy, self._choose, self._batches = anatomy, choose, batches
        self._measured: Influence | None = None

    def __call__(self, stack: Stack, number: int) -> tuple[int, ...]:
        return choose_layers(stack.depth, number, self._choose, self._scores(stack, number))

    def _scores(self, stack: Stack, number: int) -> Tensor | None:
        if self._choose not in ("similarity", "angular") or self._batches is None:
            return None
        if self._measured is None:
            measure = _influence if self._choose == "similarity" else _last_tokens
            self._measured = measure(self._anatomy, self._batches)
        found = self._measured[stack.field]
        return found if self._choose == "similarity" else run_distances(found, stack.depth - number)


def asked_layers(layers: Layers, stacks: Sequence[Stack], chooser: LayerChooser) -> dict[str, tuple[int, ...]]:
    """What ``layers`` of ``student_from`` asks for: a number, a share or a list, for all stacks or by stack.

    Raises:
        ConfigError: No such stack, layer or number.
    """
    if isinstance(layers, Mapping):
        unknown = sorted(layers.keys() - {stack.field for stack in stacks})
        if unknown:
            fields = ", ".join(stack.field for stack in stacks)
            raise ConfigError("no such stack of layers", where="layers", found=", ".join(unknown), wanted=fields)
        return {s.field: _asked(layers[s.field], s, chooser) for s in stacks if s.field in layers}
    return {stack.field: _asked(layers, stack, chooser) for stack in stacks}


def _asked(layers: int | float | Sequence[int], stack: Stack, chooser: LayerChooser) -> tuple[int, ...]:
    if isinstance(layers, (int, float)):
        return chooser(stack, count_of(layers, stack.depth, "layers"))
    listed = list(layers)
    good = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < stack.depth for i in listed)
    if not listed or not good or sorted(set(listed)) != listed:
        raise ConfigError(
            "not layers of the teacher",
            where="layers",
            found=listed,
            wanted=f"numbers from 0 to {stack.depth - 1}, rising, none twice",
        )
    return tuple(listed)


def count_of(value: int | float, whole: int, where: str) -> int:
    """A number of units from a number, or from a share between 0 and 1 (at least one unit).

    Raises:
        ConfigError: Neither, or more than there are.

    >>> count_of(0.5, 12, "layers"), count_of(3, 12, "layers")
    (6, 3)
    """
    if isinstance(value, float) and 0 < value <= 1:
        return max(1, round(value * whole))
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= whole:
        raise ConfigError(
            "so much cannot be kept", where=where, found=value, wanted=f"1 to {whole}, or a share from 0.0 to 1.0"
        )
    return value


def _influence(anatomy: Anatomy, batches: list[Inputs]) -> Influence:
    sums = {stack.field: torch.zeros(stack.depth, 2, dtype=torch.float64) for stack in anatomy.stacks}

    def listener(total: Tensor) -> Listener:
        def note(weights: Tensor, given: Tensor, made: Tensor) -> None:
            cosine = (unit(widen(given)) * unit(widen(made))).sum(-1)
            total.add_(torch.stack([((1 - cosine) * weights).sum(), weights.sum()]).cpu())

        return note

    layers = _layers(anatomy)
    pass_through(anatomy.teacher, batches, {name: listener(sums[field][i]) for name, (field, i) in layers.items()})
    return {field: (total[:, 0] / total[:, 1]).float() for field, total in sums.items()}


def _last_tokens(anatomy: Anatomy, batches: list[Inputs]) -> Influence:
    """What enters and leaves layers at each sample's last token that counts, ``[depth + 1, B, D]`` a stack."""
    found: dict[str, list[list[Tensor]]] = {s.field: [[] for _ in range(s.depth + 1)] for s in anatomy.stacks}

    def listener(states: list[list[Tensor]], layer: int) -> Listener:
        def note(weights: Tensor, given: Tensor, made: Tensor) -> None:
            places = torch.arange(given.shape[1], device=given.device)
            last = torch.where(weights > 0, places, -1).amax(dim=1).clamp(min=0)
            rows = torch.arange(len(given), device=given.device)
            if layer == 0:
                states[0].append(widen(given[rows, last]).cpu())
            states[layer + 1].append(widen(made[rows, last]).cpu())

        return note

    layers = _layers(anatomy)
    pass_through(anatomy.teacher, batches, {name: listener(found[field], i) for name, (field, i) in layers.items()})
    return {field: torch.stack([torch.cat(layer) for layer in states]) for field, states in found.items()}


def _layers(anatomy: Anatomy) -> dict[str, tuple[str, int]]:
    """Stack and number of every layer, by the module's name."""
    return {f"{s.prefixes[0]}.{i}": (s.field, i) for s in anatomy.stacks for i in range(s.depth)}

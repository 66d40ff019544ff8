"""How much heads, feed-forward units and hidden units matter, and which of them a narrower student keeps.

Measured as in Minitron (Muralidharan et al., Compact Language Models via Pruning and Knowledge Distillation, 2024,
arXiv 2407.14679): activations on calibration batches, their mean over tokens, its L2 norm over samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.compression.anatomy import Anatomy
from limbeck.compression.calibration import Inputs, Listener, inputs_of, pass_through
from limbeck.compression.layouts import Group, Layouts, owner_of
from limbeck.core.reduction import widen

#: Scores ``[units]``: of heads and feed-forward units by the module that reads them, of hidden units by ``"hidden"``.
Importance = dict[str, Tensor]
#: Indices of the units that stay, rising: by axis, and by group (``""``: the whole model).
Kept = dict[str, dict[str, Tensor]]


def measure_importance(model: Any, batches: Iterable[Any], axes: Sequence[str] = ("heads", "ffn")) -> Importance:
    r"""How active units are on calibration batches.

    .. math:: F_i = \Big( \sum_b \big( \tfrac{1}{T_b} \sum_t |a_{b,t,i}| \big)^2 \Big)^{1/2}

    with :math:`a` for ``ffn`` what enters the last projection (after the gate), for ``heads`` the length of what a head
    hands to the output projection, for ``hidden`` what norms give, summed over all norms.

    Args:
        model: A transformers model.
        batches: Calibration batches; padding does not count.
        axes: Of ``"heads"``, ``"ffn"``, ``"hidden"``.

    Returns:
        ``[units]`` for each attention and feed-forward network, by the module that reads it, and for ``"hidden"``.

    Raises:
        ModelError: This family's weights cannot be cut along one of the axes.

    Source: Minitron, section 2.2, with the aggregation it found best (batch: L2, sequence: mean).
    """
    return active(Anatomy(model), inputs_of(model, batches), axes)


def active(anatomy: Anatomy, batches: list[Inputs], axes: Sequence[str]) -> Importance:
    """``measure_importance`` on prepared inputs."""
    squares: Importance = {}

    def add(name: str, size: Tensor, weights: Tensor) -> None:
        mean = (size * weights.unsqueeze(-1)).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)  # [B, units]
        total = mean.double().square().sum(0).cpu()
        squares[name] = squares.get(name, torch.zeros_like(total)) + total

    def reading(group: Group) -> Listener:
        def note(weights: Tensor, given: Tensor, _: Tensor) -> None:
            given = widen(given)
            if group.axis == "heads":
                given = torch.linalg.vector_norm(given.unflatten(-1, (anatomy.size("heads"), -1)), dim=-1)
            add(group.reader, given.abs(), weights)

        return note

    def norm(name: str) -> Listener:
        return lambda weights, _, made: add(name, widen(made).abs(), weights)

    listeners = {group.reader: reading(group) for axis in axes if axis != "hidden" for group in anatomy.groups(axis)}
    norms = hidden_norms(anatomy) if "hidden" in axes else {}
    pass_through(anatomy.teacher, batches, {**listeners, **{name: norm(name) for name in norms}})
    found = {name: squares[name].sqrt().float() for name in listeners}
    if norms:
        found["hidden"] = torch.stack([squares[name] for name in norms if name in squares]).sqrt().sum(0).float()
    return found


def magnitudes(anatomy: Anatomy, axes: Sequence[str]) -> Importance:
    """Scores without data: of a unit the product, over the matrices it has a share in, of the length of that share (so
    one whose inputs or outputs are all zero has score 0); of a hidden unit the length of all its weights."""
    state = anatomy.teacher.state_dict()
    found: Importance = {}

    def squares(name: str, axis: str, layouts: Layouts) -> Tensor:
        """Squared length of each unit's share of a tensor, ``[units]``."""
        total = torch.zeros(anatomy.size(axis), dtype=torch.float64)
        for dim, layout in layouts[name].items():
            owners = owner_of(layout, axis, anatomy.sizes)
            rows = state[name].detach().double().cpu().movedim(dim, 0).reshape(len(owners), -1)
            own = owners >= 0
            total.index_add_(0, owners[own], rows[own].square().sum(1))
        return total

    for axis in axes:
        layouts = anatomy.layouts([axis])
        if axis == "hidden":
            found[axis] = torch.stack([squares(name, axis, layouts) for name in layouts]).sum(0).sqrt().float()
            continue
        for group in anatomy.groups(axis):
            matrices = [name for name in group.tensors if name in layouts and len(anatomy.shapes[name]) > 1]
            lengths = torch.stack([squares(name, axis, layouts).sqrt() for name in matrices])
            found[group.reader] = lengths.prod(0).float()
    return found


def keep_units(anatomy: Anatomy, scores: Importance, sizes: Mapping[str, int]) -> Kept:
    """The most important units, so many of each axis; of equal ones the first.

    Of grouped heads those of the most important groups stay, in each group equally many.

    Args:
        anatomy: The teacher's.
        scores: By group, of every axis in ``sizes`` but ``kv_heads``.
        sizes: How many stay: ``heads`` (with ``kv_heads`` where there are such), ``ffn``, ``hidden``.
    """
    kept: Kept = {}
    if "hidden" in sizes:
        kept["hidden"] = {"": _best(scores["hidden"], sizes["hidden"])}
    for axis in ("heads", "ffn"):
        if axis not in sizes:
            continue
        groups = anatomy.groups(axis)
        shared = _shared(groups, scores)
        for group in groups:
            score = shared[group.family] if group.family is not None else scores[group.reader]
            if axis == "heads" and anatomy.field("kv_heads") is not None:
                heads, kv_heads = _best_heads(score, sizes["heads"], sizes["kv_heads"], anatomy.size("kv_heads"))
                kept.setdefault("kv_heads", {})[group.reader] = kv_heads
                kept.setdefault("heads", {})[group.reader] = heads
            else:
                kept.setdefault(axis, {})[group.reader] = _best(score, sizes[axis])
    return kept


def _shared(groups: Sequence[Group], scores: Importance) -> dict[str, Tensor]:
    """One score for groups that keep the same units: the mean, where each group's scores have mean 1."""
    members: dict[str, list[Tensor]] = {}
    for group in groups:
        if group.family is not None:
            score = scores[group.reader]
            members.setdefault(group.family, []).append(score / score.mean().clamp(min=torch.finfo(score.dtype).tiny))
    return {family: torch.stack(each).mean(0) for family, each in members.items()}


def _best(scores: Tensor, number: int) -> Tensor:
    return scores.argsort(descending=True, stable=True)[:number].sort().values


def _best_heads(scores: Tensor, heads: int, kv_heads: int, groups: int) -> tuple[Tensor, Tensor]:
    """Query heads and groups that stay. A group counts by the heads it would keep."""
    each = scores.reshape(groups, -1)
    inside = each.argsort(dim=1, descending=True, stable=True)[:, : heads // kv_heads].sort(dim=1).values
    best = _best(each.gather(1, inside).sum(1), kv_heads)
    return (best.unsqueeze(1) * each.shape[1] + inside[best]).flatten(), best


def hidden_norms(anatomy: Anatomy) -> dict[str, nn.Module]:
    """Norms over the hidden units, by name."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in anatomy.layouts(["hidden"]))
    return {
        name: anatomy.modules[name]
        for name in owners
        if "norm" in type(anatomy.modules[name]).__name__.lower() and len(anatomy.shapes.get(f"{name}.weight", ())) == 1
    }


def norm_ratios(anatomy: Anatomy, batches: list[Inputs], hidden: Tensor) -> dict[str, float]:
    r"""By what a norm's weight is multiplied when only some hidden units stay.

    .. math:: c = \mathbb{E}_t \sqrt{\frac{v_K(x_t) + \epsilon}{v(x_t) + \epsilon}}

    with :math:`v` the mean square (of a layer norm: the variance) over all hidden units and :math:`v_K` that over those
    that stay. A norm divides by the size of what is there; so the student divides by what the teacher divided by, and
    units that are zero everywhere can go without a trace.

    Args:
        anatomy: The teacher's.
        batches: Calibration batches.
        hidden: Indices of the hidden units that stay.
    """
    sums: dict[str, Tensor] = {}

    def listener(name: str, norm: nn.Module) -> Listener:
        centred = isinstance(norm, nn.LayerNorm)
        eps = float(getattr(norm, "eps", getattr(norm, "variance_epsilon", 0.0)))

        def size(x: Tensor) -> Tensor:
            x = x - x.mean(-1, keepdim=True) if centred else x
            return x.square().mean(-1) + eps

        def note(weights: Tensor, given: Tensor, _: Tensor) -> None:
            given = widen(given)
            ratio = (size(given[..., hidden.to(given.device)]) / size(given).clamp(min=1e-30)).sqrt()
            total = torch.stack([(ratio * weights).sum(), weights.sum()]).double().cpu()
            sums[name] = sums.get(name, torch.zeros_like(total)) + total

        return note

    listeners = {name: listener(name, norm) for name, norm in hidden_norms(anatomy).items()}
    pass_through(anatomy.teacher, batches, listeners)
    return {name: float(total[0] / total[1]) for name, total in sums.items()}

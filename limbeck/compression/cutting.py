"""Builds a student and copies into it what stays of the teacher."""

from __future__ import annotations

import copy
from typing import Any

import torch

from limbeck.compression.anatomy import Anatomy
from limbeck.compression.layouts import index_of
from limbeck.compression.plan import Plan
from limbeck.compression.skeletons import fresh
from limbeck.compression.units import Kept
from limbeck.compression.vocabulary import renamed_tokens
from limbeck.core.errors import ModelError


@torch.no_grad()
def cut(anatomy: Anatomy, plan: Plan, kept: Kept, ratios: dict[str, float]) -> Any:
    """Build the student and copy what stays."""
    student = fresh(anatomy.teacher, plan.config(anatomy))
    if plan.tie is not None and tied(student) != plan.tie:
        way = "cannot tie" if plan.tie else "always ties"
        raise ModelError(f"{type(student).__name__} {way} its embeddings", where="tie", remedy="leave tie out")
    state = anatomy.teacher.state_dict()
    layouts = anatomy.layouts([*plan.sizes, *(["vocabulary"] if plan.words is not None else [])])
    groups = {
        tensor: group.reader
        for axis in ("heads", "ffn")
        if axis in plan.sizes
        for group in anatomy.groups(axis)
        for tensor in group.tensors
    }
    used = set()
    own = student.state_dict()
    targets = [*student.named_parameters(), *((n, t) for n, t in student.named_buffers() if n in own)]
    for name, target in targets:
        source = _source(anatomy, plan, name)
        used.add(source)
        value = state[source].detach()
        chosen = {axis: by.get("", by.get(groups.get(source, ""))) for axis, by in kept.items()}
        stays = {axis: units for axis, units in chosen.items() if units is not None}
        if plan.words is not None:
            stays["vocabulary"] = plan.words.kept
        for dim, layout in layouts.get(source, {}).items():
            value = value.index_select(dim, index_of(layout, stays, anatomy.sizes).to(value.device))
        owner, _, leaf = source.rpartition(".")
        if leaf == "weight" and owner in ratios:
            value = value * ratios[owner]
        if value.shape != target.shape:
            raise ModelError(
                f"{anatomy.kind!r} holds a tensor that does not fit after the cut",
                where=name,
                found=list(value.shape),
                wanted=list(target.shape),
                remedy="cut along fewer dimensions",
            )
        target.copy_(value)
    _check_all_used(anatomy, plan, used | {_source(anatomy, plan, name) for name in own})
    generation = getattr(anatomy.teacher, "generation_config", None)
    if generation is not None:
        student.generation_config = copy.deepcopy(generation)
        for name, value in {} if plan.words is None else renamed_tokens(generation, plan.words).items():
            setattr(student.generation_config, name, value)
    return student


def _source(anatomy: Anatomy, plan: Plan, name: str) -> str:
    """Which of the teacher's tensors a student's tensor is cut from."""
    place = anatomy.place(name)
    if place is not None:
        stack, layer, prefix, rest = place
        moved = f"{prefix}.{plan.layers[stack.field][layer]}.{rest}"
        # What only the first layer holds (relative positions of T5) stays in its place, whichever layer comes there.
        name = moved if moved in anatomy.shapes else name
    if name not in anatomy.shapes:
        raise ModelError(
            "layers of this teacher differ, so they cannot take each other's place",
            where=name,
            found="no such tensor in the teacher",
            remedy="name the layers so that those of one kind stay in their places",
        )
    return name


def _check_all_used(anatomy: Anatomy, plan: Plan, used: set[str]) -> None:
    """Nothing of a layer that stays may be lost."""
    for name in anatomy.shapes:
        place = anatomy.place(name)
        if place is not None and place[1] in plan.layers[place[0].field] and name not in used:
            raise ModelError(
                "layers of this teacher differ, so they cannot take each other's place",
                where=name,
                found="no place for it in the student",
                remedy="name the layers so that those of one kind stay in their places",
            )


def tied(model: Any) -> bool | None:
    """Whether output and input embeddings are one; ``None`` where there is no output over tokens."""
    output = model.get_output_embeddings()
    return None if output is None else output.weight is model.get_input_embeddings().weight

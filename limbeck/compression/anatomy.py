"""Which dimension of which tensor belongs to heads, feed-forward units, hidden units or tokens; where layers stand.

Little of it is written down: a skeleton is built from the configuration, another with one number doubled, and what
grew holds units of that kind. What shapes cannot tell stands in ``families``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from limbeck.compression.families import FIELDS, LAYERS, family_of
from limbeck.compression.layouts import Group, Layout, Layouts, Segment, Stack
from limbeck.compression.skeletons import check_teacher, configure, skeleton
from limbeck.core.errors import LimbeckError, ModelError

AXES = ("heads", "kv_heads", "hidden", "ffn", "vocabulary")


class Anatomy:
    """A transformers model as surgery sees it. Nothing runs.

    Args:
        teacher: A ``transformers.PreTrainedModel``.

    Raises:
        ModelError: No such model, or its weights are quantized.
    """

    def __init__(self, teacher: Any) -> None:
        check_teacher(teacher)
        self.teacher, self.config = teacher, teacher.config
        self.kind = str(self.config.model_type)
        self.family = family_of(self.kind)
        self.modules = dict(teacher.named_modules())
        self.shapes = {name: tuple(tensor.shape) for name, tensor in teacher.state_dict().items()}
        self._values = self.config.to_dict()
        self._known: dict[str, Layouts] = {}
        self._built: dict[str, dict[str, tuple[int, ...]]] = {}

    # Sizes ------------------------------------------------------------------------------------------------------------

    def field(self, axis: str) -> str | None:
        """What the configuration calls the size of an axis; ``None`` where it has no such number."""
        names = (self.config.attribute_map.get(name, name) for name in FIELDS[axis])
        found = next((name for name in names if name in self._values), None)
        return None if axis == "kv_heads" and found and self._values[found] is None else found

    def size(self, axis: str) -> int:
        """How many units the teacher has.

        Raises:
            ModelError: The configuration does not say.
        """
        name = self.field(axis)
        value = None if name is None else getattr(self.config, name)
        if value is None and axis == "ffn" and self.family.ffn_ratio is not None:
            value = self.family.ffn_ratio * self.size("hidden")
        if not isinstance(value, int):
            raise ModelError(
                f"the configuration of {self.kind!r} holds no one number for it",
                where=axis,
                wanted=f"one of {', '.join(FIELDS[axis])}",
                remedy=f"leave {axis} as it is",
            )
        return value

    @cached_property
    def sizes(self) -> dict[str, int]:
        """How many units the teacher has, of every axis that its configuration knows."""
        found = {}
        for axis in AXES:
            try:
                found[axis] = self.size(axis)
            except LimbeckError:
                continue
        return found

    @cached_property
    def head_dim(self) -> int:
        return getattr(self.config, "head_dim", None) or self.size("hidden") // self.size("heads")

    @cached_property
    def coupled(self) -> bool:
        """Heads are together as wide as the model, so that their number does not change alone."""
        return all(width != self.head_dim for *_, width in self._answers("heads"))

    def changes(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        """What to change in the configuration for other numbers of units."""
        found: dict[str, Any] = {}
        for axis, units in sizes.items():
            found[str(self.field(axis))] = units
            if axis == "hidden":
                follow = (name for name in self.family.hidden_fields if getattr(self.config, name) == self.size(axis))
                found |= dict.fromkeys(follow, units)
        # What the family would work out from numbers that change now is spelt out, unless a class forbids it.
        name = self.config.attribute_map.get("head_dim", "head_dim")
        apart = not isinstance(getattr(type(self.config), name, None), property)
        if {"heads", "hidden"} & sizes.keys() and apart and not self.coupled:
            found[name] = self.head_dim
        if "hidden" in sizes and "ffn" in self.sizes:
            found.setdefault(str(self.field("ffn")), self.sizes["ffn"])
        return found

    # Layers -----------------------------------------------------------------------------------------------------------

    @cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """Where layers stand: a skeleton with one layer more shows it.

        Raises:
            ModelError: They are not found.
        """
        found, values = [], self._values
        for name in dict.fromkeys(self.config.attribute_map.get(name, name) for name in LAYERS):
            depth = values.get(name)
            if not isinstance(depth, int) or depth < 1:
                continue
            longer = {key: [*listed, listed[-1]] for key, listed in self.layer_lists(depth).items()}
            grown = skeleton(self.teacher, configure(self.config, {name: depth + 1, **longer}))
            matches = (re.match(rf"(.+?)\.{depth}\.", tensor) for tensor in grown.keys() - self.shapes.keys())
            prefixes = tuple(sorted({match[1] for match in matches if match}))
            if prefixes:
                found.append(Stack(name, prefixes, depth))
        if not found:
            raise ModelError(
                f"no layers were found in {type(self.teacher).__name__}",
                where="teacher",
                wanted=f"a configuration with {' or '.join(LAYERS)}",
                remedy="of a model made of several, give the part that shall be cut",
            )
        return tuple(found)

    def layer_lists(self, depth: int) -> dict[str, list[Any]]:
        """What the configuration lists layer by layer, such as ``layer_types``."""
        return {k: v for k, v in self._values.items() if "layer" in k and isinstance(v, list) and len(v) == depth}

    def place(self, name: str) -> tuple[Stack, int, str, str] | None:
        """Stack, layer, prefix and the rest of a tensor's or module's name; ``None`` outside of layers."""
        for stack in self.stacks:
            for prefix in stack.prefixes:
                number, _, rest = name.removeprefix(f"{prefix}.").partition(".")
                if name.startswith(f"{prefix}.") and number.isdigit():
                    return stack, int(number), prefix, rest
        return None

    # Layouts ----------------------------------------------------------------------------------------------------------

    def layouts(self, axes: Sequence[str]) -> Layouts:
        """Of every tensor the dimensions that hold units of these axes.

        Raises:
            ModelError: This family's weights cannot be cut along one of them; the message names the tensor.
        """
        found: Layouts = {}
        for axis in axes:
            if axis not in self._known:
                self._known[axis] = self._find(axis)
            for name, dims in self._known[axis].items():
                found.setdefault(name, {}).update(dims)
        return found

    def _find(self, axis: str) -> Layouts:
        units = self.size(axis)
        if axis == "hidden" and not self.family.hidden:
            self._refuse(axis, self.family.why)
        if axis in ("heads", "hidden") and self.coupled and not self.family.outputs:
            self._refuse(axis, "it is not known which projections hold its heads")
        written = self._written()
        found: Layouts = {}
        for name, dims in written.items():
            for dim, layout in dims.items():
                if any(segment.axis == axis for segment in layout):
                    if sum(s.width * self.size(s.axis) for s in layout) != self.shapes[name][dim]:
                        self._refuse(axis, "what is written down about this family does not fit", name)
                    found.setdefault(name, {})[dim] = layout
        widths = {1, self.head_dim} if axis in ("heads", "kv_heads") else {1}
        for name, dim, width in self._answers(axis):
            if dim in written.get(name, {}):
                continue
            if width not in widths or self.shapes[name][dim] != units * width:
                self._refuse(axis, "its units are fused in a way that is not known", name)
            found.setdefault(name, {})[dim] = (Segment(axis, width),)
        if not found:
            self._refuse(axis, "no tensor depends on it")
        return found

    def _refuse(self, axis: str, why: str, tensor: str | None = None) -> None:
        raise ModelError(
            f"{self.kind!r} cannot be cut along {axis}: {why}",
            where=axis if tensor is None else tensor,
            found=None if tensor is None else f"shape {list(self.shapes[tensor])}",
            remedy=f"leave {axis} as it is and cut elsewhere",
        )

    def _written(self) -> Layouts:
        """The layouts of the family's row, by tensor."""
        found: Layouts = {}
        for name in self.shapes:
            owner, _, leaf = name.rpartition(".")
            for suffix, text in self.family.outputs.items():
                if owner.endswith(suffix) and leaf in ("weight", "bias"):
                    found.setdefault(name, {})[1 - self._takes(owner) if leaf == "weight" else 0] = self._layout(text)
            for suffix, text in self.family.inputs.items():
                if owner.endswith(suffix) and leaf == "weight":
                    found.setdefault(name, {})[self._takes(owner)] = self._layout(text)
        return found

    def _takes(self, module: str) -> int:
        """Which dimension of a module's weight is of its inputs: transformers' Conv1D has it first."""
        return 0 if type(self.modules[module]).__name__ == "Conv1D" else 1

    def _layout(self, text: str) -> Layout:
        segments = []
        for part in text.split():
            times, _, axis = part.rpartition("*")
            segments.append(Segment(axis, int(times or 1) * (1 if axis == "ffn" else self.head_dim)))
        return tuple(segments)

    def _answers(self, axis: str) -> list[tuple[str, int, int]]:
        """Tensors and dimensions that grow when an axis is doubled, and how wide a unit is; 0: no whole number."""
        units = self.size(axis)
        # All else is spelt out, so that nothing follows that need not. Families want the hidden size to be a multiple
        # of the number of heads, so it is doubled on both sides first.
        before = {str(self.field(other)): size for other, size in self.sizes.items()}
        name = self.config.attribute_map.get("head_dim", "head_dim")
        if "heads" in self.sizes and not isinstance(getattr(type(self.config), name, None), property):
            before[name] = self.head_dim
        follow = [str(self.field("hidden")), *self.family.hidden_fields]
        doubled = {key: 2 * self.size("hidden") for key in follow if getattr(self.config, key) == self.size("hidden")}
        if axis in ("heads", "kv_heads"):
            before |= doubled
        if axis == "kv_heads":
            before[str(self.field("heads"))] = 2 * self.size("heads")
        after = before | (doubled if axis == "hidden" else {str(self.field(axis)): 2 * units})
        first, second = self._skeleton(before), self._skeleton(after)
        found = []
        for tensor in first.keys() & second.keys() & self.shapes.keys():
            for dim, (old, new) in enumerate(zip(first[tensor], second[tensor], strict=True)):
                if old != new:
                    found.append((tensor, dim, 0 if (new - old) % units else (new - old) // units))
        return sorted(found)

    def _skeleton(self, changes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        key = repr(sorted(changes.items()))
        if key not in self._built:
            self._built[key] = skeleton(self.teacher, configure(self.config, changes))
        return self._built[key]

    # Groups -----------------------------------------------------------------------------------------------------------

    def groups(self, axis: str) -> list[Group]:
        """What is chosen together along ``heads`` (keys and values follow them) or ``ffn``, in the order of the model.

        Raises:
            ModelError: A tensor with such units stands in no layer, or in one where nothing reads them.
        """
        own = self.layouts([axis])
        owners = (name.removesuffix(".weight") for name in self.shapes if name in own and name.endswith(".weight"))
        linear = [owner for owner in owners if type(self.modules[owner]).__name__ in ("Linear", "Conv1D")]
        readers = [owner for owner in linear if self._takes(owner) in own[f"{owner}.weight"]]
        members: dict[str, list[str]] = {reader: [] for reader in readers}
        for tensor in self.layouts([axis, "kv_heads"] if axis == "heads" and self.field("kv_heads") else [axis]):
            here = self.place(tensor)
            near = [reader for reader in readers if here and (at := self.place(reader)) and at[:3] == here[:3]]
            if not near:
                self._refuse(axis, "a tensor with such units belongs to no layer, or nothing there reads them", tensor)
            members[max(near, key=lambda reader: _common(reader, tensor))].append(tensor)
        kinds: dict[str, set[frozenset[str]]] = {}
        found = []
        for reader, tensors in members.items():
            _, layer, prefix, rest = self.place(reader) or (None, 0, "", reader)
            kind = f"{prefix}.*.{rest}"
            kinds.setdefault(kind, set()).add(frozenset(t.removeprefix(f"{prefix}.{layer}.") for t in tensors))
            found.append(Group(axis, reader, tuple(tensors), kind))
        return [g if len(kinds[str(g.family)]) > 1 else Group(g.axis, g.reader, g.tensors) for g in found]


def _common(first: str, second: str) -> int:
    """How many steps two dotted names share from the start."""
    steps = zip(first.split("."), second.split("."), strict=False)
    return next((i for i, (a, b) in enumerate(steps) if a != b), min(first.count("."), second.count(".")) + 1)

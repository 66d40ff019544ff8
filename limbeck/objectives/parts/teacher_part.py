"""A part of the teacher that is run again, on what a student made."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import ConfigError
from limbeck.core.layout import to_map, to_tokens
from limbeck.core.trace import Trace
from limbeck.objectives.parts.frozen import run_frozen


class TeacherPart:
    """One module of the teacher: gradient flows through its weights to what it is given, never into them.

    Args:
        name: A dotted name or a role, such as ``layer4`` or ``blocks:-1``: a module that goes on from one tensor.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.taps = (f"{name}@in", name, f"{name}@module")
        self.given: dict[str, Any] = {}

    def setup(self, teacher: Trace, where: str) -> None:
        """Find what else the module wants, and try it once on the first of what entered it.

        An argument called ``input_dimensions`` is given height and width (Swin), any other ``None``.

        Args:
            teacher: Its trace, with ``taps``.
            where: Who asks, for errors.

        Raises:
            ConfigError: The name means several modules, or one that does not go on from one tensor.
        """
        module, entered = teacher[self.taps[2]], teacher[self.taps[0]]
        if not isinstance(module, nn.Module):
            raise ConfigError(
                "one module is wanted", where=where, found=f"{len(module)} of them", remedy=f"choose one: {self.name}:0"
            )
        grid = tuple(to_map(entered).shape[2:])
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        later = list(inspect.signature(module.forward).parameters.values())[1:]
        names = [p.name for p in later if p.default is p.empty and p.kind in kinds]
        self.given = {name: grid if name == "input_dimensions" else None for name in names}
        try:
            with torch.no_grad():
                self(teacher, to_map(entered)[:1])
        except Exception as error:  # whatever a stranger's module raises when it lacks something
            first = (str(error).strip().splitlines() or [""])[0][:160]
            raise ConfigError(
                f"this part of the teacher does not go on from one tensor: {type(error).__name__}: {first}",
                where=where,
                found=f"{self.name}, a {type(module).__name__}",
                remedy="name another part, or none",
            ) from error

    def __call__(self, teacher: Trace, feature: Tensor) -> Tensor:
        """What the part makes of a map ``[B, C, H, W]``, as a map; tokens go in where it takes tokens."""
        entering = feature if teacher[self.taps[0]].ndim == 4 else to_tokens(feature)
        return to_map(run_frozen(teacher[self.taps[2]], entering, **self.given))

"""Whether to compile the step: a rule that depends on the plan alone, so that a resumed run decides alike."""

from __future__ import annotations

import os
import shutil

import torch

from limbeck.core.errors import ConfigError


def should_compile(mode: str, *, device: str, steps: int) -> bool:
    """Whether the step is compiled."""
    return mode == "on"


def compiler_there(device: str) -> bool:
    """Whether code can be built for this device: the host's needs a C++ compiler, a GPU's comes with torch."""
    return (
        device != "cpu" or shutil.which(os.environ.get("CXX", "g++")) is not None or shutil.which("clang++") is not None
    )


def check_compiler(device: str) -> None:
    """Refuse to compile where nothing can.

    Raises:
        ConfigError: There is no compiler for this device.
    """
    if not compiler_there(device):
        raise ConfigError(
            "compiling for the CPU needs a C++ compiler, and none is found",
            where="compile",
            remedy="install g++, or set compile to off",
        )


def forget_compiled(distiller: torch.nn.Module) -> None:
    """Drop a stage's compiled code, so that the next stage's does not count as a rebuild of it."""
    distiller._compiled_call_impl = None
    torch.compiler.reset()

"""Whether to compile the step: a rule that depends on the plan alone, so that every rank and every run decides alike.

Compiling makes a step faster and costs time before the first one, more the more modules there are. On a CPU it pays
where there is enough to compute for each module that must be built; small models on small data are done before that.
The figure is half as much again as the highest break-even measured: three pairs of residual networks came to 35, 47
and 101 GFLOP a module (``benchmarks/compile_gain.py``, its output in ``benchmarks/results``). On accelerators steps are
short and many, and what a step saves is a matter of launches more than of operations, so their number decides; that
figure is not measured: it assumes that building takes a minute or two and that a step saves 20 ms.
"""

from __future__ import annotations

import os
import shutil

import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError
from limbeck.core.teacher import FrozenTeacher
from limbeck.engine.operations import estimate

CPU_FLOPS_PER_MODULE = 1.5e11
ACCELERATOR_STEPS = 5000


def should_compile(mode: str, *, device: str, steps: int, step_flops: float = 0.0, modules: int = 1) -> bool:
    """Whether the step is compiled.

    Args:
        mode: ``"on"``, ``"off"``, or ``"auto"``: where it pays.
        device: Type of the device.
        steps: Optimizer steps of the stage.
        step_flops: Floating-point operations of one step on one rank.
        modules: Modules without children that must be built.

    >>> should_compile("auto", device="cpu", steps=10_000, step_flops=1e6)
    False
    >>> should_compile("auto", device="cuda", steps=10_000)
    True
    """
    if mode != "auto":
        return mode == "on"
    if device == "cpu":
        return step_flops > 0 and steps * step_flops >= CPU_FLOPS_PER_MODULE * modules and compiler_there(device)
    return steps >= ACCELERATOR_STEPS


def work(distiller: Distiller, example: Batch, samples: float) -> tuple[float, int]:
    """Floating-point operations of a step (student forward and backward, teacher forward), and modules to build.

    A model that no term taps is not run, and does not count.

    Args:
        distiller: Set up.
        example: A small batch.
        samples: Samples of a step on one rank.
    """
    models: list[nn.Module] = [distiller.student] if distiller.loss.student_taps else []
    if isinstance(distiller.teacher, FrozenTeacher) and distiller.loss.teacher_taps:
        models.append(distiller.teacher.model)
    modules = sum(1 for model in models for m in model.modules() if next(m.children(), None) is None)
    return estimate(distiller, example, samples)[0], modules


def compiler_there(device: str) -> bool:
    """Whether code can be built for this device: the host needs a C++ compiler, for a GPU torch brings its own."""
    return device != "cpu" or any(shutil.which(c) for c in (os.environ.get("CXX", "g++"), "clang++"))


def compile_step(distiller: Distiller, device: str) -> None:
    """Compile the distiller in place.

    A teacher that looks its answers up instead of computing them says so (``looks_up``) and is asked outside of the
    graph: traced, it would break the graph many times and be built anew for every view.

    Raises:
        ConfigError: There is no compiler for this device.
    """
    if not compiler_there(device):
        raise ConfigError(
            "compiling for the CPU needs a C++ compiler, and none is found",
            where="compile",
            remedy="install g++, or set compile to off",
        )
    if getattr(distiller.teacher, "looks_up", False):
        distiller.__dict__["_teach"] = torch.compiler.disable(distiller._teach)
    distiller.compile(dynamic=False)


def forget_compiled(distiller: nn.Module) -> None:
    """Drop compiled code, so that the next stage's does not count as a rebuild of it."""
    if distiller._compiled_call_impl is not None:
        distiller._compiled_call_impl = None
        distiller.__dict__.pop("_teach", None)
        torch.compiler.reset()


def cannot_compile(error: BaseException) -> bool:
    """Whether an error is the compiler's own."""
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)

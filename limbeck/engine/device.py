"""Where a run computes: the device, the ranks, the precision; all of it accelerate's."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, GradientAccumulationPlugin, ProjectConfiguration

from limbeck.core.errors import ConfigError
from limbeck.engine.config import TrainConfig

_MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_SINGLE_OR_DDP = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_XPU", "MULTI_MLU", "MULTI_SDAA", "MULTI_MUSA")


def make_accelerator(config: TrainConfig, out: Path | None = None) -> Accelerator:
    """An accelerator as a run's settings want it. Ranks come from ``accelerate launch`` or ``torchrun``.

    Raises:
        ConfigError: The machine, the launcher or the installed packages do not offer what is asked for.

    >>> make_accelerator(TrainConfig(device="cpu")).device
    device(type='cpu')
    """
    # Where there is no accelerator, saying so lets accelerate see the ranks of torchrun too.
    cpu = config.device == "cpu" or not _has_accelerator()
    _forget_other_settings(cpu, _MIXED[config.precision])
    for tracker in config.trackers:
        known = [str(t) for t in get_available_trackers()]
        if tracker not in known:
            raise ConfigError(
                "this tracker is not installed",
                where="trackers",
                found=repr(tracker),
                wanted=f"one of {', '.join(known)}",
            )
    if config.trackers and out is None:
        raise ConfigError("trackers write into the run's folder, and there is none", where="out", remedy="give out")
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=_MIXED[config.precision],
        log_with=config.trackers or None,
        project_config=ProjectConfiguration(logging_dir=str(out / "trackers") if out is not None else None),
        # Micro-batches are weighed by what they count; accelerate must not divide the loss once more.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    if accelerator.distributed_type.name not in _SINGLE_OR_DDP:
        raise ConfigError(
            "limbeck trains in one process or with DDP",
            where="accelerate launch",
            found=accelerator.distributed_type.value,
            remedy="launch with --multi_gpu, or with --cpu --num_processes N",
        )
    if config.precision == "fp16" and accelerator.scaler is None:
        raise ConfigError(
            "fp16 needs a GPU", where="precision", found=f"device {accelerator.device.type}", remedy="use bf16 or fp32"
        )
    return accelerator


def _forget_other_settings(cpu: bool, mixed: str) -> None:
    """Accelerate keeps one precision for the whole process; a second run may want another."""
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    known = AcceleratorState._shared_state
    if not known or not alone:
        if known and known.get("_mixed_precision") != mixed:
            AcceleratorState._reset_state()
        return
    on_cpu = PartialState().device.type == "cpu"
    if known.get("_mixed_precision") != mixed or (cpu and not on_cpu) or (on_cpu and not cpu and _has_accelerator()):
        AcceleratorState._reset_state(reset_partial_state=True)


def _has_accelerator() -> bool:
    return torch.accelerator.is_available()


def wait_for_everyone() -> None:
    """Go on when every process of a distributed run has come here."""
    PartialState().wait_for_everyone()


def is_distributed(accelerator: Accelerator) -> bool:
    """Whether several processes train together."""
    return accelerator.distributed_type != DistributedType.NO and accelerator.num_processes > 1


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Only operations that repeat, for as long as this lasts."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the GPU is first used
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = benchmark


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as trackers take them: one level, numbers and texts."""
    return {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in settings.items() if v is not None}

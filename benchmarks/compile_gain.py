"""Seconds a KD step takes eagerly and compiled, and after how many steps the time to compile is earned back.

Student resnet20 and teacher resnet56 on images of 32 x 32 pixels, or others; steps of both kinds alternate. The rule
behind ``compile: auto`` rests on this. Run: ``python benchmarks/compile_gain.py [--student resnet8 --teacher resnet14
--size 8] [--batch 64] [--steps 8] [--precision bf16]``. The table goes to stderr, one line of JSON to stdout.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import time

import torch
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.engine import TrainConfig
from limbeck.engine.compiling import work
from limbeck.engine.device import make_accelerator
from limbeck.engine.step import Step
from limbeck.models import create
from limbeck.objectives import KD, CrossEntropy


def wait(device: torch.device) -> None:
    """Accelerators answer before they are done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def make(config: TrainConfig, student: nn.Module, teacher: nn.Module, batch: Batch, compiled: bool) -> Step:
    """A step of its own, on models of its own."""
    accelerator = make_accelerator(config)
    distiller = Distiller(copy.deepcopy(student), CrossEntropy() + 0.9 * KD(), copy.deepcopy(teacher))
    distiller.to(accelerator.device).setup(batch)
    if compiled:
        distiller.compile(dynamic=False)
    return Step(accelerator, distiller, distiller, config, total=1000)


def timed(step: Step, batch: Batch, number: int) -> float:
    """Seconds of one step."""
    wait(step.device)
    start = time.perf_counter()
    step([batch], number)
    wait(step.device)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu"])
    parser.add_argument("--student", default="resnet20")
    parser.add_argument("--teacher", default="resnet56")
    parser.add_argument("--size", type=int, default=32, help="pixels of a side")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8, help="of each kind")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--channels-last", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    config = TrainConfig(
        steps=1000, device=options.device, precision=options.precision, channels_last=options.channels_last
    )
    device = make_accelerator(config).device
    student, teacher = (create(name, num_classes=10) for name in (options.student, options.teacher))
    if options.channels_last:
        student, teacher = (m.to(memory_format=torch.channels_last) for m in (student, teacher))
    batch = Batch(torch.randn(options.batch, 3, options.size, options.size), torch.arange(options.batch) % 10).to(
        device
    )
    eager, compiled = (make(config, student, teacher, batch, c) for c in (False, True))
    first = {"eager": timed(eager, batch, 0), "compiled": timed(compiled, batch, 0)}
    times: dict[str, list[float]] = {"eager": [], "compiled": []}
    for number in range(1, options.steps + 1):
        times["eager"].append(timed(eager, batch, number))
        times["compiled"].append(timed(compiled, batch, number))
    step = {name: statistics.median(values) for name, values in times.items()}
    building = first["compiled"] - step["compiled"]
    saved = step["eager"] - step["compiled"]
    operations, modules = work(eager.distiller, batch, options.batch)
    result = {
        "benchmark": "compile_gain",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "student": options.student,
        "teacher": options.teacher,
        "size": options.size,
        "batch": options.batch,
        "precision": options.precision,
        "channels_last": options.channels_last,
        "steps": options.steps,
        "eager_s": round(step["eager"], 4),
        "compiled_s": round(step["compiled"], 4),
        "ratio": round(step["compiled"] / step["eager"], 3),
        "building_s": round(building, 1),
        "pays_after_steps": round(building / saved) if saved > 0 else None,
        "step_gflop": round(operations / 1e9, 3),
        "modules": modules,
        "pays_after_gflop_per_module": round(building / saved * operations / modules / 1e9, 2) if saved > 0 else None,
    }
    print(json.dumps(result))
    print(f"{'':10} {'s a step':>10}", file=sys.stderr)
    for name, seconds in step.items():
        print(f"{name:10} {seconds:10.4f}", file=sys.stderr)
    earned = f"earned back after {result['pays_after_steps']} steps" if saved > 0 else "never earned back"
    print(f"ratio {result['ratio']}; building takes {result['building_s']} s, {earned}", file=sys.stderr)


if __name__ == "__main__":
    main()

"""What a KD step of limbeck costs over a bare hand-written PyTorch loop that does the same work.

Student resnet20, teacher resnet56, images of 32 x 32 pixels, SGD with momentum, a cosine schedule, the mean loss and
accuracy kept. limbeck's side is ``fit`` as shipped, with its log, its progress, its watch for bad numbers and a folder;
the bare side has none of these. Steps of both alternate, so that a busy machine slows both, and the median of the
ratios of neighbours is told. Memory is the peak of each side in a process of its own, over what it had before the first
step. Taps: a forward of the student through a listener that was asked for nothing but logits, over a plain forward.

Run: ``python benchmarks/step_overhead.py [--device cuda] [--batch 128] [--steps 15] [--compile]``. The table goes to
stderr, one line of JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.taps import Listener
from limbeck.data.loader import Loader
from limbeck.data.resident import ResidentLoader
from limbeck.engine import Stage, TrainConfig, fit
from limbeck.models import create
from limbeck.objectives import KD, CrossEntropy

WARM = 2  # steps of each side that are not counted


class Bare:
    """The loop one writes by hand: one call is one step."""

    def __init__(self, student: nn.Module, teacher: nn.Module, total: int) -> None:
        self.student, self.teacher = student.train(), teacher.eval()
        # The same fused step as limbeck's, and the same rule that biases and norms do not decay.
        groups = [
            {"params": [p for p in student.parameters() if p.ndim > 1], "weight_decay": 5e-4},
            {"params": [p for p in student.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, fused=True)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, total)
        self.loss: Tensor | float = 0.0
        self.correct: Tensor | int = 0

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            teacher = self.teacher(images)
        student = self.student(images)
        soft = F.kl_div(
            F.log_softmax(student / 4.0, dim=1),
            F.log_softmax(teacher / 4.0, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        loss = 0.1 * F.cross_entropy(student, labels) + 0.9 * 16.0 * soft
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.loss = self.loss + loss.detach()
        self.correct = self.correct + (student.detach().argmax(1) == labels).sum()


class Watched(Loader):
    """A loader that is told when each step begins and ends, from within ``fit``."""

    def __init__(self, inner: ResidentLoader, between: Callable[[Batch, float], None], device: torch.device) -> None:
        self.inner, self.between, self.device = inner, between, device
        self.batch_size, self.samples, self.labels = inner.batch_size, inner.samples, inner.labels
        self.classes, self.class_names, self.seed = inner.classes, inner.class_names, inner.seed

    @property
    def steps_per_epoch(self) -> int:
        return self.inner.steps_per_epoch

    def example(self, size: int = 2) -> Batch:
        return self.inner.example(size)

    def describe(self) -> dict[str, Any]:
        return self.inner.describe()

    def epoch(self, epoch: int, **place: Any) -> Iterator[list[Batch]]:
        for parts in self.inner.epoch(epoch, **place):
            wait(self.device)
            start = time.perf_counter()
            yield parts  # limbeck's step, and all that comes with it
            wait(self.device)
            self.between(parts[0], time.perf_counter() - start)


def wait(device: torch.device) -> None:
    """Accelerators answer before they are done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def models(device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Student and teacher, always the same."""
    torch.manual_seed(0)
    return create("resnet20", num_classes=10).to(device), create("resnet56", num_classes=10).to(device)


def loader(batch: int, steps: int, device: torch.device) -> ResidentLoader:
    """As many batches as there are steps."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch * steps, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 10, (batch * steps,), generator=generator)
    return ResidentLoader(images, labels, batch_size=batch, device=device)


def train(data: Loader, steps: int, device: torch.device, compiled: bool) -> None:
    """limbeck's side."""
    student, teacher = models(device)
    distiller = Distiller(student, 0.1 * CrossEntropy() + 0.9 * KD(temperature=4.0), teacher)
    wanted = "cpu" if device.type == "cpu" else "auto"
    config = TrainConfig(steps=steps, device=wanted, compile="on" if compiled else "off", log_every=5)
    with tempfile.TemporaryDirectory() as folder:
        fit([Stage("kd", distiller, config)], data, out=folder, quiet=True)


def ratios(batch: int, steps: int, device: torch.device, compiled: bool) -> dict[str, float]:
    """Times of both sides, step by step in turn."""
    bare = Bare(*models(device), total=steps)
    pairs: list[tuple[float, float]] = []

    def between(part: Batch, ours: float) -> None:
        start = time.perf_counter()
        assert part.labels is not None
        bare(part.inputs, part.labels)
        wait(device)
        pairs.append((ours, time.perf_counter() - start))

    # The last step is followed by the end of the training, which is no step's cost: it is not among the pairs.
    train(Watched(loader(batch, steps, device), between, device), steps, device, compiled)
    counted = pairs[WARM:]
    return {
        "limbeck_s": round(statistics.median(a for a, _ in counted), 4),
        "bare_s": round(statistics.median(b for _, b in counted), 4),
        "ratio": round(statistics.median(a / b for a, b in counted), 4),
        "pairs": len(counted),
    }


def taps_off(device: torch.device, rounds: int = 60) -> float:
    """A forward through a listener without taps, over a plain one; a small batch, where a cost would show."""
    student, _ = models(device)
    student.eval()
    images = torch.randn(4, 3, 32, 32, device=device)
    listener = Listener(student, ["logits"])
    found = []
    with torch.no_grad():
        for number in range(rounds):
            times = {}
            sides: list[tuple[str, Callable[[Tensor], Any]]] = [("plain", student), ("listener", listener)]
            for name, call in sides if number % 2 else sides[::-1]:
                wait(device)
                start = time.perf_counter()
                call(images)
                wait(device)
                times[name] = time.perf_counter() - start
            found.append(times["listener"] / times["plain"])
    return round(statistics.median(found[5:]), 4)


def peak(side: str, batch: int, device: torch.device) -> int:
    """Bytes of the peak over what was there before the first step, in this process."""
    steps = 4
    data = loader(batch, steps, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        before = resident()
    if side == "limbeck":
        # A first step on a tiny batch brings in every module, so that code is not counted as memory of the step.
        train(loader(2, 2, device), 2, device, compiled=False)
        before = resident() if device.type == "cpu" else before
        train(data, steps, device, compiled=False)
    else:
        warm = Bare(*models(device), total=2)
        for small in loader(2, 2, device).batches():
            assert small.labels is not None
            warm(small.inputs, small.labels)
        del warm
        before = resident() if device.type == "cpu" else before
        bare = Bare(*models(device), total=steps)
        for part in data.batches():
            assert part.labels is not None
            bare(part.inputs, part.labels)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) - before
    with open("/proc/self/status") as file:
        highest = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    return highest * 1024 - before


def resident() -> int:
    """Bytes of this process in main memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peaks(batch: int, device: str) -> dict[str, int]:
    """Peaks of both sides, each in a fresh process whose memory goes back to the system as soon as it is free."""
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_TOP_PAD_": "0",
    }
    found = {}
    for side in ("limbeck", "bare"):
        command = [sys.executable, __file__, "--peak", side, "--batch", str(batch), "--device", device]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found[side] = int(done.stdout)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=15, help="of each side")
    parser.add_argument("--compile", action="store_true", help="also with limbeck compiled, which takes minutes")
    parser.add_argument("--peak", choices=["limbeck", "bare"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.peak:
        print(peak(options.peak, options.batch, device))
        return
    eager = ratios(options.batch, options.steps + WARM + 1, device, compiled=False)
    compiled = ratios(options.batch, options.steps + WARM + 1, device, compiled=True) if options.compile else None
    memory = peaks(options.batch, options.device)
    result = {
        "benchmark": "step_overhead",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "batch": options.batch,
        "eager": eager,
        "compiled": compiled,
        "memory_mb": {side: round(value / 2**20, 1) for side, value in memory.items()},
        "memory_ratio": round(memory["limbeck"] / memory["bare"], 4),
        "taps_off_ratio": taps_off(device),
    }
    print(json.dumps(result))
    rows = [("eager step", eager["ratio"], "<= 1.03"), ("peak memory", result["memory_ratio"], "<= 1.02")]
    rows += [("compiled step", compiled["ratio"], "< 1")] if compiled else []
    rows += [("forward without taps", result["taps_off_ratio"], "1")]
    print(f"{'limbeck / bare loop':24} {'ratio':>8}   wanted", file=sys.stderr)
    for name, ratio, wanted in rows:
        print(f"{name:24} {ratio:8.4f}   {wanted}", file=sys.stderr)


if __name__ == "__main__":
    main()

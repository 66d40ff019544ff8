"""Peak memory and time of the fused language losses, forward and backward, against plain PyTorch on full logits.

Sides, all from last hidden states and heads, with gradients by the student's hidden states and head:

* ``sparse``: ``linear_sparse_divergence`` from a teacher's top k and tail;
* ``dense``: ``linear_divergence`` from the teacher's hidden states and head;
* ``plain``: both heads' full logits, ``log_softmax``, the divergence, autograd; the bound of both fused ones;
* ``plain_sparse``: the student's full logits, ``log_softmax``, top k and tail gathered, autograd; it has no product
  with the teacher's head either, and so tells what fusing alone gains;
* with Liger Kernel on a GPU, where it is installed, and ``--divergence jsd``: ``liger`` (its Triton loss) and
  ``liger_chunked`` (its compiled one), which like ``dense`` multiply with the teacher's head.

The arithmetic bound is the three products with the student's head (six floating-point operations for each of tokens,
words and width), timed by themselves in the same rounds; with a dense teacher there are four.

Peaks are over what was there before the call, each in a process of its own after a warm-up on few tokens, gradients
included. Times alternate, so that a busy machine slows all sides, and the medians of ratios within a round are told; on
the CPU it is the process's own time, in which waiting for others does not count.

Run: ``python benchmarks/fused_losses.py [--tokens 4096] [--vocabulary 32000] [--width 256] [--dtype float32]
[--device cuda] [--divergence jsd] [--write]``; as Liger publishes it: ``--device cuda --dtype bfloat16 --tokens 8192
--vocabulary 128256 --width 4096 --divergence jsd``. The table goes to stderr, one line of JSON to stdout; ``--write``
keeps it in benchmarks/results.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.top_k import TopK
from limbeck.kernels import linear_divergence, linear_sparse_divergence

RESULT = Path(__file__).parent / "results" / "fused_losses.json"
FEW = 64  # tokens of a warm-up
Side = Callable[[], None]


class Case:
    """Hidden states, heads and the sides that use them."""

    def __init__(self, options: argparse.Namespace, tokens: int) -> None:
        device, dtype = torch.device(options.device), getattr(torch, options.dtype)
        generator = torch.Generator(device).manual_seed(0)

        def normal(rows: int, scale: float) -> Tensor:
            values = torch.randn(rows, options.width, device=device, generator=generator, dtype=torch.float32)
            return values.mul_(scale).to(dtype)

        spread = options.width**-0.5  # logits of a standard deviation of 3
        self.divergence = options.divergence
        self.hidden, self.weight = normal(tokens, 1.0), normal(options.vocabulary, 3 * spread)
        self.teacher_hidden, self.teacher_weight = normal(tokens, 1.0), normal(options.vocabulary, 3 * spread)
        parts = [
            TopK.of(self.teacher_hidden[start : start + FEW] @ self.teacher_weight.t(), options.k)
            for start in range(0, tokens, FEW)
        ]
        self.top = TopK(*(torch.cat(column) for column in list(zip(*parts, strict=True))[:3]), options.vocabulary)
        self.labels = torch.zeros(tokens, dtype=torch.int64, device=device)
        self.hidden.requires_grad_()
        self.weight.requires_grad_()
        self.sides: dict[str, Callable[[], Tensor]] = {
            "sparse": self.sparse,
            "dense": self.dense,
            "plain": self.plain,
            "plain_sparse": self.plain_sparse,
        }
        if options.liger:
            self.sides |= self.liger()

    def side(self, name: str) -> Side:
        """Forward and backward of one side, from gradients that are not there to such that are."""

        def step() -> None:
            self.hidden.grad = self.weight.grad = None
            self.sides[name]().backward()

        return step

    def products(self) -> None:
        """The arithmetic that no side gets around: logits, and both gradients, in chunks of tokens."""
        with torch.no_grad():
            for start in range(0, len(self.hidden), 1024):
                states = self.hidden[start : start + 1024]
                logits = states @ self.weight.t()
                torch.mm(logits, self.weight)
                torch.mm(logits.t(), states)

    def sparse(self) -> Tensor:
        return linear_sparse_divergence(self.hidden, self.weight, self.top, divergence=self.divergence).total

    def dense(self) -> Tensor:
        return linear_divergence(
            self.hidden, self.weight, self.teacher_hidden, self.teacher_weight, divergence=self.divergence
        ).total

    def plain(self) -> Tensor:
        log_q = F.log_softmax((self.hidden @ self.weight.t()).float(), dim=-1)
        with torch.no_grad():
            log_p = F.log_softmax((self.teacher_hidden @ self.teacher_weight.t()).float(), dim=-1)
        return self.between(log_p, log_q)

    def plain_sparse(self) -> Tensor:
        log_q = F.log_softmax((self.hidden @ self.weight.t()).float(), dim=-1)
        kept = log_q.gather(-1, self.top.ids)
        tail = torch.log1p(-kept.exp().sum(dim=-1, keepdim=True).clamp(max=1 - 1e-6))
        log_p = torch.cat([self.top.log_probs, self.top.log_tail.unsqueeze(-1)], dim=-1)
        return self.between(log_p, torch.cat([kept, tail], dim=-1))

    def between(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """Mean over tokens, as one writes it."""
        if self.divergence == "forward_kl":
            return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        log_m = (0.5 * log_p.exp() + 0.5 * log_q.exp()).log()
        halves = [F.kl_div(log_m, log, reduction="batchmean", log_target=True) for log in (log_p, log_q)]
        return 0.5 * halves[0] + 0.5 * halves[1]

    def liger(self) -> dict[str, Callable[[], Tensor]]:
        """Liger's two."""
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
        from liger_kernel.transformers import LigerFusedLinearJSD

        fused, chunked = LigerFusedLinearJSD(), LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0)
        heads = (self.hidden, self.weight, self.teacher_hidden, self.teacher_weight)
        return {
            "liger": lambda: fused(*heads, None),
            "liger_chunked": lambda: chunked(*heads, self.labels, None, None),
        }


def wait(device: str) -> None:
    """Accelerators answer before they are done."""
    if device != "cpu":
        torch.accelerator.synchronize()


def seconds(step: Side, device: str) -> float:
    """Of one step."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    wait(device)
    start = clock()
    step()
    wait(device)
    return clock() - start


def peak(options: argparse.Namespace) -> int:
    """Bytes that one side holds at most over what was there before, in this process."""
    Case(options, FEW).side(options.side)()
    case = Case(options, options.tokens)
    step = case.side(options.side)
    if options.device != "cpu":
        wait(options.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        wait(options.device)
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = status("VmRSS")
    step()
    return status("VmHWM") - before


def status(name: str) -> int:
    """Bytes, as the system counts this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def peaks(options: argparse.Namespace, sides: list[str]) -> dict[str, int]:
    """Each in a fresh process, whose memory goes back to the system as soon as it is free."""
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_TOP_PAD_": "0",
    }
    found = {}
    for side in sides:
        command = [sys.executable, __file__, "--side", side]
        for name in ("tokens", "vocabulary", "width", "dtype", "device", "divergence", "k"):
            command += [f"--{name}", str(getattr(options, name))]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found[side] = int(done.stdout.split()[-1])
    return found


def times(options: argparse.Namespace, sides: list[str]) -> dict[str, list[float]]:
    """Seconds of each side in each round, and of the bare products; the order turns around with every round."""
    case = Case(options, options.tokens)
    steps: dict[str, Side] = {name: case.side(name) for name in sides} | {"products": case.products}
    for step in steps.values():
        step()
    found: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.rounds):
        for name in list(steps)[:: 1 if number % 2 else -1]:
            found[name].append(seconds(steps[name], options.device))
    return found


def ratio(found: dict[str, list[float]], first: str, second: str) -> float:
    """Median of the ratios within a round."""
    return round(statistics.median(a / b for a, b in zip(found[first], found[second], strict=True)), 3)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--divergence", default="forward_kl", choices=["forward_kl", "jsd"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--side", default="all", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.liger = options.device != "cpu" and options.divergence == "jsd" and find_spec("liger_kernel") is not None
    if options.side != "all":
        print(peak(options))
        return
    sides = ["sparse", "dense", "plain", "plain_sparse"] + ["liger", "liger_chunked"] * options.liger
    memory, found = peaks(options, sides), times(options, sides)
    middle = {name: statistics.median(values) for name, values in found.items()}
    item = getattr(torch, options.dtype).itemsize
    facts: dict[str, Any] = {
        "benchmark": "fused_losses",
        "bound": "plain PyTorch on full logits; for the time also the three products with the student's head",
        "device": "cpu" if options.device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "busy": round(os.getloadavg()[0], 1),  # processes that ran beside it, this one included
        "torch": torch.__version__,
        "liger": version("liger_kernel") if options.liger else None,
        "system": f"{platform.system()} {platform.machine()}",
        **{name: getattr(options, name) for name in ("tokens", "vocabulary", "width", "k", "dtype", "divergence")},
        "rounds": options.rounds,
        # What the student's side brings along, which Liger counts in; a dense teacher brings as much again.
        "inputs_mb": round((options.tokens + options.vocabulary) * options.width * item / 2**20, 1),
        "peak_mb": {name: round(value / 2**20, 1) for name, value in memory.items()},
        "seconds": {name: round(value, 4) for name, value in middle.items()},
        "memory_ratio": {name: round(memory[name] / memory["plain"], 4) for name in sides},
        "time_ratio": {name: ratio(found, name, "plain") for name in sides},
        "over_products": {name: ratio(found, name, "products") for name in sides},
        "fused_over_plain_sparse": {
            "memory": round(memory["sparse"] / memory["plain_sparse"], 4),
            "time": ratio(found, "sparse", "plain_sparse"),
        },
    }
    print(json.dumps(facts))
    print(f"{'':14} {'peak MiB':>9} {'/ plain':>8} {'seconds':>9} {'/ plain':>8} {'/ products':>10}", file=sys.stderr)
    for name in sides:
        print(
            f"{name:14} {facts['peak_mb'][name]:9.1f} {facts['memory_ratio'][name]:8.4f} {middle[name]:9.4f} "
            f"{facts['time_ratio'][name]:8.3f} {facts['over_products'][name]:10.3f}",
            file=sys.stderr,
        )
    print("wanted on the CPU: sparse <= 0.1250 of the memory and <= 1 of the time", file=sys.stderr)
    if options.write:
        known = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
        place = " ".join(str(facts[n]) for n in ("device", "dtype", "tokens", "vocabulary", "width", "divergence"))
        RESULT.write_text(json.dumps({**known, place: facts}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Rows a second that go into a cache of a teacher's answers and come out of it, over plain files of the same bytes.

Logits in half precision, of 10 and of 1000 classes. The teacher looks its answers up, so that what is timed is the
cache: making batches, fingerprints, encoding, what the codec lost, digests, files, and reading them back.

============== =====================================================================================================
what           its bound, measured in turn with it
============== =====================================================================================================
build          the same bytes written to one plain file, with fsync
check          the same bytes hashed from a memory map (blake2b), all of them
sequential     batches of rows in order: the same slices of a memory-mapped tensor, made float32
random         batches of rows anywhere in the cache: the same rows of that tensor by ``index_select``
in memory      batches of a ``CachedTeacher`` that holds a view, every sample's fingerprint looked at: ``index_select``
               from a tensor in memory
============== =====================================================================================================

All sides take turns; told are medians of times, and of the ratios of one round's. Files are in the page cache.

Run: ``python benchmarks/cache_rates.py [--samples 20000] [--views 2] [--folder FOLDER]``. The table goes to
stderr, one line of JSON to stdout; ``--write`` keeps it in benchmarks/results.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.cache.build import build
from limbeck.cache.folder import Cache
from limbeck.core.batch import Batch
from limbeck.core.trace import Trace
from limbeck.data import ResidentLoader
from limbeck.teachers.cached import CachedTeacher

RESULT = Path(__file__).parent / "results" / "cache_rates.json"
WIDTH = 64  # features of a sample


class Table:
    """A teacher that looks up what it says."""

    def __init__(self, answers: Tensor) -> None:
        self.answers = answers

    def attach(self, taps: tuple[str, ...], batch: Batch) -> None:
        """It has nothing but logits."""

    def __call__(self, batch: Batch) -> Trace:
        return Trace(None, {"logits": self.answers[batch.require("index")]})

    def to(self, device: torch.device | str) -> Table:
        return self


def seconds(work: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turn(pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]], rounds: int, rows: dict[str, int]) -> Any:
    """Each side and its bound, in turn; the first round is not counted."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in pairs}
    for number in range(rounds + 1):
        for name, (side, bound) in pairs.items():
            first, second = (side, bound) if number % 2 else (bound, side)
            one, other = seconds(first), seconds(second)
            found[name].append((one, other) if number % 2 else (other, one))
    told = {}
    for name, times in found.items():
        own, bound = (statistics.median(column) for column in zip(*times[1:], strict=True))
        told[name] = {
            "rows_per_s": round(rows[name] / own),
            "bound_rows_per_s": round(rows[name] / bound),
            "ratio": round(statistics.median(a / b for a, b in times[1:]), 3),
        }
    return told


def plain(path: Path, content: bytes) -> None:
    """A file, written through to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def measure(classes: int, samples: int, views: int, batch: int, rounds: int, folder: Path) -> dict[str, Any]:
    """One kind of answers."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, WIDTH, generator=generator)
    answers = torch.randn(samples, classes, generator=generator) * 4
    loader = ResidentLoader(inputs, batch_size=batch)
    numbers = iter(range(10**6))

    def made() -> Cache | None:
        return build(Table(answers), loader, folder / f"{classes}-{next(numbers)}", views=views, batch=batch)

    cache = made()
    assert cache is not None
    cache.check()
    rows = samples * views
    mapped_file = folder / f"{classes}.bin"
    stored = answers.half().repeat(views, 1)
    plain(mapped_file, stored.view(torch.uint8).numpy().tobytes())
    mapped = torch.from_file(str(mapped_file), size=rows * classes, dtype=torch.float16).view(rows, classes)
    content = bytes(cache.bytes)
    order = torch.arange(rows)
    anywhere = torch.randperm(rows, generator=generator)[: min(rows, 100 * batch)]
    batches = {"sequential": order[: len(anywhere)].split(batch), "random": anywhere.split(batch)}
    teacher = CachedTeacher(cache)
    (example,) = loader.read([[(torch.arange(2), 0)]])
    teacher.attach(("logits",), example)
    shown = [next(loader.read([[(index % samples, 0)]])) for index in batches["random"]]
    held = stored[:samples].float()

    def read(kind: str) -> Callable[[], None]:
        def work() -> None:
            for own in batches[kind]:
                cache.read(own % samples, own // samples)

        return work

    def sliced() -> None:
        for own in batches["sequential"]:
            mapped[int(own[0]) : int(own[-1]) + 1].float()

    def picked() -> None:
        for own in batches["random"]:
            mapped.index_select(0, own).float()

    def asked() -> None:
        for one in shown:
            teacher(one)

    def selected() -> None:
        for one in shown:
            held.index_select(0, one.require("index"))

    told = in_turn(
        {
            "build": (made, lambda: plain(folder / f"{classes}.plain", content)),
            "check": (
                lambda: Cache(cache.folder).check(),
                lambda: hashlib.blake2b(mapped.view(torch.uint8).numpy().data).digest(),
            ),
        },
        max(2, rounds // 2),
        {"build": rows, "check": rows},
    )
    told |= in_turn(
        {
            "sequential": (read("sequential"), sliced),
            "random": (read("random"), picked),
            "in memory": (asked, selected),
        },
        rounds,
        {"sequential": len(anywhere), "random": len(anywhere), "in memory": len(anywhere)},
    )
    return {"bytes_a_row": round(cache.bytes / rows, 2), "raw_bytes_a_row": 2 * classes, **told}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default a temporary one")
    parser.add_argument("--write", action="store_true", help=f"also write {RESULT}")
    options = parser.parse_args()
    found = {}
    for classes in (10, 1000):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            found[f"{classes} classes"] = measure(
                classes, options.samples, options.views, options.batch, options.rounds, Path(folder)
            )
    result = {
        "benchmark": "cache_rates",
        "bound": "plain files and tensors of the same bytes; see the script",
        "device": f"CPU, {torch.get_num_threads()} threads",
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "samples": options.samples,
        "views": options.views,
        "batch": options.batch,
        "codec": "raw float16",
        "kinds": found,
    }
    print(json.dumps(result))
    print(f"{'rows a second':24} {'cache':>12} {'bound':>12} {'time ratio':>12}", file=sys.stderr)
    for kind, told in found.items():
        print(f"{kind}: {told['bytes_a_row']} bytes a row, {told['raw_bytes_a_row']} without anything", file=sys.stderr)
        for name, each in told.items():
            if isinstance(each, dict):
                print(
                    f"  {name:22} {each['rows_per_s']:12,} {each['bound_rows_per_s']:12,} {each['ratio']:12.2f}",
                    file=sys.stderr,
                )
    if options.write:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""An epoch of a resnet20 with a cached resnet56 teacher, over the same epoch without a teacher, and over others.

CIFAR-10 in JPEG, padded, cropped and flipped; SGD with momentum, a cosine schedule. limbeck's sides are ``fit`` as
shipped, with its log, its progress, its watch for bad numbers and a folder; the peers' loops are those of
``peer_loops.py``. A turn is a whole step, the making of its batch included. The sides take turns in one process, in a
new random order each round, every ``fit`` in a thread of its own that waits while it is not its turn: so a busy machine
slows all of them. Told are the medians of the ratios of one round's turns with the interval of each, of wall time and
of processor time, which a busy machine changes least. All share one heap (see ``turns.py``). Peers take their turns
apart from what has to be told precisely.

========== =========================================================================================================
setting    what is read
========== =========================================================================================================
resident   pixels in memory
jpeg       every image decoded whenever it is wanted, in the training process
worker     the same in one worker process; sides alternate by blocks of steps, and only wall time is told
photos     the same pixels stored as JPEG of 256 x 256, decoded and resized whenever wanted: decoding costs as on photos
========== =========================================================================================================

Bounds: a cached teacher adds no arithmetic of a model, so 1 is the bound of ``cached`` over ``no_teacher``. Where
images are decoded, four views of a decode save three of four decodes and nothing else: the bound is (t - d + d') / t
with the no-teacher step t and the loader's own time d and d' with one and with four views a read, measured between the
turns.
``bare`` is forward, backward and update by hand on a batch that is there: what is left of a step are its data.

Run: ``python benchmarks/cached_epoch.py [--batch 32] [--steps 60] [--settings resident,jpeg] [--cache FOLDER]``. The
table goes to stderr, one line of JSON to stdout; ``--write`` keeps it in benchmarks/results.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from peer_loops import installed, mdistiller_style, torchdistill_style
from PIL import Image
from scipy.stats import binom
from torch import Tensor, nn
from turns import ONE_HEAP, WARM, Training, Turn, Turns, in_one_heap, in_turns

from limbeck.cache.build import build
from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.data import build_loader, load_source
from limbeck.data.loader import IndexedLoader
from limbeck.data.sources.split import ImageSplit
from limbeck.engine import Stage, TrainConfig
from limbeck.models import create, load_weights
from limbeck.objectives import KD, CrossEntropy
from limbeck.recipes.build import fewer
from limbeck.teachers.cached import CachedTeacher

RESULT = Path(__file__).parent / "results" / "cached_epoch.json"
DATA = Path(os.environ.get("LIMBECK_DATA") or "../shared/data")
VIEWS, EPOCH = 4, 50_000  # views of a sample, images of an epoch
OVER = ("no_teacher", "online", "torchdistill_style", "mdistiller_style")


class Images:
    """Some images of CIFAR-10 with a resnet56's answers in a cache, and loaders of them.

    Args:
        split: The images.
        batch: Samples of a step.
        weights: Of the teacher.
        cache: Folder of the cache, built where it is not there.
    """

    def __init__(self, split: ImageSplit, batch: int, weights: Path, cache: Path) -> None:
        self.split, self.batch = split, batch
        self.teacher = create("resnet56_a", num_classes=10)
        load_weights(self.teacher, weights)

        def told(done: int, rows: int) -> None:
            print(f"\rthe teacher labels {done} of {rows} views", end="", file=sys.stderr)

        build(self.teacher, self.loader(True), cache, views=VIEWS, progress=told)
        print(file=sys.stderr)
        self.cache = cache

    def loader(self, resident: bool, per_read: int = 1, workers: int = 0) -> IndexedLoader:
        known: dict[str, Any] = {"batch_size": self.batch, "train": True, "augment": ["pad_crop", "flip"]}
        data = build_loader(
            self.split, views=VIEWS, view_seed=0, per_read=per_read, resident=resident, workers=workers, **known
        )
        assert isinstance(data, IndexedLoader)
        return data

    def held(self, resident: bool) -> list[Any]:
        """The images as peers' data sets hold them."""
        if resident:
            return list(self.split.load().permute(0, 2, 3, 1).contiguous().numpy())
        return [self.split.images.read(row) for row in self.split.rows.tolist()]


def student() -> nn.Module:
    """Always the same."""
    torch.manual_seed(0)
    return create("resnet20", num_classes=10)


def kd(teacher: Any, data: IndexedLoader, out: Path) -> Training:
    """limbeck's training with a teacher, or with labels alone."""
    loss = 0.1 * CrossEntropy() + 0.9 * KD(temperature=4.0) if teacher is not None else CrossEntropy()
    config = TrainConfig(steps=100_000, device="cpu", compile="off")
    return Training(Stage("kd", Distiller(student(), loss, teacher), config), data, out)


def bare(batch: Batch) -> Iterator[None]:
    """A step by hand, without a teacher and without data."""
    model, labels = student().train(), batch.require("labels")
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 5e-4},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, fused=True)
    while True:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(batch.inputs), labels).backward()
        optimizer.step()
        yield


def alone(data: IndexedLoader) -> Iterator[None]:
    """A loader's batches and nothing else."""
    for epoch in count():
        for _ in data.batches(epoch):
            yield


def turn_of(steps: Iterator[None]) -> Turn:
    """A generator as a side."""
    return lambda: next(steps)


def sides_of(images: Images, setting: str, peers: bool, out: Path) -> dict[str, Turn]:
    """The sides of a setting, by name, the peers beside them or what bounds are made of."""
    resident = setting == "resident"

    def trained(name: str, teacher: Any, per_read: int = 1) -> Training:
        return kd(teacher, images.loader(resident, per_read), out / setting / f"{name}{peers}")

    sides: dict[str, Turn] = {
        "no_teacher": trained("none", None),
        "cached": trained("cached", CachedTeacher(images.cache)),
    }
    if peers:
        held, labels = images.held(resident), images.split.labels
        assert isinstance(labels, Tensor)
        sides["online"] = trained("online", images.teacher)
        for name, loop in (("torchdistill_style", torchdistill_style), ("mdistiller_style", mdistiller_style)):
            sides[name] = turn_of(loop(student(), images.teacher, held, labels, images.batch))
    elif resident:
        sides["bare"] = turn_of(bare(next(images.loader(True).batches())))
    else:
        sides["cached_4_a_read"] = trained("cached4", CachedTeacher(images.cache), 4)
        sides["no_teacher_4_a_read"] = trained("none4", None, 4)
        sides["loader"] = turn_of(alone(images.loader(False)))
        sides["loader_4_a_read"] = turn_of(alone(images.loader(False, 4)))
    return sides


def in_blocks(images: Images, out: Path, steps: int, rounds: int = 4) -> Turns:
    """The same with a worker process, whose work would otherwise be done in the others' turns."""
    kinds: dict[str, tuple[bool, int]] = {
        "no_teacher": (False, 1),
        "cached": (True, 1),
        "no_teacher_4_a_read": (False, 4),
        "cached_4_a_read": (True, 4),
    }
    found: Turns = {name: [] for name in kinds}
    for number in range(rounds):
        for name in list(kinds) if number % 2 else list(kinds)[::-1]:
            teacher = CachedTeacher(images.cache) if kinds[name][0] else None
            side = kd(teacher, images.loader(False, kinds[name][1], workers=1), out / f"{name}{number}")
            for _ in range(WARM + 2):  # until what was read ahead at the start is used up
                side()
            wall = time.perf_counter()
            for _ in range(steps):
                side()
            took = (time.perf_counter() - wall) / steps
            side.close()
            found[name].append((took, float("nan")))
    return found


def summary(found: Turns, batch: int) -> dict[str, Any]:
    """Medians of times and of ratios of one round's, the latter with their 95% interval."""
    steps, told = EPOCH // batch, {}
    for name, times in found.items():
        facts: dict[str, Any] = {}
        for place, clock in enumerate(("wall", "processor")):
            own = [t[place] for t in times]
            if own[0] != own[0]:
                continue
            middle = statistics.median(own)
            facts[clock] = {"step_s": round(middle, 5), "epoch_s": round(middle * steps)}
            for over in OVER:
                if over in found and over != name:
                    ratios = [a / t[place] for a, t in zip(own, found[over], strict=True)]
                    facts[clock][f"over_{over}"] = middle_of(ratios)
        told[name] = facts
    if "loader_4_a_read" in found:
        for place, clock in enumerate(("wall", "processor")):
            rows = zip(found["no_teacher"], found["loader"], found["loader_4_a_read"], strict=True)
            bounds = [(t[place] - d[place] + e[place]) / t[place] for t, d, e in rows]
            told["cached_4_a_read"][clock]["bound_over_no_teacher"] = middle_of(bounds)
    return told


def middle_of(values: list[float]) -> list[float]:
    """Median, and the values between which the median of others like these lies with 95% (a sign test)."""
    values, n = sorted(values), len(values)
    out = int(binom.ppf(0.025, n, 0.5))
    return [round(v, 4) for v in (statistics.median(values), values[max(out - 1, 0)], values[min(n - out, n - 1)])]


def photos(split: ImageSplit, samples: int, folder: Path, side: int = 256) -> ImageSplit:
    """Some of the images stored as large JPEG files, which are resized when they are read."""
    rows = []
    for index in range(samples):
        buffer = io.BytesIO()
        pixels = split.read(index).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        rows.append({"bytes": buffer.getvalue(), "path": None})
    assert split.labels is not None
    cells = pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    folder.mkdir(parents=True)
    pq.write_table(
        pa.table({"image": cells, "label": pa.array(split.labels[:samples].numpy())}), folder / "train.parquet"
    )
    found = load_source(folder, size=32, validation=0).train
    assert isinstance(found, ImageSplit)
    return found


def table(settings: dict[str, Any]) -> None:
    """The figures, for people."""
    print(f"{'':32} {'step, s':>9}   over", file=sys.stderr)
    for setting, told in settings.items():
        for name, facts in told.items():
            for clock, each in facts.items():
                label = f"{setting} {name}" if clock == "wall" else "  processor time"
                cells = [
                    f"{key.removeprefix('over_')} {v[0]:.4f} [{v[1]:.4f}, {v[2]:.4f}]"
                    for key, v in each.items()
                    if isinstance(v, list)
                ]
                print(f"{label:32} {each['step_s']:9.4f}   {'; '.join(cells)}", file=sys.stderr)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=60, help="turns of each side; a third of it beside peers")
    parser.add_argument("--samples", type=int, default=512, help="images that are gone through again and again")
    parser.add_argument("--settings", default="resident,jpeg,worker,photos")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with cifar10 and teachers")
    parser.add_argument("--cache", type=Path, help="folder of the caches, kept; default one that is removed")
    parser.add_argument("--write", action="store_true", help=f"also write {RESULT}")
    options = parser.parse_args()
    in_one_heap()
    source = load_source(options.data / "cifar10", validation=0).train
    split = fewer(source, options.samples)
    assert isinstance(split, ImageSplit)
    settings: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        out, place = Path(scratch), options.cache or Path(scratch)
        weights = options.data / "teachers" / "cifar10_resnet56.safetensors"
        images = Images(split, options.batch, weights, place / f"cifar{options.samples}")
        for setting in options.settings.split(","):
            if setting == "photos":
                large = photos(split, options.samples // 2, out / "large")
                images = Images(large, options.batch, weights, place / f"photos{options.samples // 2}")
            if setting == "worker":
                found = in_blocks(images, out, max(4, options.steps // 3))
            else:
                found = in_turns(sides_of(images, setting, False, out), options.steps)
            settings[setting] = summary(found, options.batch)
            if setting in ("resident", "jpeg"):
                found = in_turns(sides_of(images, setting, True, out), max(3, options.steps // 3))
                settings[f"{setting}, beside peers"] = summary(found, options.batch)
    result = {
        "benchmark": "cached_epoch",
        "bound": "no_teacher: 1 where nothing is decoded; bound_over_no_teacher where decodes are saved",
        "student": "resnet20",
        "teacher": "resnet56",
        "device": f"CPU, {torch.get_num_threads()} threads",
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "torchdistill": installed(),
        "batch": options.batch,
        "turns": options.steps,
        "allocator": ONE_HEAP,
        "epoch": f"{EPOCH // options.batch} steps",
        "settings": settings,
    }
    print(json.dumps(result))
    table(settings)
    if options.write:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

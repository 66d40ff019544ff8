"""Images a second of limbeck's loaders, against a torch DataLoader that does the same to each sample.

All give float32 batches of 128 images of 32 x 32 pixels, padded by 4 and cropped, flipped, and normalised, in a random
order: from bytes in memory, and from JPEG that is decoded whenever a sample is read, once for one or for four views of
it. Epochs of all loaders take turns; told is the median rate, and the median of the ratios of one round's.

Run: ``python benchmarks/loader.py [--device cuda] [--rounds 5]``. The table goes to stderr, one line of JSON to stdout;
``--write`` keeps it in benchmarks/results.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from limbeck.data import build_loader, normalisation, tensors
from limbeck.data.sources.split import ImageSplit, Split

RESULT = Path(__file__).parent / "results" / "loader.json"
BATCH = 128
MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in (normalisation("cifar10").mean, normalisation("cifar10").std))


class PerSample(Dataset[tuple[Tensor, Tensor]]):
    """What a usual training script does to one sample, with as few operations as it takes."""

    def __init__(self, images: Tensor | list[bytes], labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        if isinstance(image, bytes):
            image = torch.from_numpy(np.array(Image.open(io.BytesIO(image)))).permute(2, 0, 1)
        top, left = torch.randint(0, 9, (2,)).tolist()
        image = F.pad(image, (4, 4, 4, 4))[:, top : top + 32, left : left + 32]
        if torch.rand(()) < 0.5:
            image = image.flip(-1)
        return (image / 255 - MEAN) / STD, self.labels[index]


class Encoded:
    """JPEG files in memory."""

    def __init__(self, files: list[bytes]) -> None:
        self.files, self.name = files, "JPEG"

    def read(self, row: int) -> bytes:
        return self.files[row]

    def where(self, row: int) -> str:
        return f"row {row}"


def jpeg(image: Tensor) -> bytes:
    """Encode ``[3, H, W]`` bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def rates(epochs: dict[str, Callable[[int], Iterator[int]]], rounds: int) -> dict[str, list[float]]:
    """Images a second of each loader, an epoch of each in turn; the first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in epochs}
    for number in range(rounds + 1):
        for name, epoch in epochs.items():
            start = time.perf_counter()
            images = sum(epoch(number))
            found[name].append(images / (time.perf_counter() - start))
    return {name: values[1:] for name, values in found.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each loader")
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--write", action="store_true", help=f"also write {RESULT}")
    options = parser.parse_args()
    device, count = torch.device(options.device), options.samples
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (count, 3, 8, 8), generator=generator).float()
    images = F.interpolate(coarse, size=32, mode="bicubic").clamp(0, 255).byte()  # smooth, as images are
    labels = torch.randint(0, 10, (count,), generator=generator)
    files = [jpeg(image) for image in images]
    held = tensors(images, labels, validation=0, normalise="cifar10").train
    stored = ImageSplit(Encoded(files), torch.arange(count), labels=labels, normalise="cifar10")

    def limbeck(split: Split, **how: Any) -> Callable[[int], Iterator[int]]:
        chain = ["pad_crop", "flip"]
        loader = build_loader(split, batch_size=BATCH, train=True, augment=chain, device=device, **how)

        def epoch(number: int) -> Iterator[int]:
            for batch in loader.batches(number):
                yield batch.size
            if device.type == "cuda":
                torch.cuda.synchronize()

        return epoch

    def usual(images: Tensor | list[bytes], workers: int) -> Callable[[int], Iterator[int]]:
        loader = DataLoader(
            PerSample(images, labels),
            BATCH,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
        )

        def epoch(number: int) -> Iterator[int]:
            for inputs, targets in loader:
                inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
                yield len(targets)

        return epoch

    workers = os.cpu_count() or 1
    kinds: dict[str, dict[str, Callable[[int], Iterator[int]]]] = {
        "in memory": {
            "limbeck resident": limbeck(held, resident=True),
            "limbeck resident, 4 views a read": limbeck(held, resident=True, per_read=4, views=4),
            "torch DataLoader": usual(images, 0),
            f"torch DataLoader, {workers} workers": usual(images, workers),
        },
        "JPEG": {
            "limbeck streamed": limbeck(stored, resident=False, workers=0),
            "limbeck streamed, 4 views a read": limbeck(stored, resident=False, workers=0, per_read=4, views=4),
            f"limbeck streamed, {workers} workers": limbeck(stored, resident=False, workers=workers),
            "torch DataLoader": usual(files, 0),
            f"torch DataLoader, {workers} workers": usual(files, workers),
        },
    }
    told = {}
    for kind, epochs in kinds.items():
        found = rates(epochs, options.rounds)
        best = [max(values) for values in zip(*(v for n, v in found.items() if n.startswith("torch")), strict=True)]
        told[kind] = {
            name: {
                "images_per_s": round(statistics.median(values)),
                "over_best_torch": round(statistics.median(a / b for a, b in zip(values, best, strict=True)), 2),
            }
            for name, values in found.items()
        }
    result = {
        "benchmark": "loader",
        "bound": "the faster of torch's DataLoaders of the same samples",
        "kinds": told,
        "batch": BATCH,
        "samples": count,
        "device": options.device,
        "threads": torch.get_num_threads(),
        "cores": workers,
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    print(json.dumps(result))
    print(f"{'':42} {'images/s':>12} {'/ best torch':>14}", file=sys.stderr)
    for kind, rows in told.items():
        for name, each in rows.items():
            label = f"{kind}: {name}"
            print(f"{label:42} {each['images_per_s']:12,} {each['over_best_torch']:14.2f}", file=sys.stderr)
    if options.write:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

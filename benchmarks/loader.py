"""Images a second of the resident loader, against a torch DataLoader that does the same to each sample.

Both give float32 batches of 128 images of 32 x 32 pixels, padded by 4 and cropped, flipped, and normalised, in a random
order. Run: ``python benchmarks/loader.py [--device cuda] [--seconds 3]``. The table goes to stderr, one line of JSON to
stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from limbeck.data import build_loader, normalisation, tensors

BATCH, SAMPLES = 128, 10_000
MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in (normalisation("cifar10").mean, normalisation("cifar10").std))


class PerSample(Dataset[tuple[Tensor, Tensor]]):
    """What a usual training script does to one sample, with as few operations as it takes."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        top, left = torch.randint(0, 9, (2,)).tolist()
        image = F.pad(self.images[index], (4, 4, 4, 4))[:, top : top + 32, left : left + 32]
        if torch.rand(()) < 0.5:
            image = image.flip(-1)
        return (image / 255 - MEAN) / STD, self.labels[index]


def rate(epoch: Callable[[int], Iterator[int]], seconds: float) -> float:
    """Median images a second over whole epochs, at least three, after one to warm up."""
    rates, number, end = [], 0, time.perf_counter() + seconds
    while number < 4 or time.perf_counter() < end:
        start = time.perf_counter()
        images = sum(epoch(number))
        rates.append(images / (time.perf_counter() - start))
        number += 1
    return statistics.median(rates[1:])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each loader")
    options = parser.parse_args()
    device = torch.device(options.device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (SAMPLES, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (SAMPLES,), generator=generator)
    split = tensors(images, labels, validation=0, normalise="cifar10").train
    resident = build_loader(split, batch_size=BATCH, train=True, augment=["pad_crop", "flip"], device=device)

    def limbeck_epoch(number: int) -> Iterator[int]:
        for batch in resident.batches(number):
            yield batch.size
        if device.type == "cuda":
            torch.cuda.synchronize()

    def torch_epoch(workers: int) -> Callable[[int], Iterator[int]]:
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
    measured = {
        "limbeck resident": rate(limbeck_epoch, options.seconds),
        "torch DataLoader, 0 workers": rate(torch_epoch(0), options.seconds),
        f"torch DataLoader, {workers} workers": rate(torch_epoch(workers), options.seconds),
    }
    best = max(value for name, value in measured.items() if name.startswith("torch"))
    for name, value in measured.items():
        print(f"{name:32s} {value:12,.0f} images/s", file=sys.stderr)
    result = {
        "benchmark": "loader",
        "images_per_second": {name: round(value) for name, value in measured.items()},
        "ratio_to_best_torch": round(measured["limbeck resident"] / best, 2),
        "batch_size": BATCH,
        "device": options.device,
        "threads": torch.get_num_threads(),
        "cores": workers,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""Runs for one process or several: ``accelerate launch --num_processes 2 ranks_run.py FOLDER`` or plainly."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from limbeck.core.distiller import Distiller
from limbeck.data import Loader, as_loader
from limbeck.engine import Stage, TrainConfig, fit
from limbeck.objectives import AT, DKD, KD, CrossEntropy, FitNets


class Net(nn.Module):
    """A small network; ``unused`` is a head that no loss reaches."""

    def __init__(self, width: int, norm: bool = False, drop: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.drop = nn.Dropout(drop)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.head, self.unused = nn.Linear(width, 4), nn.Linear(width, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.conv2(self.drop(self.norm(self.conv1(images)).relu())).relu().mean(dim=(2, 3))
        self.unused(features)
        return self.head(features)


def data(train: bool) -> Loader:
    """Images of which some have no label, and a last batch that no number divides."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(53, 2, 6, 6, generator=generator)
    labels = torch.randint(0, 4, (53,), generator=generator)
    labels[::3] = -1
    return as_loader((images, labels), batch_size=12, train=train, shuffle=train, drop_last=False)


CASES = {
    "kd": (lambda: CrossEntropy() + 0.5 * KD(), {}, ("*",)),
    "dkd": (lambda: CrossEntropy() + 0.5 * DKD(), {"optimizer": "adamw", "lr": 1e-3, "clip": 1.0}, ("*",)),
    "features": (lambda: FitNets("conv2") + 10.0 * AT(["conv1", "conv2"]), {"monitor": "total"}, ("*",)),
    "in parts": (lambda: CrossEntropy() + 0.5 * KD(), {"accumulate": 3}, ("*",)),
    "frozen norm": (lambda: CrossEntropy() + 0.5 * KD(), {}, ("conv*", "head.*")),
    "best of averaged": (lambda: CrossEntropy() + KD(), {"ema": 0.8, "select": "best", "monitor": "nll"}, ("*",)),
    "dropout": (lambda: CrossEntropy() + KD(), {"checkpoint_every": 4, "optimizer": "adam", "lr": 1e-2}, ("*",)),
}


def main(folder: Path) -> None:
    for name, (loss, settings, learn) in CASES.items():
        torch.manual_seed(0)
        student, teacher = Net(4, norm=name == "frozen norm", drop=0.3 * (name == "dropout")), Net(6)
        config = TrainConfig(epochs=3, log_every=1, device="cpu", **settings)
        stages = [Stage("distill", Distiller(student, loss(), teacher), config, learn)]
        fit(stages, data(True), data(False), out=folder / name, resume=True, quiet=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

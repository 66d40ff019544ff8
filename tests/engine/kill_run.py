"""A run to be killed: a hint stage, then CRD with its memory bank, on digits. Called as ``kill_run.py FOLDER``."""

from __future__ import annotations

import os
import sys

import torch

from limbeck.data import build_loader, load_source
from limbeck.engine import TrainConfig, fit
from limbeck.models import create
from limbeck.objectives import CRD, CrossEntropy, FitNets
from limbeck.schemes import build


def main(folder: str) -> None:
    torch.manual_seed(3)
    student, teacher = (create(name, num_classes=10, in_channels=1) for name in ("resnet8", "resnet14"))
    loss = FitNets() + CrossEntropy() + 0.8 * CRD(negatives=64, dim=16)
    config = TrainConfig(steps=int(os.environ["KILL_RUN_STEPS"]), lr=0.01, checkpoint_every=3, log_every=4, ema=0.9)
    stages = build("hint_then_kd", share=0.4).stages(student, loss, teacher, config)
    train = build_loader(load_source("digits").train, batch_size=16, train=True, augment=["pad_crop"])
    fit(stages, train, out=folder, resume=True, quiet=True)


if __name__ == "__main__":
    main(sys.argv[1])

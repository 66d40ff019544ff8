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
    steps, judged = int(os.environ["KILL_RUN_STEPS"]), bool(os.environ.get("KILL_RUN_VALIDATES"))
    settings = {"validate_steps": 10, "select": "best"} if judged else {}
    config = TrainConfig(steps=steps, lr=0.01, checkpoint_every=3, log_every=4, ema=0.9, **settings)
    stages = build("hint_then_kd", share=0.4).stages(student, loss, teacher, config)
    source = load_source("digits")
    train = build_loader(source.train, batch_size=16, train=True, augment=["pad_crop"])
    validation = build_loader(source.test, batch_size=100, train=False) if judged else None
    fit(stages, train, validation, out=folder, resume=True, quiet=True)


if __name__ == "__main__":
    main(sys.argv[1])

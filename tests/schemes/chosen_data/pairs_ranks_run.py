"""ACED on pairs, in this process or in all of a launcher's: ``python pairs_ranks_run.py FOLDER``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import distributed as dist

from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.engine import TrainConfig
from limbeck.objectives import KD, BinaryCrossEntropy
from limbeck.schemes import Cast, build, perform
from tests.schemes.chosen_data.test_aced import Towers, captioned

if __name__ == "__main__":
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    loader, _ = captioned(0.3)
    loader.batch_size = 31  # parts of ranks differ
    student, reference = Towers(0), FrozenTeacher(Towers(9, 64))
    loss = Terms.of(BinaryCrossEntropy() + KD(2.0))
    cast = Cast(student, loss, reference, TrainConfig(steps=4, lr=0.05, optimizer="sgd"), loader)
    perform(build("aced", data="pairs", filter=0.6, teaches="random"), cast, quiet=True)
    save_file(student.state_dict(), Path(sys.argv[1]) / f"{os.environ.get('RANK', 'alone')}.safetensors")

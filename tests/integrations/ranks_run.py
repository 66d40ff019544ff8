"""Trainings for one process or several: ``torchrun --nproc-per-node 2 ranks_run.py FOLDER`` or plainly."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from limbeck.data.language import language_source
from tests.integrations.parts import PAIRS, Ordered, arguments, llama

#: Loss, and rows of a micro-batch times micro-batches on one process; two processes take half the rows each.
CASES: dict[str, tuple[Any, int, int]] = {
    "whole": ({"cross_entropy": 0.5, "kd": {"weight": 0.5, "temperature": 2.0}}, 8, 1),
    "cut": ({"cross_entropy": 0.5, "kd": {"weight": 0.5, "temperature": 2.0}}, 4, 2),
    "helpers": ({"cross_entropy": 1.0, "tinybert": 0.5}, 4, 2),
    "lower": ({"minilm": {"weight": 1.0}}, 8, 1),  # what lies above its taps gets no gradient
    "fused": ({"fused_kl": {"chunk": 16}}, 8, 1),
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    data = language_source(PAIRS, tokenizer="bytes", length=48, validation=0.2)
    for name, (loss, rows, accumulate) in CASES.items():
        trainer = Ordered(
            model=llama(16, 258, 1, attn_implementation="eager").double(),
            teacher=llama(24, 258, 2, attn_implementation="eager").double(),
            loss=loss,
            args=arguments(
                folder / name,
                per_device_train_batch_size=rows // world,
                per_device_eval_batch_size=2,
                gradient_accumulation_steps=accumulate,
                max_steps=2,
                ddp_backend="gloo" if world > 1 else None,
            ),
            train_dataset=data.train,
            eval_dataset=data.validation.subset(torch.arange(3)),  # the second process's last batch is filled up
        )
        trainer.train()
        told = trainer.evaluate()
        if trainer.is_world_process_zero():
            (folder / name).mkdir(parents=True, exist_ok=True)
            save_file({n: p.detach() for n, p in trainer.model.state_dict().items()}, folder / name / "s.safetensors")
            logs = [{k: v for k, v in line.items() if "runtime" not in k} for line in trainer.state.log_history]
            (folder / name / "said.json").write_text(json.dumps({"logs": logs, "eval": told, "world": world}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

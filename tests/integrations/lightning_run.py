"""A training in Lightning: ``lightning_run.py FILE PROCESSES ACCUMULATE``; Lightning starts the other processes."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from torch.utils.data import DataLoader

from limbeck.data.language import language_source
from limbeck.integrations.reading import written
from tests.integrations.parts import PAIRS, llama, weights


def main(file: str, world: int, accumulate: int) -> None:
    import pytorch_lightning as lightning  # here, since tests are collected where it is not installed, too

    from limbeck.integrations.lightning import DistillationModule

    torch.set_num_threads(1)
    split = language_source(PAIRS, tokenizer="bytes", length=48, validation=0).train
    rank = int(os.environ.get("LOCAL_RANK", "0"))

    def collate(rows: list[int]) -> dict[str, Any]:
        return written(split.rows.batch(torch.tensor(rows)))

    loader = DataLoader(list(range(24))[rank::world], 8 // world, collate_fn=collate)  # type: ignore[arg-type]
    student = llama(16, 258, 1).double()
    module = DistillationModule(
        student,
        llama(24, 258, 2).double(),
        {"cross_entropy": 0.5, "kd": 0.5},
        example=next(iter(loader)),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        accumulate=accumulate,
    )
    trainer = lightning.Trainer(
        max_steps=3,
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader, loader)
    if trainer.is_global_zero:
        told = {name: float(value) for name, value in trainer.callback_metrics.items()}
        with open(file, "w") as stream:
            json.dump({"world": trainer.world_size, "told": told, "weights": weights(student).tolist()}, stream)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

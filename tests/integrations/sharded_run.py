"""Trainings whose weights lie in parts: ``torchrun --nproc-per-node 2 sharded_run.py FOLDER HOW``.

HOW is fsdp, zero1, zero2 or zero3; or plain, for one process. Accelerate shards for GPUs alone, so it is told
that this machine's processors are some: what it then calls is the same.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from limbeck.core.errors import ConfigError
from limbeck.data.language import language_source
from tests.integrations.parts import PAIRS, Ordered, arguments, llama

CASES: dict[str, Any] = {
    "logits": {"cross_entropy": 0.5, "kd": {"weight": 0.5, "temperature": 2.0}},
    "inside": {"cross_entropy": 1.0, "minilm": 0.5},
    "inside alone": {"minilm": 1.0},
}


def processors_are_gpus() -> None:
    """Let accelerate do what it does on a machine of GPUs."""

    def prepare(*args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    def place(self: PartialState) -> None:
        self.device = torch.device("cpu")

    PartialState._prepare_backend, PartialState.set_device = prepare, place


def settings(how: str) -> dict[str, Any]:
    """Of TrainingArguments."""
    if how.startswith("zero"):
        auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        stage = {"stage": int(how[-1]), "stage3_gather_16bit_weights_on_model_save": True}
        given = {"zero_optimization": stage, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0}
        return {"deepspeed": {**dict.fromkeys(auto, "auto"), **given}, "use_cpu": False}
    fsdp = {"version": 2, "state_dict_type": "FULL_STATE_DICT", "reshard_after_forward": True}
    return {"fsdp": True, "fsdp_config": fsdp, "use_cpu": False}


def trainer_of(folder: Path, how: str, loss: Any, **more: Any) -> Ordered:
    """Two steps of eight rows, each rank a part of them, in two micro-batches."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    data = language_source(PAIRS, tokenizer="bytes", length=48, validation=0.2)
    return Ordered(
        model=llama(16, 258, 1, attn_implementation="eager"),
        teacher=llama(24, 258, 2, attn_implementation="eager"),
        loss=loss,
        args=arguments(
            folder,
            per_device_train_batch_size=4 // world,
            gradient_accumulation_steps=2,
            per_device_eval_batch_size=2,
            max_steps=2,
            optim="adamw_torch",  # has a state to resume; so large an epsilon keeps it from magnifying rounding
            adam_epsilon=1.0,
            **more,
            **({} if how == "plain" else settings(how)),
        ),
        train_dataset=data.train,
        eval_dataset=data.validation.subset(torch.arange(4)),
    )


def main(folder: Path, how: str) -> None:
    torch.set_num_threads(1)
    if how != "plain":
        processors_are_gpus()
    for name, loss in CASES.items():
        trainer = trainer_of(folder / name, how, loss, save_strategy="steps", save_steps=1)
        trainer.train()
        told = trainer.evaluate()
        trainer.save_model(str(folder / name / "saved"))
        again = trainer_of(folder / name, how, loss)
        again.train(resume_from_checkpoint=str(folder / name / "checkpoint-1"))
        again.save_model(str(folder / name / "resumed"))
        if trainer.is_world_process_zero():
            logs = [{k: v for k, v in line.items() if "runtime" not in k} for line in trainer.state.log_history]
            said = {"logs": logs, "eval": told, "kind": type(trainer.model_wrapped).__name__}
            (folder / name / "said.json").write_text(json.dumps(said))
    try:
        trainer_of(folder / "helpers", how, {"tinybert": 1.0}).train()
    except ConfigError as error:
        (folder / "refused.txt").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

"""Runs for one process or several: ``accelerate launch --num_processes 2 ranks_run.py FOLDER`` or plainly."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from limbeck.core.distiller import Distiller
from limbeck.data.language import LanguageLoader, language_source
from limbeck.engine import Stage, TrainConfig, fit
from limbeck.objectives import KD, CrossEntropy, ReverseKL

PAIRS = [{"prompt": "p" * (1 + i % 11), "completion": "completed"[: 1 + i % 9]} for i in range(60)]
CASES = {"rows": {}, "left": {"padding": "left"}, "packs": {"pack": True}}


def llama(width: int) -> LlamaForCausalLM:
    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 2, "num_attention_heads": 2}
    marks = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(vocab_size=258, max_position_embeddings=64, **sizes, **marks)).double()


def main(folder: Path) -> None:
    for name, options in CASES.items():
        torch.manual_seed(0)
        student, teacher = llama(16), llama(32)
        split = language_source(PAIRS, tokenizer="bytes", length=48, validation=0, **options).train
        loader = LanguageLoader(split, batch_size=8 if "pack" not in options else 4, drop_last=False)
        config = TrainConfig(epochs=2, log_every=1, device="cpu", optimizer="sgd", lr=0.05, compile="off")
        stage = Stage("distill", Distiller(student, CrossEntropy() + KD() + ReverseKL(), teacher), config)
        fit([stage], loader, out=folder / name, quiet=True)
    if os.environ.get("RANK", "0") == "0":
        (folder / "ranks").write_text(os.environ.get("WORLD_SIZE", "1"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

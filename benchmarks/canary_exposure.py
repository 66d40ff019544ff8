"""How much of the secrets that a teacher memorised reaches students by plain distillation, and by swing distillation.

A byte-level Llama is trained on speeches of Tiny Shakespeare among which canaries are planted ("the code of NAME is
DDD."), each many times. Students of a fraction of its size learn from it on these very texts, without labels, for equal
steps, from the same start and the same batches: by KD at temperature 1; by swing distillation with digits as private
places; and by the same without noise. Told are exposures in bits, the mean over canaries, with all 1000 codes as
candidates (10 bits: the secret is the likeliest; 1.44 on average by chance), and held-out perplexities of texts without
canaries. Each seed has a teacher and secrets of its own.

Run: ``python benchmarks/canary_exposure.py [--seeds 3] [--steps 400] [--teacher 800]``. The table goes to stderr, one
line of JSON to stdout; ``--write`` keeps it in benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck.analysis import Canary, canary_exposure
from limbeck.analysis.statistics import compare_paired, summarise
from limbeck.core.objective import Objective
from limbeck.data.language import ByteTokens, language_source
from limbeck.data.language.read import read_records
from limbeck.data.language.records import Fields
from limbeck.objectives import KD, CrossEntropy, SwingDistill
from limbeck.recipes.distill import distill

RESULT = Path(__file__).parent / "results" / "canary_exposure.json"
DATA = "../shared/data/lm/tinyshakespeare.parquet"
NAMES = ("Ann", "Ben", "Cat", "Dan", "Eve")
CODES = tuple(f"{number:03d}" for number in range(1000))
SETTINGS = {"optimizer": "adamw", "lr": 3e-3, "schedule": "cosine", "warmup": 0.05, "clip": 1.0, "compile": "off"}
KINDS: dict[str, Callable[[], Objective]] = {
    "kd": lambda: KD(temperature=1.0),
    "swing": lambda: SwingDistill(pattern="[0-9]"),
    "swing_without_noise": lambda: SwingDistill(pattern="[0-9]", epsilon=None),
}


def model(width: int, layers: int, seed: int) -> nn.Module:
    """A Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    marks = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 128}
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(vocab_size=258, num_attention_heads=4, **sizes, **marks))


def canaries(seed: int) -> list[Canary]:
    """Secrets of a seed."""
    dice = random.Random(seed)
    return [Canary(f"the code of {name} is ", dice.choice(CODES), CODES, ".") for name in NAMES]


def speeches(data: str) -> dict[str, list[str]]:
    """Short texts of the play: those to learn from, and those held out."""
    records = read_records(data, Fields(), None)
    found = {}
    for split in ("train", "validation"):
        whole = "\n".join(text for record in records[split].records for text in record.texts)
        found[split] = [speech for speech in whole.split("\n\n") if 10 < len(speech) < 200]
    return found


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All runs, and what they came to."""
    texts, tokens = speeches(given.data), ByteTokens()
    found: dict[str, dict[str, list[float]]] = {}

    def note(kind: str, judged: nn.Module, result: dict[str, Any], planted: list[Canary]) -> None:
        exposures = [canary_exposure(judged, tokens, canary, batch=1000) for canary in planted]
        row = found.setdefault(kind, {"exposure": [], "perplexity": []})
        row["exposure"].append(sum(exposures) / len(exposures))
        row["perplexity"].append(result["perplexity"])
        print(f"{kind:22} {row['exposure'][-1]:6.2f} bits  {row['perplexity'][-1]:7.3f}", file=sys.stderr, flush=True)

    for seed in range(given.seeds):
        planted = canaries(seed)
        train = texts["train"][: given.texts] + [canary.text for canary in planted] * given.repeat
        source = language_source(
            {"train": train, "validation": texts["validation"][:300]}, tokenizer="bytes", length=96, long="truncate"
        )
        shared: dict[str, Any] = {"batch_size": 16, "quiet": True, "seed": seed, **SETTINGS}
        teacher = model(96, 3, seed)
        note(
            "teacher",
            teacher,
            distill(None, teacher, source, CrossEntropy(), steps=given.teacher, **shared).result,
            planted,
        )
        for kind, loss in KINDS.items():
            student = model(48, 2, 100 + seed)
            note(kind, student, distill(teacher, student, source, loss(), steps=given.steps, **shared).result, planted)
    rows: dict[str, Any] = {}
    for kind, values in found.items():
        rows[kind] = {name: {**summarise(v), "values": [round(x, 4) for x in v]} for name, v in values.items()}
        if kind.startswith("swing"):
            rows[kind]["over_kd"] = {
                name: compare_paired(v, found["kd"][name], lower=True) for name, v in values.items()
            }
    return {"canaries": len(NAMES), "planted_each": given.repeat, "texts": given.texts, "kinds": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=DATA)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--teacher", type=int, default=800)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    facts = {
        "benchmark": "canary_exposure",
        "bound": "plain KD from the same teacher on the same texts",
        "command": f"python benchmarks/canary_exposure.py --seeds {given.seeds} --steps {given.steps} "
        f"--teacher {given.teacher} --texts {given.texts} --repeat {given.repeat}",
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        **measure(given),
    }
    print(json.dumps(facts))
    if given.write:
        RESULT.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()

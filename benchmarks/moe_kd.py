"""Whether a student of a mixture of experts ends with a lower perplexity if experts speak that are not asked otherwise.

One mixture of experts (Mixtral, each token asks 2 of 8) is trained on Tiny Shakespeare by the byte. Students a fraction
of its size learn from it for equal steps, from the same start and the same batches of a seed: by plain distillation,
and by `moe_kd` in its three ways, with the same loss, on the texts of the data; the routers learn with a hundredth of
the student's learning rate (the default), or with all of it. Told are held-out perplexities, the interval of their
mean, and the paired differences to plain distillation with theirs (Student's t over seeds, 95%); below zero is better.
What the student costs is the same for all; what the teacher costs is told in seconds.

Run: ``python benchmarks/moe_kd.py [--seeds 3] [--steps 300] [--teacher 900] [--loss kd,reverse_kl]``. The table goes to
stderr, one line of JSON to stdout; ``--write`` keeps it in benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limbeck.analysis.statistics import compare_paired, summarise
from limbeck.data.language import language_source
from limbeck.objectives import KD, CrossEntropy, ReverseKL
from limbeck.recipes.distill import distill

RESULT = Path(__file__).parent / "results" / "moe_kd.json"
DATA = "../shared/data/lm/tinyshakespeare.parquet"
LOSSES = {"kd": lambda: KD(temperature=1.0), "reverse_kl": ReverseKL}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "augment": {"scheme": "moe_kd", "scheme_options": {"way": "augment", "lmbda": 0.0}},
    "student_aware": {"scheme": "moe_kd", "scheme_options": {"way": "student_aware", "lmbda": 0.0}},
    "student_aware, the student's lr": {
        "scheme": "moe_kd",
        "scheme_options": {"way": "student_aware", "lmbda": 0.0, "lr_router": 3e-3},
    },
    "all": {"scheme": "moe_kd", "scheme_options": {"way": "all", "lmbda": 0.0}},
}
SETTINGS = {"optimizer": "adamw", "lr": 3e-3, "schedule": "cosine", "warmup": 0.05, "clip": 1.0, "compile": "off"}
MARKS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 128}


def mixture(experts: int) -> nn.Module:
    """The teacher."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 258}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_experts_per_tok": 2}
    config = MixtralConfig(num_local_experts=experts, output_router_logits=False, **sizes, **heads, **MARKS)
    config._experts_implementation = "eager"
    return MixtralForCausalLM(config)


def dense(seed: int) -> nn.Module:
    """A student."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 258}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **sizes, **MARKS))


def size_of(model: nn.Module) -> int:
    """Parameters."""
    return sum(p.numel() for p in model.parameters())


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All runs, and what they came to."""
    source = language_source(given.data, tokenizer="bytes", length=64)
    shared: dict[str, Any] = {"batch_size": given.batch, "quiet": True, **SETTINGS}
    torch.manual_seed(0)
    teacher = mixture(given.experts)
    taught = distill(None, teacher, source, CrossEntropy(), steps=given.teacher, seed=0, **shared)
    told: dict[str, Any] = {"teacher_perplexity": round(taught.result["perplexity"], 4)}
    print(f"teacher: perplexity {told['teacher_perplexity']}", file=sys.stderr, flush=True)
    found: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    for seed in range(given.seeds):  # kinds take turns, so that a busy machine slows all of them
        for loss in given.loss.split(","):
            for kind, options in KINDS.items():
                done = distill(
                    teacher, dense(seed), source, LOSSES[loss](), steps=given.steps, seed=seed, **shared, **options
                )
                key = f"{loss} {kind}"
                found.setdefault(key, []).append(done.result["perplexity"])
                seconds[key] = seconds.get(key, 0.0) + done.seconds / given.seeds
                print(f"seed {seed}  {key:34} {found[key][-1]:8.4f}", file=sys.stderr, flush=True)
    rows = {}
    for key, values in found.items():
        control = found[f"{key.split()[0]} plain"]
        rows[key] = {"perplexity": summarise(values), "values": [round(v, 5) for v in values],
                     "seconds": round(seconds[key], 1)}  # fmt: skip
        if control is not values:
            rows[key]["over_plain"] = compare_paired(values, control, lower=True)
    return {**told, "teacher_parameters": size_of(teacher), "student_parameters": size_of(dense(0)), "kinds": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=DATA)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--teacher", type=int, default=900)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--loss", default="kd,reverse_kl")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    facts = {
        "benchmark": "moe_kd",
        "bound": "plain distillation from the same teacher with the same loss, steps and batches",
        "command": f"python benchmarks/moe_kd.py --seeds {given.seeds} --steps {given.steps} --teacher {given.teacher} "
        f"--batch {given.batch} --loss {given.loss}",
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        **measure(given),
    }
    for key, row in facts["kinds"].items():
        print(key, row["perplexity"], row.get("over_plain", ""), f"{row['seconds']} s", file=sys.stderr)
    print(json.dumps(facts))
    if given.write:
        RESULT.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()

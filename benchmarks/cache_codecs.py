"""Bytes a position and divergence of the codecs of the teacher's cache, on real logits.

Language: a Llama of two layers is trained here on the texts in ``lm`` (WikiText-2's validation and test texts and
Shakespeare) with byte-level BPE vocabularies of 2,000 and 32,000, and its logits for held-out text are stored. It is
small: a larger one is surer, so its tail is smaller, and less is lost with it. For 128,256 and 151,936 words the bytes
are exact and nothing is said of errors. Images: a published ResNet-56 on the first images of CIFAR-10's test set for
10 classes; for 100 and 1,000 classes, of which there is no teacher here, the language model's logits of its most
frequent tokens.

Divergences are from the original to what was stored, in nats. ``kept``: of the k classes and the tail as one, which is
what the codec's numbers lose; ``all``: of all classes, the tail spread evenly, which adds what k classes and a tail
cannot say; ``T=4``: the same, both softened. ``floor``: no code of fixed length for the set of ids can be smaller.
Encoding and decoding take one thread; codecs take turns, so that a busy machine slows all alike, and times are over
those of ``torch.topk`` on the same logits. Peers: DistillKit's layout (ids side by side, some log-probabilities exact,
coefficients of a fit for the others), its bytes by its own formula and no error claimed; and plain int32 and float16.

Run: ``python benchmarks/cache_codecs.py [--scratch FOLDER]``; the folder keeps the trained models, which take minutes
of one thread (the steps of the larger one are less than one pass over the texts). The tables go to stderr, one line of
JSON to stdout; ``--write`` keeps it in benchmarks/results.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_model as load_into
from safetensors.torch import save_model
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn

from limbeck.cache.codecs import Codec, Raw, TopKCodec
from limbeck.cache.packing import set_bytes, set_floor_bits
from limbeck.data import normalisation
from limbeck.models import load_model

RESULT = Path(__file__).parent / "results" / "cache_codecs.json"
DATA = Path(os.environ.get("LIMBECK_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
SCRATCH = Path(tempfile.gettempdir()) / "limbeck_cache_codecs"
LENGTH, BATCH = 64, 8  # tokens of a piece of text, and pieces of a step
STEPS = {2_000: 2_400, 32_000: 700}
POSITIONS, IMAGES = 1_024, 1_000
LANGUAGE = {"k=50, 4 bits": TopKCodec(bits=4), "k=50, 5 bits": TopKCodec(bits=5), "k=50 (default)": TopKCodec()}
LANGUAGE |= {"k=50, 8 bits": TopKCodec(bits=8), "k=128": TopKCodec(k=128)}
VIEWS: dict[int, dict[str, Codec]] = {  # the smallest, and several that fill 75 bytes
    10: {"float16": Raw(), "all, 8 bits": TopKCodec(None, 8), "all, 6 bits": TopKCodec(None, 6)},
    100: {"float16": Raw(), "all, 4 bits": TopKCodec(None, 4), "all, 5 bits": TopKCodec(None, 5)},
    1_000: {"float16": Raw(), "k=56, 4 bits": TopKCodec(56, 4), "k=50, 5 bits": TopKCodec(50, 5)},
}
VIEWS[100] |= {"k=77, 6 bits": TopKCodec(77, 6), "k=58, 8 bits": TopKCodec(58, 8)}
VIEWS[1_000] |= {"k=45, 6 bits": TopKCodec(45, 6), "k=20, 6 bits": TopKCodec(20, 6)}


def texts() -> tuple[str, str]:
    """To train on, and held out: the last tenth of WikiText-2's validation text and Shakespeare's test part."""
    wiki = pq.read_table(DATA / "lm" / "wikitext2_valid_test.parquet").to_pylist()
    valid = [row["text"] for row in wiki if row["split"] == "validation"]
    seen = [row["text"] for row in wiki if row["split"] == "test"] + valid[: len(valid) * 9 // 10]
    held = valid[len(valid) * 9 // 10 :]
    for row in pq.read_table(DATA / "lm" / "tinyshakespeare.parquet").to_pylist():
        (held if row["split"] == "test" else seen).append(row["text"])
    return "\n".join(seen), "\n".join(held)


def language_model(vocabulary: int, scratch: Path) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Logits ``[POSITIONS, V]`` for held-out text, how often each token comes in training, and facts of the model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    seen, held = texts()
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([seen], vocab_size=vocabulary, min_frequency=1, show_progress=False)
    train, test = (torch.tensor(tokenizer.encode(text).ids) for text in (seen, held))
    torch.manual_seed(0)
    size = tokenizer.get_vocab_size()
    config = LlamaConfig(
        vocab_size=size, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    file = scratch / f"lm_{vocabulary}.safetensors"
    if file.is_file():
        load_into(model, file)
    else:
        fit(model, train, STEPS[vocabulary])
        save_model(model, str(file))
    pieces = test[: len(test) // LENGTH * LENGTH].view(-1, LENGTH)
    pieces = pieces[torch.linspace(0, len(pieces) - 1, POSITIONS // LENGTH).long()]
    with torch.no_grad():
        logits = model.eval()(input_ids=pieces).logits
    log_p = logits.log_softmax(-1)
    surprise = nn.functional.nll_loss(log_p[:, :-1].flatten(0, 1), pieces[:, 1:].flatten())
    facts = {
        "vocabulary": size,
        "steps": STEPS[vocabulary],
        "held_out_nats_a_token": round(float(surprise), 3),
        **sharpness(logits.flatten(0, 1)),
    }  # fmt: skip
    return logits.flatten(0, 1), torch.bincount(train, minlength=size), facts


def sharpness(logits: Tensor) -> dict[str, Any]:
    """How sure predictions are, and of how many positions it is told."""
    log_p = logits.log_softmax(-1)
    return {
        "positions": len(logits),
        "mean_entropy": round(float(-(log_p.exp() * log_p).sum(-1).mean()), 3),
        "mean_largest_probability": round(float(log_p.exp().amax(-1).mean()), 3),
    }


def fit(model: nn.Module, tokens: Tensor, steps: int) -> None:
    """Train on random pieces of text, the rate falling linearly."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.05)
    warm = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 100) * max(0.02, 1 - step / steps)
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        starts = torch.randint(0, len(tokens) - LENGTH, (BATCH, 1), generator=generator)
        batch = tokens[starts + torch.arange(LENGTH)]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warm.step()
        if step % 100 == 0:
            print(f"step {step} of {steps}: {float(loss.detach()):.3f} nats a token", file=sys.stderr, flush=True)


def image_logits(scratch: Path) -> Tensor:
    """Of ResNet-56 for CIFAR-10's first test images, ``[IMAGES, 10]``."""
    file = scratch / "cifar10_logits.npy"
    if not file.is_file():
        weights = DATA / "teachers" / "cifar10_resnet56.safetensors"
        teacher = load_model("resnet56_a", num_classes=10, weights=weights).eval()
        rows = next(pq.ParquetFile(DATA / "cifar10" / "test.parquet").iter_batches(IMAGES, columns=["image"]))
        pictures = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows.to_pylist()]
        images = torch.stack([torch.from_numpy(np.array(p)) for p in pictures]).permute(0, 3, 1, 2)
        with torch.no_grad():
            parts = [teacher(normalisation("imagenet")(part)) for part in images.split(100)]
        np.save(file, torch.cat(parts).numpy())
    return torch.from_numpy(np.load(file))


def measure(codecs: Mapping[str, Codec], logits: Tensor, rounds: int) -> list[dict[str, Any]]:
    """A row of the table for each codec."""
    classes, count = logits.shape[1], len(logits)
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    found = []
    for name, codec in codecs.items():
        arrays = codec.encode(logits)
        calls[name, "encode"] = partial(codec.encode, logits)
        calls[name, "decode"] = partial(codec.decode, arrays, [classes], logits.dtype)
        errors = codec.errors(logits, codec.decode(arrays, [classes], logits.dtype), (1.0, 4.0))
        row: dict[str, Any] = {"classes": classes, "codec": name, "options": codec.written()[codec.name]}
        row["bytes"] = sum(array.nbytes for array in arrays.values()) / count
        if "ids" in arrays:
            k = codec.k  # type: ignore[attr-defined]
            row |= {"id_bytes": set_bytes(classes, k), "id_floor": round(set_floor_bits(classes, k) / 8, 1)}
        for key, values in errors.items():
            row[key] = {"mean": float(f"{values.mean():.3g}"), "max": float(f"{values.max():.3g}")}
        found.append(row)
    calls["", "topk"] = lambda: logits.topk(min(50, classes), dim=1)
    times: dict[tuple[str, str], list[float]] = {what: [] for what in calls}
    for _ in range(rounds):
        for what, call in calls.items():
            start = time.perf_counter()
            call()
            times[what].append(time.perf_counter() - start)
    for row in found:
        for side in ("encode", "decode"):
            taken = times[row["codec"], side]
            ratios = [a / b for a, b in zip(taken, times["", "topk"], strict=True)]
            row[f"{side}_over_topk"] = float(f"{statistics.median(ratios):.3g}")
            row[f"{side}_a_second"] = float(f"{count / statistics.median(taken):.3g}")
    return found


def level_places(sets: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Divergence at 1 and 4 by the temperature that the levels are placed for; 50 classes or all, 6 bits."""
    rows = []
    for name, logits in sets.items():
        for temperature in (2 / 3, 1.0, 4 / 3, 2.0, 4.0, 1000.0):
            codec = TopKCodec(min(50, logits.shape[1]), 6, temperature)
            decoded = codec.decode(codec.encode(logits), logits.shape[1:], logits.dtype)
            errors = codec.errors(logits, decoded, (4.0,))
            means = {key: float(f"{values.mean():.3g}") for key, values in errors.items()}
            rows.append({"logits": name, "temperature": round(temperature, 2), **means})
    return rows


def by_formula() -> list[dict[str, Any]]:
    """Bytes of a token for vocabularies as they are in use; limbeck's 50 classes at 6 bits, and its peers'."""

    def distillkit(vocabulary: int, k: int, exact: int, terms: int) -> int:
        ids = math.ceil(k * math.ceil(math.log2(vocabulary)) / 8)
        return ids + math.ceil((16 * exact + 32 * terms) / 8)

    return [
        {
            "vocabulary": vocabulary,
            "k": k,
            "limbeck": TopKCodec(k).bytes_a_position([vocabulary]),
            "id_bytes": set_bytes(vocabulary, k),
            "id_floor": round(set_floor_bits(vocabulary, k) / 8, 1),
            "distillkit": distillkit(vocabulary, k, exact, terms),
            "int32_float16": 6 * k,
        }
        for vocabulary in (32_000, 128_256, 151_936)
        for k, exact, terms in ((50, 1, 3), (128, 16, 6))  # their budget and their recommended settings
    ]


def show(rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    """A table on stderr; ``kl.mean`` reads within."""

    def cell(row: dict[str, Any], key: str) -> str:
        value: Any = row
        for part in key.split("."):
            value = value.get(part, "") if isinstance(value, dict) else ""
        return (
            f"{value:,.0f}"
            if isinstance(value, float) and value >= 1000
            else f"{value:,}"
            if isinstance(value, int)
            else str(value)
        )

    lines = [list(columns), *([cell(row, key) for key in columns.values()] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)), file=sys.stderr)
    print(file=sys.stderr)


def main() -> None:
    """Train or read, store, and tell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, default=SCRATCH, help="folder for the trained models")
    parser.add_argument("--rounds", type=int, default=7, help="of timing")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    if not DATA.is_dir():
        parser.error(f"no real data in {DATA}; set LIMBECK_DATA to their folder")
    given.scratch.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    images = image_logits(given.scratch)
    small, frequency, small_facts = language_model(2_000, given.scratch)
    frequent = frequency.argsort(descending=True, stable=True)
    rows = measure(LANGUAGE, small, given.rounds)
    large, _, large_facts = language_model(32_000, given.scratch)
    rows += measure(LANGUAGE, large, given.rounds)
    views = {classes: images if classes == 10 else small[:, frequent[:classes]] for classes in VIEWS}
    view_rows = [row for classes, logits in views.items() for row in measure(VIEWS[classes], logits, given.rounds)]
    levels = level_places({"images, 10": images, "language, 2000": small, "language, 32000": large})
    formula = by_formula()
    facts = {
        "benchmark": "cache_codecs",
        "machine": platform.machine(),
        "torch": torch.__version__,
        "models": {"language 2000": small_facts, "language 32000": large_facts},
        "view_logits": {classes: sharpness(logits) for classes, logits in views.items()},
        "language": rows,
        "views": view_rows,
        "levels": levels,
        "by_formula": formula,
    }
    print(json.dumps(facts))
    columns = {"classes": "classes", "codec": "codec", "bytes": "bytes", "ids": "id_bytes", "floor": "id_floor"}
    columns |= {
        f"{label} {kind}": f"{key}.{kind}"
        for label, key in (("kept", "kl_kept"), ("all", "kl"), ("T=4", "kl_t4"))
        for kind in ("mean", "max")
    }
    columns |= {"encode/s": "encode_a_second", "/topk": "encode_over_topk", "decode/s": "decode_a_second"}
    show(rows, columns)
    show(view_rows, columns)
    show(levels, {"logits": "logits", "levels for T": "temperature", "kept, T=1": "kl_kept", "all, T=4": "kl_t4"})
    show(formula, {key: key for key in formula[0]})
    if given.write:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()

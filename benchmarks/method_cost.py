"""What one training step of each method costs over a step of plain KD on the same pair: time and memory.

Student resnet20, teacher resnet56, images of 32 x 32 pixels. A method that needs queries or attention maps is
measured on vision transformers instead, one that needs embeddings of tokens on language models (64 tokens of 1000 a
text), and one made for several labels, for coordinates or for pairs of images and texts on data of that kind, with the
same networks where it can; KD always on the same pair and batch. Each method trains with what its card calls usual; KD
with its own. Steps of both alternate, so that a busy machine slows both, and the median of the ratios of neighbours is
told. Memory is the peak of the process during a step over what it held before (Linux; on CUDA the allocator's peak).

Run: ``python benchmarks/method_cost.py [--batch 64] [--steps 5] [--device cuda] [--methods kd,dkd]``. The table goes to
stderr, one line of JSON to stdout; ``--write`` keeps it in benchmarks/results.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.core import catalogue
from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.errors import LimbeckError
from limbeck.core.objective import DataInfo
from limbeck.models import create
from limbeck.models.heads import fit_head
from limbeck.recipes.build import loss_of
from limbeck.recipes.schema import usual_terms
from limbeck.teachers.several import SeveralTeachers

RESULT = Path(__file__).parent / "results" / "method_cost.json"
CLASSES, SAMPLES = 10, 50_000
TOKENS, LENGTH = 1000, 64  # of the texts for language models
Pair = tuple[nn.Module, nn.Module]


def convolutional() -> Pair:
    """resnet20 and resnet56."""
    return create("resnet20", num_classes=CLASSES), create("resnet56", num_classes=CLASSES)


def vision_transformer(width: int, depth: int) -> nn.Module:
    """One of transformers' that hands out its attention maps."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": 3, "intermediate_size": 4 * width}
    config = ViTConfig(image_size=32, patch_size=4, num_labels=CLASSES, attn_implementation="eager", **sizes)
    return ViTForImageClassification(config)


def transformers() -> Pair:
    """Two vision transformers."""
    return vision_transformer(96, 4), vision_transformer(192, 8)


def crossed() -> Pair:
    """A convolutional student of a transformer."""
    return create("resnet20", num_classes=CLASSES), vision_transformer(192, 8)


def language_model(width: int, depth: int) -> nn.Module:
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: Any = {"hidden_size": width, "num_hidden_layers": depth, "intermediate_size": 4 * width}
    return LlamaForCausalLM(LlamaConfig(vocab_size=TOKENS, num_attention_heads=4, **sizes))


def languages() -> Pair:
    """Two language models."""
    return language_model(64, 2), language_model(128, 4)


class Matcher(nn.Module):
    """Images and texts to match scores ``[B, B]``."""

    def __init__(self, tower: str) -> None:
        super().__init__()
        self.tower, self.words = create(tower, num_classes=64), nn.EmbeddingBag(16, 64)

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        return 5 * F.normalize(self.tower(images), dim=1) @ F.normalize(self.words(ids), dim=1).T


def encoders() -> Pair:
    """Two models of match scores."""
    return Matcher("resnet20"), Matcher("resnet56")


def batch(kind: str, size: int, device: torch.device) -> Batch:
    """Random data of one kind."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randperm(SAMPLES, generator=generator)[:size]
    if kind == "language":
        ids = torch.randint(0, TOKENS, (size, LENGTH + 1), generator=generator)
        return Batch({"input_ids": ids[:, :-1], "use_cache": False}, ids[:, 1:], index).to(device)
    images = torch.randn(size, 3, 32, 32, generator=generator)
    if kind == "retrieval":
        return Batch((images, torch.randint(0, 16, (size, 6), generator=generator)), index=index).to(device)
    labels: Any = index % CLASSES
    if kind == "multilabel":
        labels = (torch.rand(size, CLASSES, generator=generator) < 0.3).float()
    if kind == "regression":
        labels = torch.randn(size, CLASSES, generator=generator)
    extras = {  # for the methods that ask: what a language model answered, a second teacher, what is private
        "aspects": torch.rand(size, 50, generator=generator),
        "tolerant": torch.randn(size, CLASSES, generator=generator),
        "privacy": torch.rand(size, generator=generator),
    }
    return Batch(images, labels, index, extras=extras).to(device)


def stepper(key: str, pair: Callable[[], Pair], data: Batch, terms: Any = None) -> Callable[[], None]:
    """One training step of a method; set up and ready."""
    torch.manual_seed(0)
    student, teacher = (model.to(data.index.device) for model in pair())  # type: ignore[union-attr]
    loss = loss_of(terms if terms is not None else usual_terms(key))
    fit_head(student, loss, example=data, teacher=teacher)
    judge: nn.Module | SeveralTeachers = teacher
    if "several teachers" in catalogue.get(key).card.tasks:
        judge = SeveralTeachers([teacher, copy.deepcopy(teacher), copy.deepcopy(student)])
    info = DataInfo(SAMPLES, torch.arange(SAMPLES) % CLASSES, CLASSES, batches=lambda: iter([data] * 2))
    distiller = Distiller(student, loss, judge).setup(data, info).train()
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        distiller(data.replace(progress=0.5)).total.backward()
        optimizer.step()
        if data.inputs is not None and torch.cuda.is_available() and optimizer.param_groups[0]["params"][0].is_cuda:
            torch.cuda.synchronize()

    return step


def seconds(step: Callable[[], None]) -> float:
    """Of one step."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def peak(step: Callable[[], None], device: torch.device) -> float:
    """Bytes that a step holds at most over what was there before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed goes back, so that it is not counted as held
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measure(key: str, size: int, steps: int, device: torch.device) -> dict[str, Any]:
    """A method's ratios to KD on the first pair it works with."""
    tasks = set(catalogue.get(key).card.tasks)
    special = next(
        (t for t in ("multilabel", "regression", "retrieval") if t in tasks and "classification" not in tasks), None
    )
    pairs = {"resnet56 to resnet20": convolutional, "ViT to ViT": transformers, "ViT to resnet20": crossed}
    if special == "retrieval":
        pairs = {"two resnets and word vectors": encoders}
    elif special is None and "language" in tasks:
        pairs["Llama to Llama"] = languages
    problems = []
    for name, pair in pairs.items():
        data = batch("language" if pair is languages else special or "classes", size, device)
        kd_terms = {"kd": usual_terms("kd")["kd"]} if special else None
        try:
            own = stepper(key, pair, data)
            own()
        except LimbeckError as error:
            problems.append(f"{name}: {error}")
            continue
        plain = stepper("kd", pair, data, kd_terms)
        plain()
        ratios = [(seconds(own), seconds(plain)) for _ in range(steps)]
        own_peak, plain_peak = peak(own, device), peak(plain, device)
        return {
            "pair": name,
            "time": round(statistics.median(a / b for a, b in ratios), 3),
            "seconds": round(statistics.median(a for a, _ in ratios), 4),
            "kd_seconds": round(statistics.median(b for _, b in ratios), 4),
            "memory": round(own_peak / plain_peak, 3),
            "memory_mb": round(own_peak / 2**20, 1),
        }
    raise LimbeckError(f"{key} works with no pair: {'; '.join(problems)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", default="")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    if given.device == "cpu":
        torch.set_num_threads(1)
    wanted = [key for key in given.methods.split(",") if key] or list(catalogue.methods())
    rows = {}
    for key in wanted:
        try:
            rows[key] = measure(key, given.batch, given.steps, torch.device(given.device))
        except LimbeckError as error:
            print(error, file=sys.stderr)
            continue
        row = rows[key]
        print(
            f"{key:24} time {row['time']:7.3f}  memory {row['memory']:7.3f}  ({row['pair']})",
            file=sys.stderr,
            flush=True,
        )
    facts = {
        "benchmark": "method_cost",
        "bound": "a step of plain KD on the same pair",
        "batch": given.batch,
        "device": given.device if given.device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "methods": rows,
    }
    print(json.dumps(facts))
    if given.write:
        known = json.loads(RESULT.read_text())["methods"] if given.methods and RESULT.is_file() else {}
        facts["methods"] = dict(sorted({**known, **rows}.items()))
        RESULT.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()

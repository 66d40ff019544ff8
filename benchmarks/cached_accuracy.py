"""Whether students of a cached teacher end where those of the teacher itself do, and whether both see the same views.

One recipe with augmented views, each of which comes again, is run over seeds by ``limbeck.recipes.compare``: with its
teacher beside the student, with the teacher's cache in half precision in its place, and with one in full precision.
All share order, start and views of a seed. Told are the test accuracies, the interval of their mean, and the paired
differences with theirs (Student's t over seeds, 95%). The bound is the online teacher: the difference is to be nothing
that the seeds bear out, and smaller than the half width of the interval of its students. The cache in full precision
says what rounding alone does: it differs from the online teacher by how many samples that saw at once.

Views: what the cache's builder shows the teacher is held against every batch of every epoch that a student sees, of
each kind and for every seed, bit for bit; and that all kinds of students see the same batches is told by a hash.

Run: ``python benchmarks/cached_accuracy.py [--recipe digits] [--seeds 5] [--views 4] [--set PLACE=VALUE]``. The table
goes to stderr, one line of JSON to stdout; ``--write`` keeps it in benchmarks/results.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from limbeck.analysis.statistics import compare_paired, summarise
from limbeck.cache.folder import Cache
from limbeck.data.loader import IndexedLoader
from limbeck.recipes import compare as comparison
from limbeck.recipes.build import fewer, source_of, train_loader
from limbeck.recipes.caching import build_cache, cache_of
from limbeck.recipes.load import load
from limbeck.recipes.schema import Recipe

RESULT = Path(__file__).parent / "results" / "cached_accuracy.json"
SHOWN = {"digits": ["data.augment=[{pad_crop: {padding: 1}}]"]}  # the shipped recipe augments nothing


def loader_of(recipe: Recipe, seed: int) -> IndexedLoader:
    """What a run of this seed trains on."""
    data, cache = recipe.data, cache_of(recipe.teacher, recipe.data)
    loader = train_loader(data, fewer(source_of(data).train, data.samples), seed, cache=cache)
    assert isinstance(loader, IndexedLoader)
    return loader


def walked(loader: IndexedLoader, seen: torch.Tensor, steps: int) -> tuple[str, int, int]:
    """A hash of a run's batches, how many samples were shown, and how many of them not as the teacher saw them."""
    found, shown, other, epoch = hashlib.blake2b(digest_size=16), 0, 0, 0
    while steps > 0:
        for batch in loader.batches(epoch):
            index, view = batch.require("index"), torch.as_tensor(batch.view).expand(batch.size)
            for part in (batch.inputs, batch.require("labels"), index):
                found.update(part.contiguous().numpy().tobytes())
            same = (batch.inputs == seen[view, index]).flatten(1).all(dim=1)
            shown, other, steps = shown + batch.size, other + int((~same).sum()), steps - 1
            if not steps:
                break
        epoch += 1
    return found.hexdigest(), shown, other


def views(recipes: dict[str, Recipe], seeds: list[int], steps: int, cache: Cache) -> dict[str, Any]:
    """Every view that the teacher was asked about, held against every batch that students see."""
    builder = loader_of(recipes["online"], recipes["online"].seed)
    index = torch.arange(builder.samples)
    seen = torch.stack([batch.inputs for batch in builder.read([[(index, v)] for v in range(cache.header.views)])])
    shown, other, same = 0, 0, True
    for seed in seeds:
        told = [walked(loader_of(recipe, seed), seen, steps) for recipe in recipes.values()]
        same &= len({t[0] for t in told}) == 1
        shown, other = shown + sum(t[1] for t in told), other + sum(t[2] for t in told)
    return {"shown": shown, "not_as_the_teacher_saw_them": other, "same_batches_of_all_kinds": same}


def measure(recipe: str, settings: list[str], seeds: int, out: Path) -> dict[str, Any]:
    """Build the caches, train all students, and hold their views against each other."""
    recipes, caches = {"online": load(recipe, settings)}, {}
    for name, dtype in (("cached", "float16"), ("cached_float32", "float32")):
        place = out / "online" / name  # beside the teachers of the comparison, so that it is trained once
        caches[name] = build_cache(recipes["online"], place, store={"logits": {"raw": {"dtype": dtype}}}, quiet=True)[0]
        recipes[name] = load(recipe, [*settings, f"teacher.cache={place}"])
    found = {}
    for name, each in recipes.items():

        def say(text: str, name: str = name) -> None:
            print(f"{name}: {text}", file=sys.stderr)

        found[name] = comparison.compare(each, ["kd"], seeds, controls=False, out=out / name, quiet=True, say=say)
    runs = {name: facts["methods"][0]["runs"] for name, facts in found.items()}
    numbers, steps = [run["seed"] for run in runs["online"]], runs["online"][0]["steps"]
    accuracy = {name: [run["accuracy"] for run in each] for name, each in runs.items()}
    summary = {name: summarise(values) for name, values in accuracy.items()}
    difference = {name: compare_paired(accuracy[name], accuracy["online"]) for name in caches}
    low, high = summary["online"]["interval"] or (float("nan"),) * 2
    half = caches["cached"]
    return {
        "recipe": {
            k: v for k, v in recipes["online"].written().items() if k in ("data", "teacher", "student", "loss", "train")
        },
        "seeds": numbers,
        "steps": steps,
        "samples": found["online"]["data"]["samples"],
        "accuracy": accuracy,
        "summary": summary,
        "difference": difference,
        "within": abs(difference["cached"]["mean"]) <= (high - low) / 2
        and difference["cached"]["verdict"] == "unclear",
        "seconds": {name: [run["seconds"] for run in each] for name, each in runs.items()},
        "views": views(recipes, numbers, steps, half),
        "cache": {
            "rows": half.header.rows,
            "bytes_a_row": round(half.bytes / half.header.rows, 2),
            "errors": half.errors,
        },
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--set", action="append", default=[], metavar="PLACE=VALUE", help="change a setting")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--out", type=Path, help="folder of the runs; default one that is removed afterwards")
    parser.add_argument("--name", help="of the result beside those of other recipes; default the recipe's")
    parser.add_argument("--write", action="store_true", help=f"also write {RESULT}")
    options = parser.parse_args()
    settings = [*SHOWN.get(options.recipe, []), f"data.views={options.views}", "data.view_seed=0", *options.set]
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(options.recipe, settings, options.seeds, options.out or Path(scratch))
    name = options.name or Path(options.recipe).stem
    whole = {
        "benchmark": "cached_accuracy",
        "bound": "the same runs with the teacher beside the student",
        "torch": torch.__version__,
        "machine": platform.machine(),
        "runs": {name: result},
    }
    print(json.dumps(whole))
    kinds = list(result["accuracy"])
    print("    seed " + " ".join(f"{kind:>15}" for kind in kinds), file=sys.stderr)
    for place, seed in enumerate(result["seeds"]):
        row = " ".join(f"{result['accuracy'][kind][place]:15.4f}" for kind in kinds)
        print(f"{seed:8} {row}", file=sys.stderr)
    for kind, each in result["difference"].items():
        half = (each["interval"][1] - each["mean"]) if each["interval"] else float("nan")
        print(f"{kind} - online {each['mean']:+.4f} +- {half:.4f}, {each['verdict']}", file=sys.stderr)
    print(f"views: {result['views']}", file=sys.stderr)
    if options.write:
        kept = json.loads(RESULT.read_text())["runs"] if RESULT.is_file() else {}
        RESULT.write_text(json.dumps({**whole, "runs": {**kept, name: result}}, indent=1) + "\n")


if __name__ == "__main__":
    main()

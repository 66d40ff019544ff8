"""Federated methods on scikit-learn's digits: accuracy and bytes of every round, and a client that is killed.

Ten clients hold four fifths of the training set, split by a Dirichlet law with alpha 0.1, so that most know a few
digits; a fifth is public. All methods train the same small model for as many rounds at the same learning rate, from the
recipe `digits` and with the options below, which were not tuned. Bounds: all private samples with one owner, and the
public samples alone with their labels, for as many epochs. FedMD is run as published, where clients learn the public
labels first, and without these. Bytes are the lengths of what crossed the wire, up from all clients and down to them.

In the run `fedavg_killed` clients are processes, and the kernel kills one (SIGKILL) in the middle of a round.

Run: ``python benchmarks/federated_digits.py [--seeds 3] [--rounds 20] [--write]``. The table goes to stderr, one line
of JSON to stdout; ``--write`` puts it into results/federated_digits.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from limbeck.core.distiller import Distiller
from limbeck.engine import Stage, TrainConfig, fit
from limbeck.engine.evaluation import evaluate
from limbeck.models import create
from limbeck.objectives import CrossEntropy
from limbeck.recipes.build import check_loader, source_of, train_loader
from limbeck.recipes.load import load
from limbeck.recipes.run import run
from limbeck.schemes import Cast
from limbeck.schemes.federated.clients import Answers, Processes
from limbeck.schemes.federated.local import Round
from limbeck.schemes.federated.owners import split_among
from limbeck.schemes.federated.rounds import record
from limbeck.schemes.federated.wire import Tensors

MODEL, LR, PUBLIC = "mlp_64", 0.05, 0.2
SHARED = f"count: 10, alpha: 0.1, public: {PUBLIC}"
SMALL = "images: 10, server_images: 10, warm_up: 100, match_steps: 20, server_steps: 50, times: 3"
METHODS = {
    "one_owner": f"{{fedavg: {{count: 1, alpha: null, public: {PUBLIC}, epochs: 3}}}}",
    "fedavg": f"{{fedavg: {{{SHARED}, epochs: 3}}}}",
    "fedmd": f"{{fedmd: {{{SHARED}, epochs: 3}}}}",
    "fedmd_no_public_labels": f"{{fedmd: {{{SHARED}, epochs: 3, start_public: 0}}}}",
    "knfu": f"{{knfu: {{{SHARED}, epochs: 3}}}}",
    "fedlgd": f"{{fedlgd: {{{SHARED}, {SMALL}, epochs: 3}}}}",
    "fedavg_killed": f"{{fedavg: {{{SHARED}, epochs: 3, clients: processes}}}}",
}
KILLED = {"client": 3, "round": 5}


def settings(seed: int, rounds: int, scheme: str) -> list[str]:
    """What is changed in the recipe `digits`."""
    data = ["teacher=null", "data.samples=null", "data.batch_size=32", f"student={{model: {MODEL}}}"]
    train = f"train={{epochs: {rounds}, lr: {LR}, validate_epochs: 1, device: cpu}}"
    return [*data, "loss=cross_entropy", train, f"seed={seed}", f"scheme={scheme}"]


@contextlib.contextmanager
def killing() -> Iterator[None]:
    """Kill a client's process while it trains in a round."""
    ask = Processes.ask

    def watched(self: Processes, place: Round, kept: Mapping[int, Tensors], told: Mapping[int, bytes]) -> Answers:
        if place.number + 1 == KILLED["round"]:
            process, _ = self.running[KILLED["client"]]
            assert process.pid is not None
            threading.Timer(0.005, os.kill, (process.pid, signal.SIGKILL)).start()
        return ask(self, place, kept, told)

    with patch.object(Processes, "ask", watched):
        yield


def one(name: str, seed: int, rounds: int) -> dict[str, Any]:
    """One run: figures of every round."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, killing() if name == "fedavg_killed" else contextlib.nullcontext():
        out = Path(folder) / "run"
        result = run(load("digits", settings(seed, rounds, METHODS[name])), out, quiet=True)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        wire = record(out)
    found = {
        "test_accuracy": result["accuracy"],
        "accuracy": [round(line["accuracy"], 4) for line in lines if line["split"] == "validation"],
        "bytes_up": [line["bytes_up"] for line in wire],
        "bytes_down": [line["bytes_down"] for line in wire],
        "lost": [{"round": line["round"], **lost} for line in wire for lost in line["lost"]],
        "seconds": round(time.perf_counter() - began, 1),
    }
    if "clients_mean" in wire[-1]:
        found["clients_mean"] = [round(line["clients_mean"], 4) for line in wire]
    return found


def public_labels(seed: int, rounds: int) -> dict[str, Any]:
    """The public samples alone, with their labels, for as many epochs as there are of all samples in `one_owner`."""
    recipe = load("digits", settings(seed, rounds, METHODS["fedmd"]))
    source = source_of(recipe.data)
    train = train_loader(recipe.data, source.train, seed)
    torch.manual_seed(seed)
    student, config = create(MODEL, num_classes=10, in_channels=1, image_size=8), TrainConfig(epochs=3 * rounds, lr=LR)
    loss = CrossEntropy()
    cast = Cast(student, 1.0 * loss, None, config, train, seed=seed)
    public = split_among(cast, "benchmark", 10, 0.1, 10, PUBLIC).public
    assert public is not None
    assert source.test is not None
    validation = None if source.validation is None else check_loader(recipe.data, source.validation)
    fit([Stage("public", Distiller(student, loss), config)], public, validation, quiet=True)
    return {
        "test_accuracy": evaluate(student, check_loader(recipe.data, source.test))["accuracy"],
        "samples": public.shown,
    }


def mean(rows: list[list[float]]) -> list[float]:
    """Of several seeds, round by round."""
    return [round(statistics.mean(values), 4) for values in zip(*rows, strict=True)]


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What a method comes to over its seeds."""
    ends = [one["test_accuracy"] for one in runs]
    found: dict[str, Any] = {
        "test_accuracy": round(statistics.mean(ends), 4),
        "test_accuracy_sd": round(statistics.stdev(ends), 4) if len(ends) > 1 else None,
        "seconds": round(statistics.mean(one["seconds"] for one in runs), 1),
        "accuracy_per_round": mean([one["accuracy"] for one in runs]),
        "bytes_up_per_round": [int(x) for x in mean([one["bytes_up"] for one in runs])],
        "bytes_down_per_round": [int(x) for x in mean([one["bytes_down"] for one in runs])],
        "lost": [one["lost"] for one in runs],
    }
    found["bytes_in_all"] = sum(found["bytes_up_per_round"]) + sum(found["bytes_down_per_round"])
    if "clients_mean" in runs[0]:
        found["clients_mean_per_round"] = mean([one["clients_mean"] for one in runs])
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--write", action="store_true", help="into results/federated_digits.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    bound = []
    for seed in range(options.seeds):
        bound.append(public_labels(seed, options.rounds))
        for name in METHODS:  # in turn, so that a busy machine slows all alike
            runs[name].append(one(name, seed, options.rounds))
            print(f"seed {seed} {name:24} {runs[name][-1]['test_accuracy']:.4f}", file=sys.stderr, flush=True)
    result = {
        "benchmark": "federated_digits",
        "command": f"python benchmarks/federated_digits.py --seeds {options.seeds} --rounds {options.rounds} --write",
        "model": MODEL,
        "clients": 10,
        "alpha": 0.1,
        "rounds": options.rounds,
        "lr": LR,
        "schemes": METHODS,
        "killed": KILLED,
        "methods": {name: summary(found) for name, found in runs.items()},
        "public_labels": {
            "test_accuracy": round(statistics.mean(one["test_accuracy"] for one in bound), 4),
            "samples": bound[0]["samples"],
        },
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": 1,
    }
    if options.write:
        place = Path(__file__).resolve().parents[1] / "results" / "federated_digits.json"
        place.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    print(f"{'':24} {'test':>7} {'round 5':>8} {'kB a round':>11} {'kB in all':>10} {'clients':>8}", file=sys.stderr)
    for name, found in result["methods"].items():
        a_round = found["bytes_in_all"] / options.rounds / 1000
        own = found.get("clients_mean_per_round", [float("nan")])[-1]
        fifth = found["accuracy_per_round"][min(4, options.rounds - 1)]
        line = f"{name:24} {found['test_accuracy']:7.4f} {fifth:8.4f} {a_round:11.1f}"
        print(f"{line} {found['bytes_in_all'] / 1000:10.1f} {own:8.4f}", file=sys.stderr)
    print(f"{'public labels alone':24} {result['public_labels']['test_accuracy']:7.4f}", file=sys.stderr)


if __name__ == "__main__":
    main()

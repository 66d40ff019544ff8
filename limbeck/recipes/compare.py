"""Several methods on one recipe, over seeds, against controls: what is a gain and what is noise."""

from __future__ import annotations

import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from limbeck.analysis.statistics import compare_paired, summarise
from limbeck.core.errors import ConfigError, DataError, LimbeckError, TrainingError
from limbeck.core.files import write_json
from limbeck.engine.journal import environment
from limbeck.engine.metrics import LOWER_IS_BETTER, headline
from limbeck.engine.operations import together
from limbeck.recipes.attempt import Failed, attempt, is_over
from limbeck.recipes.build import source_of
from limbeck.recipes.check import check
from limbeck.recipes.entries import Entry, controls_of, entries_of, with_budget
from limbeck.recipes.jobs import run_all
from limbeck.recipes.problem import RecipeError
from limbeck.recipes.rival import against
from limbeck.recipes.schema import Recipe

#: Figures of each run that are averaged over seeds, as far as there are.
FIGURES = (
    "perplexity",
    "bits_per_byte",
    "accuracy",
    "map_macro",
    "map_micro",
    "f1_macro",
    "f1_micro",
    "hamming",
    "agreement",
    "acceptance",
    "rouge_l",
    "exact_match",
    "kl",
    "js",
    "nll",
    "brier",
    "ece",
)
#: Where all controls are wanted, same_budget is left out if it would take more than so many times the others' steps.
_MOST_BUDGET = 5.0


def compare(
    recipe: Recipe,
    methods: Sequence[str],
    seeds: int | Sequence[int] = 3,
    controls: bool | Sequence[str] = True,
    *,
    out: str | os.PathLike[str],
    jobs: int = 1,
    quiet: bool = False,
    command: str | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run a recipe once for every method and control and every seed, and say which differences the seeds bear out.

    All runs take the same number of steps over the same data in the same order, from the same start, with the same
    teacher, which is trained or loaded once. Only the control ``same_budget`` takes more steps.

    ==================  ================================================================================================
    control             answers
    ==================  ================================================================================================
    ``no_teacher``      cross entropy alone: does a teacher help at all?
    ``label_smoothing`` soft labels that know nothing: is it more than a softer target?
    ``random_teacher``  KD from a teacher of the same architecture with random weights: is it what the teacher knows?
    ``tuned_kd``        KD at the temperature of 1, 2, 4 and 8 that does best on validation data: is it more than that?
    ``same_budget``     cross entropy for as many operations as distillation costs, teacher included: is it worth them?
    ==================  ================================================================================================

    Where they are named, on data of one class a sample: ``kd_pt``, ``kd_sim`` and ``kd_topk``, KD from how sure the
    teacher is of a sample, from how alike classes are to it, and from its first guesses: which part of what it knows?

    On multi-label data (the task of ``data.source``) figures are compared by mean average precision in the place of
    accuracy, cross entropy is binary, and KD is MLD, tuned by its weight; such data get the same beside each method.
    Language models are compared by perplexity, of which less is better: there a gain is a difference below zero.

    A scheme is compared as a method is: by its key it trains with the recipe's own loss, as ``"gkd/reverse_kl"`` with
    the usual loss of another method.

    Where all controls are wanted, ``same_budget`` is left out if it would take more than five times the steps, as
    beside a teacher that is large for its student; ``left_out`` says so.

    A method is compared with each control seed by seed; intervals are Student's t over seeds, 95%. ``gain`` names the
    difference to the best control (by mean), with a verdict: ``gain``, ``loss`` or ``unclear``.

    A run whose loss goes astray, or for which memory does not suffice, ends alone: its method has no line, and
    ``failed`` says which seed and why. Every run has its folder below ``out``; started again, a comparison reads the
    finished runs and goes on with the one that was interrupted. ``out/compare.json`` is written anew after each.

    Args:
        recipe: What every run does; its own loss, scheme and student's head are replaced, but for the loss of schemes.
        methods: Keys of the catalogue, with options where wanted: ``"kd"``, ``"kd:temperature=2,weight=0.5"``. Each
            trains with the companions and weights its card calls usual. Or schemes, as told above.
        seeds: How many, counted from the recipe's own, or which.
        controls: All of them, none, or some by name.
        out: Folder of the comparison.
        jobs: How many runs to do at a time, each in a process of its own; figures of speed suffer.
        quiet: Show no progress bars.
        command: What to note as the command; default the one this process was called with.
        say: Told before each run which it is.

    Returns:
        The content of ``compare.json``: ``status``, ``command``, ``recipe``, ``environment``, ``seeds``, ``data``,
        ``teacher`` (its figures and cost), ``best_control``, ``left_out``, ``failed``, and ``methods``: for each line
        its ``entry``, ``name``, ``role``, ``loss``, ``scheme``, cost, ``steps``, ``operations`` of training; of every
        figure and of ``seconds`` the ``mean``, ``sd`` and ``interval``; ``differences`` to each control; ``gain`` over
        the best; and ``runs``, one for each seed.

    Raises:
        RecipeError: With all that is wrong with any of the runs, before the first of them begins.
        ConfigError: No methods or seeds, unknown controls, or the folder holds runs of another recipe.
    """
    began, out, main = time.time(), Path(out), int(os.environ.get("RANK", "0")) == 0
    numbers = list(range(recipe.seed, recipe.seed + seeds)) if isinstance(seeds, int) else list(seeds)
    if not numbers or len(set(numbers)) != len(numbers):
        raise ConfigError("a comparison needs seeds, each once", where="seeds", found=repr(seeds), wanted="such as 3")
    task = _task(recipe)
    entries = entries_of(methods, controls_of(controls, recipe.teacher is not None, task), task)
    _check(recipe, entries)
    entries, left_out = with_budget(recipe, entries, _MOST_BUDGET if controls is True else None)
    if source_of(recipe.data).validation is None and any(entry.variants for entry in entries):
        if controls is not True:
            raise ConfigError("tuned_kd chooses on validation data", where="controls", found="none in this source")
        left_out["tuned_kd"] = "there are no validation data to choose a temperature on"
        entries = [entry for entry in entries if not entry.variants]
    metric, sign = headline(task), -1 if recipe.train.lower_is_better(task) else 1
    facts = {**_head(recipe, numbers, command, began), "metric": metric, "jobs": jobs, "left_out": left_out}
    for name, reason in left_out.items():
        if say is not None:
            say(f"without the control {name}: {reason}; name it among the controls to run it all the same")
    each = list({run.entry: run for entry in entries for run in entry.runs}.values())
    runs = [(entry, seed, out / "runs" / f"{entry.slug}-seed{seed}") for seed in numbers for entry in each]
    if jobs != 1:
        tasks = [(f"{entry.name}, seed {seed}", entry.recipe(recipe, seed), folder) for entry, seed, folder in runs]
        run_all(tasks, jobs, teachers=out / "teachers", say=say)
    results: dict[str, list[dict[str, Any]]] = {entry.entry: [] for entry in each}
    failed: list[dict[str, Any]] = []
    for number, (entry, seed, folder) in enumerate(runs, 1):
        if say is not None and not is_over(folder):
            say(f"run {number} of {len(runs)}: {entry.name}, seed {seed}")
        try:
            result = attempt(entry.recipe(recipe, seed), folder, teachers=out / "teachers", quiet=quiet)
        except Failed as reason:
            failed.append({"entry": entry.entry, "name": entry.name, "seed": seed, "error": str(reason)})
            if say is not None:
                say(f"{entry.name}, seed {seed}, failed: {reason}")
            continue
        if not main:  # in a distributed run one process writes
            continue
        if entry.rival:
            result = {**result, **against(recipe, folder, out / "teachers", result)}
        results[entry.entry].append({**result, "folder": folder.relative_to(out).as_posix()})
        body = _body(_whole(entries, failed), results, metric, sign)
        _write(out, {**facts, **body, "failed": failed, "status": "running", "seconds": time.time() - began})
    if not main:
        return {}
    if not any(results.values()):
        raise TrainingError(f"every run failed: {failed[0]['error']}", where=failed[0]["name"])
    body = {**_body(_whole(entries, failed), results, metric, sign), "failed": failed}
    whole = {**facts, **body, "status": "finished", "seconds": round(time.time() - began, 3)}
    _write(out, whole)
    return whole


def _whole(entries: list[Entry], failed: list[dict[str, Any]]) -> list[Entry]:
    """The lines of which no run failed: a mean over the seeds that went well would flatter. Variants fall out alone."""
    lost, left = {run["entry"] for run in failed}, []
    for entry in entries:
        variants = tuple(v for v in entry.variants if v.entry not in lost)
        if variants or not (entry.variants or entry.entry in lost):
            left.append(replace(entry, variants=variants))
    return left


def _check(recipe: Recipe, entries: list[Entry]) -> None:
    """All mistakes of all runs at once; a mistake that several share is told once."""
    problems = list(
        dict.fromkeys(p for entry in entries for r in entry.runs for p in check(r.recipe(recipe, recipe.seed)))
    )
    if problems:
        raise RecipeError(problems, recipe.name)


def _head(recipe: Recipe, seeds: list[int], command: str | None, began: float) -> dict[str, Any]:
    called = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {
        "kind": "comparison",
        "format": 1,
        "name": recipe.name,
        "command": called if command is None else command,
        "started": round(began, 3),
        "environment": {**environment(), **_machine()},
        "recipe": recipe.written(),
        "seeds": seeds,
        "interval": "Student's t over seeds, 95%",
    }


def _machine() -> dict[str, Any]:
    """What figures of speed depend on, and nothing that names this one machine."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = models[0] if models else platform.processor()
    system = f"{platform.system()} {platform.machine()}"
    return {"platform": system, "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def _task(recipe: Recipe) -> str:
    """What the labels mean; where the data cannot be read, the check of the recipe tells."""
    try:
        return source_of(recipe.data).task
    except LimbeckError:
        return "classification"


def _body(entries: list[Entry], results: dict[str, list[dict[str, Any]]], metric: str, sign: int) -> dict[str, Any]:
    """Everything that follows from the runs so far.

    Args:
        entries: The lines.
        results: Of each run.
        metric: What methods are compared by.
        sign: 1 where more of what validation judges by is better, else -1.
    """
    lower = metric in LOWER_IS_BETTER
    entries, results = _chosen(entries, results, sign)
    begun = [entry for entry in entries if results[entry.entry]]
    first = results[begun[0].entry][0]
    if first.get(metric) is None:
        raise DataError("a comparison needs labels in the held-out data", where="data.source")
    rows = [_row(entry, results[entry.entry]) for entry in begun]
    reached = {row["entry"]: {r["seed"]: r[metric] for r in row["runs"]} for row in rows}
    controls = [row["entry"] for row in rows if row["role"] == "control"]
    best = (min if lower else max)(controls, key=lambda c: statistics.fmean(reached[c].values()), default=None)
    for row in rows:
        row["differences"] = {
            c: _difference(reached[row["entry"]], reached[c], lower) for c in controls if c != row["entry"]
        }
        against_best = row["differences"].get(best) if row["role"] == "method" and best is not None else None
        row["gain"] = None if against_best is None else {"over": best, **against_best}
    honest = next((r for e in begun if not e.rival for r in results[e.entry] if r.get("teacher")), None)
    teacher = None if honest is None else {k: v for k, v in honest["teacher"].items() if k not in _DETAILS}
    data = {"split": first["split"], "samples": first["samples"], "classes": first["classes"], "source": first["data"]}
    return {"data": data, "teacher": teacher, "best_control": best, "methods": rows}


def _chosen(
    entries: list[Entry], results: dict[str, list[dict[str, Any]]], sign: int
) -> tuple[list[Entry], dict[str, list[dict[str, Any]]]]:
    """Every line by itself: of several variants the one that does best on validation data, the earliest of equals."""
    found, lines = dict(results), []
    for entry in entries:
        if entry.variants:
            best = max(entry.variants, key=lambda v: _validated(results[v.entry], sign))
            found[entry.entry] = results[best.entry]
            entry = replace(entry, loss=best.loss, about=f"{entry.about}: {best.entry}")
        lines.append(entry)
    return lines, found


def _validated(runs: list[dict[str, Any]], sign: int) -> float:
    values = [sign * r["training"]["validation"] for r in runs if r["training"].get("validation") is not None]
    return statistics.fmean(values) if values and len(values) == len(runs) else float("-inf")


_DETAILS = ("reliability", "per_class")


def _row(entry: Entry, results: list[dict[str, Any]]) -> dict[str, Any]:
    runs = [
        {
            "seed": r["seed"],
            "folder": r["folder"],
            **{name: r[name] for name in FIGURES if name in r},
            "latency_ms": r.get("latency_ms"),
            "steps": r["training"]["steps"],
            "seconds": r["training"]["seconds"],
        }
        for r in results
    ]
    latencies = [r["latency_ms"] for r in runs if r["latency_ms"] is not None]
    return {
        **entry.facts(),
        "parameters": results[0]["parameters"],
        "flops": results[0].get("flops"),
        "latency_ms": statistics.median(latencies) if latencies else None,
        "steps": runs[0]["steps"],
        "operations": together([o for r in results if (o := r["training"].get("operations"))][:1]),
        "seconds": summarise([r["seconds"] for r in runs]),
        **{name: summarise([r[name] for r in runs]) for name in FIGURES if all(r.get(name) is not None for r in runs)},
        "runs": runs,
    }


def _difference(values: dict[int, float], control: dict[int, float], lower: bool) -> dict[str, Any]:
    both = [seed for seed in values if seed in control]
    return compare_paired([values[s] for s in both], [control[s] for s in both], lower)


def _write(out: Path, facts: dict[str, Any]) -> None:
    write_json(out / "compare.json", facts)

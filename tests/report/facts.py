"""A comparison's facts as `compare` writes them, with figures that cover every verdict."""

from __future__ import annotations

from typing import Any

from limbeck.analysis.statistics import compare_paired, summarise

ACCURACY = {
    "no_teacher": [0.900, 0.905, 0.910],
    "label_smoothing": [0.910, 0.912, 0.914],
    "kd": [0.950, 0.953, 0.955],
    "dkd": [0.880, 0.930, 0.930],
    "dist": [0.850, 0.852, 0.853],
}
NAMES = {"no_teacher": "No teacher", "label_smoothing": "Label smoothing", "kd": "KD", "dkd": "DKD", "dist": "DIST"}


def facts_of(accuracy: dict[str, list[float]], metric: str = "accuracy", lower: bool = False) -> dict[str, Any]:
    controls = [entry for entry in accuracy if entry in ("no_teacher", "label_smoothing")]
    best = (min if lower else max)(controls, key=lambda c: sum(accuracy[c]), default=None)
    rows = []
    for entry, values in accuracy.items():
        control = entry in controls
        differences = {c: compare_paired(values, accuracy[c], lower) for c in controls if c != entry}
        gain = None if control or best is None else {"over": best, **differences[best]}
        runs = [
            {"seed": s, "folder": f"runs/{entry}-seed{s}", metric: v, "steps": 540, "seconds": 2.0}
            for s, v in enumerate(values)
        ]
        rows.append(
            {
                "entry": entry,
                "name": NAMES[entry],
                "role": "control" if control else "method",
                "key": entry,
                "about": "cross entropy alone" if control else "",
                "loss": {entry: {"weight": 1.0}},
                "scheme": "offline",
                "parameters": 1634,
                "flops": 3200,
                "latency_ms": 0.25,
                "steps": 540,
                "seconds": summarise([2.0] * len(values)),
                metric: summarise(values),
                "agreement": summarise([0.9] * len(values)),
                "ece": summarise([0.05] * len(values)),
                "differences": differences,
                "gain": gain,
                "runs": runs,
            }
        )
    return {
        "kind": "comparison",
        "format": 1,
        "name": "digits",
        "command": "limbeck compare digits --methods kd,dkd,dist --seeds 3",
        "started": 1.7e9,
        "seconds": 61.5,
        "status": "finished",
        "environment": {"limbeck": "0.1.0", "torch": "2.13.0", "threads": 2, "cores": 2},
        "recipe": {
            "name": "digits",
            "data": {"source": "digits"},
            "student": {"model": "mlp_8"},
            "teacher": {"model": "resnet8"},
        },
        "seeds": list(range(len(next(iter(accuracy.values()))))),
        "metric": metric,
        "left_out": {},
        "data": {"split": "test", "samples": 359, "classes": 10},
        "teacher": {metric: 0.98, "ece": 0.02, "parameters": 77_800, "flops": 1_500_000, "latency_ms": 1.2},
        "best_control": best,
        "methods": rows,
    }

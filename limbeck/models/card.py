"""A model card: what a student is, what it was taught, and how well it does, for the folder that is shared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

#: Figures of a run that a card tells, with what they are called.
_FIGURES = {
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "accuracy": "accuracy",
    "map_macro": "mean average precision",
    "mse": "mean squared error",
    "ece": "calibration error",
    "agreement": "agreement with the teacher",
    "acceptance": "drafts the teacher would accept",
    "rouge_l": "ROUGE-L",
    "exact_match": "exact answers",
    "parameters": "parameters",
}
_PIPELINES = {"ForCausalLM": "text-generation", "ForSequenceClassification": "text-classification"}
_PIPELINES["ForImageClassification"] = "image-classification"


def model_card(kind: str, about: Mapping[str, Any], result: Mapping[str, Any] | None = None) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        kind: The model's class, such as ``"LlamaForCausalLM"``.
        about: What ``student.json`` says.
        result: The run's ``result.json``, where it is known.

    >>> print(model_card("LlamaForCausalLM", {}).splitlines()[2])
    pipeline_tag: text-generation
    """
    pipeline = next((name for end, name in _PIPELINES.items() if kind.endswith(end)), None)
    lines = ["---", "library_name: transformers", *([f"pipeline_tag: {pipeline}"] if pipeline else [])]
    lines += ["tags: [knowledge-distillation]", "---", "", f"# A distilled {kind}", ""]
    lines += [f"A plain transformers model: `{kind}.from_pretrained` reads this folder and needs nothing else.", ""]
    learned = about.get("learned") or {}
    told = {"teacher": learned.get("teacher"), "scheme": learned.get("scheme"), "loss": learned.get("loss")}
    if result is not None:
        told |= {"data": (result.get("data") or {}).get("name"), "steps": (result.get("training") or {}).get("steps")}
        told["seed"] = result.get("seed")
    told = {name: value for name, value in told.items() if value is not None}
    if told:
        lines += ["## How it was made", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {_said(value)} |" for name, value in told.items()] + [""]
    if result is not None:
        teacher = result.get("teacher") or {}
        rows = [(key, name) for key, name in _FIGURES.items() if result.get(key) is not None]
        lines += [f"## Measured on {result.get('samples')} {result.get('split')} samples", ""]
        lines += ["| | student | teacher |", "|---|---:|---:|"]
        lines += [f"| {name} | {_number(result[key])} | {_number(teacher.get(key))} |" for key, name in rows] + [""]
    return "\n".join([*lines, "Made with limbeck.", ""])


def _said(value: Any) -> str:
    text = value if isinstance(value, (str, int)) else json.dumps(value)
    return f"`{text}`".replace("|", "\\|").replace("\n", " ")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"

"""A student's folder: ``model.safetensors`` and, in ``student.json``, how to build it and what it takes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import ModelError
from limbeck.core.files import write_json
from limbeck.models.heads import head_of
from limbeck.models.load import load_model
from limbeck.models.weights import load_weights, save_weights


def read_student(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``student.json`` in a run's folder, its ``student/`` or an export says.

    Raises:
        ModelError: There is none, or it is damaged.
    """
    file = student_folder(folder) / "student.json"
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"this file is damaged: {error}", where=str(file)) from error
    if not isinstance(about, dict) or not isinstance(about.get("model"), (str, type(None))):
        raise ModelError("this file describes no student", where=str(file), wanted="a mapping with 'model'")
    return about


def load_student(folder: str | os.PathLike[str]) -> nn.Module:
    """The student of a run's folder, its ``student/`` or an export, built again and with its weights.

    Raises:
        ModelError: There is none, it cannot be built from its description, or the weights do not fit.

    Example:
        >>> import tempfile
        >>> from limbeck.models import create
        >>> folder = tempfile.TemporaryDirectory()
        >>> save_student(create("mlp_8", image_size=4), folder.name, model="mlp_8", options={"image_size": 4})
        >>> load_student(folder.name)(torch.zeros(2, 3, 4, 4)).shape
        torch.Size([2, 10])
    """
    about, place = read_student(folder), student_folder(folder)
    head = about.get("head")
    if about.get("model") is None:
        put = "" if head is None else f"call put_head(model, {head!r}), "
        raise ModelError(
            "it is not said how to build this student",
            where=str(place / "student.json"),
            remedy=f"build it yourself, {put}and call load_weights(model, {str(place)!r})",
        )
    model = load_model(
        about["model"],
        auto=about.get("auto"),
        pretrained=about.get("pretrained"),
        head=head,
        **about.get("options", {}),
    )
    load_weights(model, place / "model.safetensors")
    return model


def save_student(
    student: nn.Module,
    folder: str | os.PathLike[str],
    *,
    model: str | None = None,
    options: Mapping[str, Any] | None = None,
    **about: Any,
) -> None:
    """Write a student's weights and how to build it: ``model.safetensors`` and ``student.json``.

    The head that was put on it, if any, is written too.

    Args:
        student: The trained model.
        folder: Where; made if need be.
        model: Its name for ``load_model``; ``None`` where it was made by hand.
        options: Of ``load_model`` beside it.
        about: More that ``student.json`` should hold, such as ``auto``, ``logits``, or ``inputs`` as
            :func:`describe_inputs` gives them.
    """
    folder, head = Path(folder), head_of(student)
    save_weights(student, folder / "model.safetensors")
    about = {"model": model, "options": dict(options or {}), **about, **({} if head is None else {"head": head})}
    write_json(folder / "student.json", about)


def describe_inputs(inputs: Any) -> Any:
    """Shapes and dtypes of inputs as plain values, from which ``example_inputs`` makes inputs again.

    >>> describe_inputs({"input_ids": torch.zeros(2, 7, dtype=torch.long)})
    {'input_ids': {'shape': [2, 7], 'dtype': 'int64'}}
    """
    if isinstance(inputs, Tensor):
        return {"shape": list(inputs.shape), "dtype": str(inputs.dtype).removeprefix("torch.")}
    if isinstance(inputs, Mapping):
        return {str(name): describe_inputs(value) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return [describe_inputs(value) for value in inputs]
    return None


def example_inputs(description: Any) -> Any:
    """Inputs of the shapes described: noise for numbers, ones for whole numbers and masks.

    >>> example_inputs({"shape": [2, 3], "dtype": "float32"}).shape
    torch.Size([2, 3])
    """
    if isinstance(description, list):
        return tuple(example_inputs(value) for value in description)
    if not isinstance(description, dict):
        raise ModelError(
            "these inputs cannot be made up", where="example", remedy="give example=inputs of some samples"
        )
    if set(description) != {"shape", "dtype"}:
        return {name: example_inputs(value) for name, value in description.items()}
    dtype = getattr(torch, description["dtype"])
    if not dtype.is_floating_point:
        return torch.ones(description["shape"], dtype=dtype)
    noise = torch.randn(description["shape"], generator=torch.Generator().manual_seed(0))
    return noise.to(dtype)


def student_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder with ``student.json`` that a run's folder has, or that this is."""
    for place in (Path(folder), Path(folder) / "student"):
        if (place / "student.json").is_file():
            return place
    raise ModelError(
        "no student is here",
        where=str(folder),
        wanted="a run's folder, or a folder with student.json",
        remedy="check the path",
    )

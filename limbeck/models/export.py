"""The student leaves the workshop: safetensors, ONNX or a transformers folder, each run again before it is called done."""

from __future__ import annotations

import importlib
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from limbeck.core.batch import Batch, map_tensors
from limbeck.core.errors import LimbeckError, MissingExtra, ModelError, did_you_mean
from limbeck.core.survey import call_model, dry
from limbeck.core.trace import logits_of
from limbeck.models.describe import parameters
from limbeck.models.load import load_model
from limbeck.models.weights import load_weights, save_weights

Form = Literal["safetensors", "onnx", "transformers"]

#: Largest difference of a logit allowed, over the largest logit (or 1): weights read again compute the same sums in the
#: same order up to alignment; ONNX Runtime fuses and orders them anew.
TOLERANCE: dict[str, float] = {"safetensors": 1e-6, "transformers": 1e-6, "onnx": 1e-4}
_EXTERNAL = 1 << 30  # above so many bytes weights lie beside the ONNX file, whose format ends at 2 GiB


def export(
    student: nn.Module | str | os.PathLike[str],
    to: Form,
    path: str | os.PathLike[str],
    example: Any = None,
    *,
    logits: str | None = None,
    tolerance: float | None = None,
) -> dict[str, Any]:
    """Write a student in a form that others read, and prove it: what was written is loaded, run, and compared.

    ================  ==================================================================================================
    ``to``            writes into the folder ``path``
    ================  ==================================================================================================
    ``safetensors``   ``model.safetensors``: the plain state dict; ``student.json``: what is needed to build it again
    ``onnx``          ``model.onnx`` with any batch size (and any number of tokens), its inputs by the model's own names,
                      its output ``logits``; ``student.json``
    ``transformers``  a folder for ``from_pretrained``; for students that are transformers models
    ================  ==================================================================================================

    Nothing appears in ``path`` before it has been compared.

    Args:
        student: A model, or the folder of a run.
        to: Which form.
        path: A folder; made if need be, files of the same names in it are replaced.
        example: Inputs of some samples, or a ``Batch``. A run's folder knows what its student takes.
        logits: Where logits stand in the output (see ``logits_of``); a run's folder knows.
        tolerance: Largest difference allowed, over the largest logit or 1. Default: see ``TOLERANCE``.

    Returns:
        ``to``, ``path``, ``files`` with their bytes, ``parameters``, ``max_difference``, ``tolerance``, ``samples``.

    Raises:
        ModelError: It cannot be written in this form, or what was written does not equal the student.
        MissingExtra: ``onnx``, ``onnxscript``, ``onnxruntime`` or ``transformers`` is not installed.

    Example:
        >>> folder = tempfile.TemporaryDirectory()
        >>> facts = export(nn.Linear(4, 3), "safetensors", folder.name, torch.randn(2, 4))
        >>> sorted(facts["files"]), facts["max_difference"] <= facts["tolerance"]
        (['model.safetensors', 'student.json'], True)
    """
    if to not in get_args(Form):
        wanted = ", ".join(get_args(Form))
        raise ModelError("no such form", where="to", found=repr(to), wanted=wanted, remedy=did_you_mean(to, get_args(Form)))
    about: dict[str, Any] = {}
    if not isinstance(student, nn.Module):
        about = read_student(student)
        student = load_student(student)
    logits = logits if logits is not None else about.get("logits")
    inputs = _inputs(example, about, student)
    tolerance = TOLERANCE[to] if tolerance is None else tolerance
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    about = {**about, "logits": logits, "inputs": describe_inputs(inputs), "parameters": parameters(student)}
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path) as folder, dry(student):
        expected = logits_of(call_model(student, inputs), logits)
        again = _WRITERS[to](student, inputs, logits, Path(folder), about)
        differences = [_difference(again(inputs), expected)]
        if to == "onnx":  # whether the batch is free shows only on another one
            wider = map_tensors(inputs, lambda t: torch.cat([t, t[:1]]))
            differences.append(_difference(again(wider), logits_of(call_model(student, wider), logits)))
        worst = max(differences)
        if not worst <= tolerance:
            raise ModelError(
                f"what was exported to {to} does not compute what the student does",
                where=str(path),
                found=f"logits {worst:.2g} apart",
                wanted=f"at most {tolerance:.2g}",
                remedy="nothing was written; look for parts of the forward that depend on values or on randomness",
            )
        files = _move(Path(folder), path)
    samples = expected.shape[0]
    return {
        "to": to,
        "path": str(path),
        "files": files,
        "parameters": about["parameters"],
        "max_difference": worst,
        "tolerance": tolerance,
        "samples": samples,
    }


def read_student(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``student.json`` in a run's folder, its ``student/`` or an export says.

    Raises:
        ModelError: There is none, or it is damaged.
    """
    file = _student_folder(folder) / "student.json"
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
        >>> from limbeck.models import create
        >>> folder = tempfile.TemporaryDirectory()
        >>> save_student(create("mlp_8", image_size=4), folder.name, model="mlp_8", options={"image_size": 4})
        >>> load_student(folder.name)(torch.zeros(2, 3, 4, 4)).shape
        torch.Size([2, 10])
    """
    about, place = read_student(folder), _student_folder(folder)
    if about.get("model") is None:
        raise ModelError(
            "it is not said how to build this student",
            where=str(place / "student.json"),
            remedy=f"build it yourself and call load_weights(model, {str(place)!r})",
        )
    model = load_model(about["model"], auto=about.get("auto"), pretrained=about.get("pretrained"), **about.get("options", {}))
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

    Args:
        student: The trained model.
        folder: Where; made if need be.
        model: Its name for ``load_model``; ``None`` where it was made by hand.
        options: Of ``load_model`` beside it.
        about: More that ``student.json`` should hold, such as ``auto``, ``logits``, or ``inputs`` as ``describe_inputs``
            gives them.
    """
    folder = Path(folder)
    save_weights(student, folder / "model.safetensors")
    _write_json(folder / "student.json", {"model": model, "options": dict(options or {}), **about})


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
        raise ModelError("these inputs cannot be made up", where="example", remedy="give example=inputs of some samples")
    if set(description) != {"shape", "dtype"}:
        return {name: example_inputs(value) for name, value in description.items()}
    dtype = getattr(torch, description["dtype"])
    if not dtype.is_floating_point:
        return torch.ones(description["shape"], dtype=dtype)
    noise = torch.randn(description["shape"], generator=torch.Generator().manual_seed(0))
    return noise.to(dtype)


def _inputs(example: Any, about: dict[str, Any], student: nn.Module) -> Any:
    inputs = example.inputs if isinstance(example, Batch) else example
    if inputs is None and about.get("inputs") is not None:
        inputs = example_inputs(about["inputs"])
    if inputs is None:
        raise ModelError("an export is compared on inputs, and none are given", where="example")
    device = next((p.device for p in student.parameters()), torch.device("cpu"))
    inputs = map_tensors(inputs, lambda t: t.detach().to(device))
    if _rows(inputs) == 1:  # a single sample would be taken for a fixed size
        inputs = map_tensors(inputs, lambda t: torch.cat([t, t]))
    return inputs


def _rows(inputs: Any) -> int | None:
    sizes: list[int] = []
    map_tensors(inputs, lambda t: sizes.append(t.shape[0]) or t)  # type: ignore[func-returns-value]
    return sizes[0] if sizes else None


def _student_folder(folder: str | os.PathLike[str]) -> Path:
    for place in (Path(folder), Path(folder) / "student"):
        if (place / "student.json").is_file():
            return place
    raise ModelError(
        "no student is here", where=str(folder), wanted="a run's folder, or a folder with student.json", remedy="check the path"
    )


def _difference(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))


def _move(source: Path, target: Path) -> dict[str, int]:
    """Every file to its place; a description comes last, so that it never describes what is not there."""
    files = sorted((p for p in source.rglob("*") if p.is_file()), key=lambda p: (p.suffix == ".json", p))
    sizes = {}
    for file in files:
        name = file.relative_to(source)
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        sizes[str(name)] = file.stat().st_size
        os.replace(file, target / name)
    return sizes


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


Again = Callable[[Any], Tensor]


def _to_safetensors(student: nn.Module, inputs: Any, logits: str | None, folder: Path, about: dict[str, Any]) -> Again:
    save_student(student, folder, **{"model": None, "options": {}, **about})
    if about.get("model") is not None:
        again = load_student(folder)
    else:  # nothing says how to build it: its own code, with every weight spoilt before the file is read
        again = _blank(student)
        load_weights(again, folder)
    device = next((p.device for p in student.parameters()), torch.device("cpu"))
    again.to(device).eval()
    return lambda inputs: logits_of(call_model(again, inputs), logits)


def _blank(student: nn.Module) -> nn.Module:
    import copy

    twin = copy.deepcopy(student)
    for tensor in twin.state_dict().values():
        tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.zero_()
    return twin


def _to_transformers(student: nn.Module, inputs: Any, logits: str | None, folder: Path, about: dict[str, Any]) -> Again:
    transformers = _optional("transformers", "language")
    if not isinstance(student, transformers.PreTrainedModel):
        raise ModelError(
            "only a transformers model can be written as a transformers folder",
            where="to",
            found=f"a student of class {type(student).__name__}",
            remedy="export to safetensors or onnx",
        )
    with _quiet():
        student.save_pretrained(folder)
        again = type(student).from_pretrained(folder, local_files_only=True).to(student.device).eval()
    return lambda inputs: logits_of(call_model(again, inputs), logits)


class _Positional(nn.Module):
    """A student whose inputs come by position and whose output is its logits: what ONNX has words for."""

    def __init__(self, student: nn.Module, inputs: Any, logits: str | None) -> None:
        super().__init__()
        self.student, self.logits = student, logits
        self.names = list(inputs) if isinstance(inputs, Mapping) else None

    def forward(self, *values: Tensor) -> Tensor:
        inputs = dict(zip(self.names, values, strict=True)) if self.names else values
        return logits_of(call_model(self.student, inputs), self.logits)


def _to_onnx(student: nn.Module, inputs: Any, logits: str | None, folder: Path, about: dict[str, Any]) -> Again:
    for package in ("onnx", "onnxscript"):
        _optional(package, "export")
    runtime = _optional("onnxruntime", "export")
    values = list(inputs.values()) if isinstance(inputs, Mapping) else list(inputs) if isinstance(inputs, tuple) else [inputs]
    names = list(inputs) if isinstance(inputs, Mapping) else [f"input_{i}" for i in range(len(values))]
    names = names if len(values) > 1 or isinstance(inputs, Mapping) else ["inputs"]
    if not all(isinstance(v, Tensor) for v in values):
        raise ModelError("ONNX takes tensors", where="example", found=", ".join(type(v).__name__ for v in values))
    model = _Positional(student, inputs, logits).eval()
    bytes_ = sum(t.nbytes for t in student.state_dict().values())
    file = folder / "model.onnx"
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                tuple(values),
                dynamo=True,
                dynamic_shapes={"values": tuple(_free(v) for v in values)},
                input_names=names,
                output_names=["logits"],
                verbose=False,
            )
            assert program is not None
            program.save(file, external_data=bytes_ > _EXTERNAL)
            session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    except LimbeckError:
        raise
    except Exception as error:  # whatever the exporter raises is about this model
        reason = next((str(e).strip().splitlines()[0] for e in _causes(error) if str(e).strip()), type(error).__name__)
        raise ModelError(
            f"this model cannot be written as ONNX: {reason}",
            where="to",
            found=type(student).__name__,
            remedy="see torch.export's notes on control flow that depends on values",
        ) from error
    _write_json(folder / "student.json", about)
    taken = {i.name for i in session.get_inputs()}  # an input that changes nothing is dropped

    def again(inputs: Any) -> Tensor:
        given = list(inputs.values()) if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple) else [inputs]
        fed = {name: v.cpu().numpy() for name, v in zip(names, given, strict=True) if name in taken}
        return torch.from_numpy(session.run(["logits"], fed)[0])

    return again


def _free(value: Tensor) -> dict[int, Any]:
    """Which sizes of an input may change: the batch's must, and the tokens' of ``[B, T]`` whole numbers where it can."""
    tokens = value.ndim == 2 and not value.is_floating_point()
    return {0: torch.export.Dim.DYNAMIC, **({1: torch.export.Dim.AUTO} if tokens else {})}


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error's first cause, then what was raised on it."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    return reversed(chain)


_WRITERS = {"safetensors": _to_safetensors, "onnx": _to_onnx, "transformers": _to_transformers}


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters tell at length what does not concern the user; what matters is checked on their output."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "transformers")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _optional(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise MissingExtra(package, extra=extra) from error

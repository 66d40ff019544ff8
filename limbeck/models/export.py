"""The student leaves the workshop: as safetensors, ONNX or a transformers folder, each run again and compared."""

from __future__ import annotations

import copy
import importlib
import json
import logging
import os
import shutil
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
from limbeck.core.files import flush, write_json, write_text
from limbeck.core.survey import call_model, dry
from limbeck.core.trace import logits_of
from limbeck.models.card import model_card
from limbeck.models.describe import parameters
from limbeck.models.heads import head_of
from limbeck.models.student import (
    describe_inputs,
    example_inputs,
    load_student,
    read_student,
    save_student,
    student_folder,
)
from limbeck.models.weights import load_weights

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
    ``onnx``          ``model.onnx`` for any batch size (and number of tokens), its inputs by the model's own names, its
                      output ``logits``; ``student.json``
    ``transformers``  a folder for ``from_pretrained`` with a model card; for students that are transformers models
    ================  ==================================================================================================

    A language model's tokenizer lies beside it where the student is a run's.

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
        raise ModelError(
            "no such form", where="to", found=repr(to), wanted=wanted, remedy=did_you_mean(to, get_args(Form))
        )
    about: dict[str, Any] = {}
    beside: Path | None = None
    if not isinstance(student, nn.Module):
        beside, about = student_folder(student), read_student(student)
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
        if to == "onnx":  # whether the batch is free shows only on others
            for other in (map_tensors(inputs, lambda t: torch.cat([t, t[:1]])), map_tensors(inputs, lambda t: t[:1])):
                differences.append(_difference(again(other), logits_of(call_model(student, other), logits)))
        worst = max(differences)
        if not worst <= tolerance:
            raise ModelError(
                f"what was exported to {to} does not compute what the student does",
                where=str(path),
                found=f"logits {worst:.2g} apart",
                wanted=f"at most {tolerance:.2g}",
                remedy="nothing was written; look for parts of the forward that depend on values or on randomness",
            )
        if beside is not None:
            for name in map(os.path.basename, about.get("tokenizer", ())):
                shutil.copyfile(beside / name, Path(folder) / name)
        if to == "transformers":
            write_text(Path(folder) / "README.md", model_card(type(student).__name__, about, _result(beside)))
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


def _result(beside: Path | None) -> dict[str, Any] | None:
    """What the run came to whose student lies here."""
    file = None if beside is None else beside.parent / "result.json"
    return json.loads(file.read_text(encoding="utf-8")) if file is not None and file.is_file() else None


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
        flush(file)
        file.chmod(file.stat().st_mode | 0o044)  # some writers shut others out
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        sizes[str(name)] = file.stat().st_size
        os.replace(file, target / name)
    return sizes


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
    if head_of(student) is not None:
        raise ModelError(
            "from_pretrained would not put the head on that this student has",
            where="to",
            found=", ".join(head_of(student) or ()),
            remedy="export to safetensors or onnx",
        )
    said = transformers.utils.logging
    bar = said.is_progress_bar_enabled()
    said.disable_progress_bar()
    try:
        with _quiet():
            student.save_pretrained(folder)
            again = type(student).from_pretrained(folder, local_files_only=True).to(student.device).eval()
    finally:
        if bar:
            said.enable_progress_bar()
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
    values = (
        list(inputs.values())
        if isinstance(inputs, Mapping)
        else list(inputs)
        if isinstance(inputs, tuple)
        else [inputs]
    )
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
    write_json(folder / "student.json", about)
    taken = {i.name for i in session.get_inputs()}  # an input that changes nothing is dropped

    def again(inputs: Any) -> Tensor:
        given = (
            list(inputs.values()) if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple) else [inputs]
        )
        fed = {name: v.cpu().numpy() for name, v in zip(names, given, strict=True) if name in taken}
        return torch.from_numpy(session.run(["logits"], fed)[0])

    return again


def _free(value: Tensor) -> dict[int, Any]:
    """Which sizes of an input may change: the batch's, and the number of tokens of ``[B, T]`` integers where it can."""
    tokens = value.ndim == 2 and not value.is_floating_point()
    return {0: torch.export.Dim("batch"), **({1: torch.export.Dim.AUTO} if tokens else {})}


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
    loggers = [
        logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "transformers")
    ]
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

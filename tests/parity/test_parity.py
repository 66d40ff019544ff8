"""limbeck's losses against numbers that the authors' code gave.

Each ``<key>_<repository>.npz`` holds numbers and strings only: ``repository``, ``commit``, ``torch`` and ``method``,
``function`` where it is not the method's own, and for every case ``i``: ``i/call`` (what was run, in float64),
``i/options`` (ours, as JSON), ``i/input/NAME`` (``NAME.0``, ``NAME.1`` for a list), ``i/value``, ``i/grad/NAME``, and
``i/factor`` with ``i/why`` where the released code differs from the paper by a factor: ours is ``factor`` times theirs.
``i/tolerance`` is above 1e-5 where theirs computes in float32. The files of CRD hold whole runs of three steps instead,
memory banks included; other files without ``i/value`` belong to a test of their own, ``test_<key>.py``.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import limbeck.objectives  # noqa: F401  registers the methods
from limbeck.core import catalogue
from limbeck.core.memory import update_bank
from limbeck.objectives.relation.crd import crd_bank_loss, crd_log_z
from limbeck.schemes import carded

HERE = Path(__file__).parent


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def under(prefix: str, numbers: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): torch.from_numpy(v) for k, v in numbers.items() if k.startswith(prefix)}


FILES = {path.stem: load(path) for path in sorted(HERE.glob("*.npz"))}
CASES = [(name, k.split("/")[0]) for name, numbers in FILES.items() for k in numbers if k.endswith("/call")]
#: A value of one function; what has no factor stands in a form of its own, in a test of its own.
SINGLE = [c for c in CASES if {f"{c[1]}/value", f"{c[1]}/factor"} <= FILES[c[0]].keys()]
BANKS = [c for c in CASES if c[0].startswith("crd_")]


def close(found: Tensor | None, wanted: Tensor, tolerance: float = 1e-5) -> None:
    """To 1e-5 of the largest entry: a gradient's small entries are differences of large ones."""
    assert found is not None
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))


def function_of(numbers: dict[str, np.ndarray]) -> Callable[..., Tensor]:
    """The function that a file speaks of: the one it names, or else its method's own."""
    if "function" in numbers:
        module, _, name = str(numbers["function"]).partition(":")
        return getattr(importlib.import_module(module), name)
    function = catalogue.get(str(numbers["method"])).function
    assert function is not None
    return function


def arguments_of(inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Arguments by name; NAME.0, NAME.1, ... are the entries of a list."""
    found: dict[str, Any] = {}
    for name, tensor in sorted(
        inputs.items(), key=lambda item: [int(p) if p.isdigit() else 0 for p in item[0].split(".")]
    ):
        base, dot, _ = name.partition(".")
        if dot:
            found.setdefault(base, []).append(tensor)
        else:
            found[base] = tensor
    return found


def test_cards_and_files_agree() -> None:
    """Who says "parity" has numbers of somebody's code here, and the other way round."""
    here = {str(f["method"]) for f in FILES.values()}
    known = {**catalogue.methods(), **carded()}
    assert here == {key for key, method in known.items() if method.card.evidence == "parity"}


@pytest.mark.parametrize("name", FILES)
def test_a_file_says_where_its_numbers_are_from_and_is_used(name: str) -> None:
    numbers = FILES[name]
    assert "/" in str(numbers["repository"])
    assert len(str(numbers["commit"])) == 40
    own_test = (HERE / f"test_{numbers['method']}.py").is_file()
    assert own_test or name.startswith("crd_") or any(key.endswith("/value") for key in numbers)


@pytest.mark.parametrize(("name", "case"), SINGLE, ids=["-".join(c) for c in SINGLE])
def test_value_and_gradient(name: str, case: str) -> None:
    numbers = FILES[name]
    inputs = under(f"{case}/input/", numbers)
    gradients = under(f"{case}/grad/", numbers)
    assert gradients
    factor = float(numbers[f"{case}/factor"])
    assert factor == 1.0 or str(numbers[f"{case}/why"])
    tolerance = float(numbers.get(f"{case}/tolerance", 1e-5))
    assert tolerance <= 1e-3
    for argument in gradients:
        inputs[argument].requires_grad_()
    value = function_of(numbers)(**arguments_of(inputs), **json.loads(str(numbers[f"{case}/options"])))
    assert value.item() == pytest.approx(factor * float(numbers[f"{case}/value"]), rel=tolerance, abs=1e-12)
    value.backward()
    for argument, gradient in gradients.items():
        close(inputs[argument].grad, factor * gradient, tolerance)


@pytest.mark.parametrize(("name", "case"), BANKS, ids=["-".join(c) for c in BANKS])
def test_crd_over_three_steps(name: str, case: str) -> None:
    """Loss, gradients, normalisation constants and momentum updates, with the released code's own negatives."""
    numbers = FILES[name]
    banks = [torch.from_numpy(numbers[f"{case}/{side}_bank"]).clone() for side in ("student", "teacher")]
    temperature, momentum = float(numbers[f"{case}/temperature"]), float(numbers[f"{case}/momentum"])
    log_z: Tensor | None = None
    for step in range(3):
        given: dict[str, Any] = under(f"{case}/step{step}/", numbers)
        student, teacher = given["student_embedding"].requires_grad_(), given["teacher_embedding"].requires_grad_()
        arguments = (student, teacher, *banks, given["index"], given["negatives"])
        if log_z is None:
            log_z = crd_log_z(*arguments, temperature=temperature)
        close(log_z.exp(), given["z"])
        value = crd_bank_loss(*arguments, log_z=log_z, temperature=temperature)
        assert value.item() == pytest.approx(float(given["value"]), rel=1e-5)
        value.backward()
        close(student.grad, given["grad_student"])
        close(teacher.grad, given["grad_teacher"])
        for bank, embedding in zip(banks, (student, teacher), strict=True):
            update_bank(bank, given["index"], embedding, momentum=momentum)
    for bank, side in zip(banks, ("student", "teacher"), strict=True):
        close(bank, given[f"{side}_bank_after"])

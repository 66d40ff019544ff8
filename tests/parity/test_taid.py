"""TAID's t over steps, against the authors' module, which was given the same logits step by step."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from limbeck.core.batch import Batch
from limbeck.core.trace import Trace
from limbeck.objectives.response.taid import TAID

NUMBERS = Path(__file__).parent / "taid_taid.npz"


@pytest.mark.parametrize("path", ["path0", "path1"])
def test_the_path_of_t(path: str) -> None:
    with np.load(NUMBERS) as file:
        given = {k.removeprefix(f"{path}/"): v for k, v in file.items() if k.startswith(f"{path}/")}
    theirs = json.loads(str(given["options"]))
    loss = TAID(theirs["t_start"], theirs["t_end"], theirs["alpha"], theirs["beta"], signal="cross_entropy")
    student, teacher, mask = (torch.from_numpy(given[n]) for n in ("student", "teacher", "mask"))
    values, ts, trends = [], [], []
    for step in range(len(student) + 1):  # one more, for it takes account of a step when the next begins
        now = min(step, len(student) - 1)
        batch = Batch(student[now], mask=mask[now], progress=step / len(student))
        values.append(loss(Trace(student[now]), Trace(teacher[now]), batch).item())
        ts.append(float(loss.t))
        trends.append(float(loss.pace.trend))
    np.testing.assert_allclose(values[:-1], given["losses"], rtol=1e-5)
    np.testing.assert_allclose(ts[1:], given["t"], rtol=1e-5)
    np.testing.assert_allclose(trends[1:], given["momentum"], rtol=1e-4, atol=1e-6)

"""What processes agree on, against one process that has all rows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from limbeck.core.ranks import Rows, drawn_alike
from tests.core.ranks_run import loss


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    script = Path(__file__).with_name("ranks_run.py")
    each = [subprocess.Popen([sys.executable, script, tmp_path, str(rank)], env=environment) for rank in range(2)]
    assert [process.wait(60) for process in each] == [0, 0]
    first, second = both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert [found["own"] for found in both] == [[0, 3], [3, 5]]
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def mean(name: str) -> torch.Tensor:
        return (first[name] + second[name]) / 2

    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    whole = loss(inputs * weight)
    whole.backward()
    for found in both:
        torch.testing.assert_close(found["gathered"], inputs)
        torch.testing.assert_close(found["value"], whole.detach())
        assert found["mask"].tolist() == [0, 0, 0, 1, 1]
    torch.testing.assert_close(mean("gradient"), weight.grad)
    assert not torch.allclose(first["gradient"], second["gradient"])

    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    (inner,) = torch.autograd.grad((inputs @ weight).pow(3).mean(), weight, create_graph=True)
    (inputs @ (weight - 0.1 * inner)).pow(2).mean().backward()
    torch.testing.assert_close(mean("unrolled"), weight.grad)
    for found in both:
        torch.testing.assert_close(found["mean"], inner.detach())

    with drawn_alike(torch.device("cpu"), 3, 4):
        drawn = Rows((5,)).rand(10, 2, device=torch.device("cpu")).unflatten(0, (2, 5))
    parts = [found["drawn"].unflatten(0, (2, -1)) for found in both]
    assert torch.equal(torch.cat(parts, dim=1), drawn)
    assert all(torch.equal(a, b) for a, b in zip(first["kept"], second["kept"], strict=True))
    assert second["kept"][1] == 0


def test_draws_leave_no_trace():
    state = torch.random.get_rng_state()
    with drawn_alike(torch.device("cpu"), 1):
        one = torch.rand(4)
    with drawn_alike(torch.device("cpu"), 2):
        two = torch.rand(4)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(one, two)

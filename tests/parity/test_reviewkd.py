"""ReviewKD's fusion against its authors' code, with their weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from limbeck.core.batch import Batch
from limbeck.core.objective import DataInfo
from limbeck.core.trace import Trace
from limbeck.objectives.feature.reviewkd import ReviewKD
from tests.parity.test_parity import close, load, under

NUMBERS = load(Path(__file__).parent / "reviewkd_fusion.npz")


@pytest.mark.parametrize("case", [key.split("/")[0] for key in NUMBERS if key.endswith("/call")])
def test_fuse_and_compare(case: str) -> None:
    """The last of the features is the pooled one, which stands before the classifier."""
    students, teachers, weights = (under(f"{case}/{n}/", NUMBERS) for n in ("student", "teacher", "weights"))
    leaves = {name: tensor.requires_grad_() for name, tensor in students.items()}
    last = str(len(leaves) - 1)

    def trace(maps: dict[str, torch.Tensor]) -> Trace:
        others = {name: m for name, m in maps.items() if name != last}
        return Trace(None, {**others, "penultimate": maps[last].flatten(1)})

    loss, batch = ReviewKD([n for n in leaves if n != last]), Batch(torch.zeros(1))
    loss.setup(trace(leaves), trace(teachers), batch, DataInfo())
    loss.double().fusions.load_state_dict(weights)
    value = loss(trace(leaves), trace(teachers), batch)
    assert value.item() == pytest.approx(float(NUMBERS[f"{case}/loss"]), rel=1e-10)
    value.backward()
    for name, gradient in under(f"{case}/grad/", NUMBERS).items():
        close(leaves[name].grad, gradient)
    for name, gradient in under(f"{case}/weight_grad/", NUMBERS).items():
        close(loss.fusions.get_parameter(name).grad, gradient)

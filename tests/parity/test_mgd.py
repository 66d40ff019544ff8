"""MGD against its authors' code and mmrazor's, with the random numbers that they drew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from limbeck.objectives.feature.mgd import generator, hide, mgd_loss
from tests.parity.test_parity import close, load, under

FILES = {path.stem: load(path) for path in sorted(Path(__file__).parent.glob("mgd_*.npz"))}
CASES = [(name, key.split("/")[0]) for name, numbers in FILES.items() for key in numbers if key.endswith("/call")]


@pytest.mark.parametrize(("name", "case"), CASES, ids=["-".join(c) for c in CASES])
def test_hide_generate_compare(name: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = under(f"{case}/", {k: v for k, v in FILES[name].items() if v.dtype.kind == "f"})
    student, teacher = given["student"].requires_grad_(), given["teacher"]
    block = generator(student.shape[1]).double()
    block.load_state_dict({k.removeprefix("weights/"): v for k, v in given.items() if k.startswith("weights/")})
    monkeypatch.setattr(torch, "rand", lambda shape, device=None: given["draws"].reshape(shape))
    masked = hide(student, float(given["ratio"]), str(FILES[name][f"{case}/hide"]))
    value = mgd_loss(block(masked), teacher)
    factor = float(given["factor"])
    assert value.item() == pytest.approx(factor * float(given["loss"]), rel=1e-10)
    value.backward()
    close(student.grad, factor * given["grad/student"])
    for parameter, tensor in block.named_parameters():
        close(tensor.grad, factor * given[f"grad/{parameter}"])

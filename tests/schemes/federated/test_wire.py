"""The wire: what was declared and nothing else, counted as it is."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load

from limbeck.core.errors import TensorError
from limbeck.schemes.federated.wire import below, pack, unpack
from tests.schemes.federated.scene import overheard, scene


def test_what_is_packed_comes_out_again():
    given = {"weights/b": torch.randn(3, 2).T, "samples": torch.tensor(7), "weights/a": torch.ones(2, dtype=torch.half)}
    payload = pack(given, ["weights", "samples"])
    found = unpack(payload, ["weights", "samples"])
    assert set(found) == set(given)
    assert all(torch.equal(found[name], given[name]) for name in given)
    assert list(below("weights", found))
    assert set(load(payload)) == set(given)


def test_only_what_was_declared_crosses():
    with pytest.raises(TensorError, match=r"wire: samples.*only weights"):
        pack({"samples": torch.ones(1)}, ["weights"])
    with pytest.raises(TensorError, match="must not cross"):
        unpack(pack({"inputs": torch.ones(1)}), ["weights"])
    with pytest.raises(TensorError, match="hold no tensors"):
        unpack(b"12345678901", ["weights"])


def test_bytes_that_are_told_are_bytes_that_crossed(tmp_path):
    from limbeck.schemes import build, perform
    from limbeck.schemes.federated.rounds import record

    with overheard() as heard:
        perform(build("fedavg", count=3, alpha=None, epochs=1), scene(), out=tmp_path / "run", quiet=True)
    lines = record(tmp_path / "run")
    assert sum(one["bytes_up"] + one["bytes_down"] for one in lines) == sum(map(len, heard))
    assert [one["bytes_up"] for one in lines] == [sum(one["up"].values()) for one in lines]
    assert all(one["down"][client] < one["up"][client] for one in lines for client in one["up"])  # up: samples too

"""Ranks share the clients: who lives where, what a lost one costs, and that it comes to the bits of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from limbeck.core.ranks import alone, world_size
from limbeck.schemes.federated.clients import Answers
from limbeck.schemes.federated.rounds import record

SCRIPT, ROOT = Path(__file__).with_name("ranks_run.py"), Path(__file__).parents[3]
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks_come_to_the_bits_of_one(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for folder, how in (("one", []), ("two", LAUNCH)):
        command = [sys.executable, *how, str(SCRIPT), str(tmp_path / folder)]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = tmp_path / "one", tmp_path / "two"
    for name in ("average", "scores"):
        states = [load_file(file) for file in (one / f"{name}-0.safetensors", *sorted(two.glob(f"{name}-*.safe*")))]
        assert len(states) == 3
        assert all(torch.equal(state[key], states[0][key]) for state in states for key in states[0])
        assert record(one / name) == record(two / name)
    assert [line["answered"] for line in record(two / "average")] == [[0, 1, 2], [0, 2], [0, 1, 2]]
    assert record(two / "average")[1]["lost"] == [{"client": 1, "why": "killed by signal 9"}]
    assert {file.name for file in two.glob("client-*")} == {"client-0-on-0", "client-1-on-1", "client-2-on-0"}


def test_what_other_ranks_heard_is_put_together_in_the_clients_order(monkeypatch):
    from limbeck.schemes.federated import clients
    from limbeck.schemes.federated.wire import pack, unpack

    sides = [
        Answers({2: b"two", 0: b"zero"}, {2: {}, 0: {"a/b": torch.ones(2), "n": torch.tensor(3)}}, {4: "gone: é"}),
        Answers({1: b"one"}, {1: {"a/b": torch.zeros(2)}}, {}),
        Answers(),
    ]
    assert sides[0].everywhere(torch.device("cpu")) is sides[0]
    heard: list[bytes] = []

    def told(payload: bytes, device: torch.device) -> list[bytes]:
        heard.append(payload)
        return heard

    monkeypatch.setattr(clients, "world_size", lambda: 3)
    monkeypatch.setattr(clients, "gather_bytes", told)
    for side in sides:
        found = side.everywhere(torch.device("cpu"))
    assert list(found.said.items()) == [(0, b"zero"), (1, b"one"), (2, b"two")]
    assert found.lost == {4: "gone: é"}
    assert found.kept[0]["a/b"].tolist() == [1.0, 1.0]
    assert int(found.kept[0]["n"]) == 3
    assert found.kept[1]["a/b"].tolist() == [0.0, 0.0]
    assert found.kept[2] == {}
    assert unpack(pack({})) == {}


def test_nobody_is_waited_for_alone(monkeypatch):
    dist = torch.distributed
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    assert world_size() == 2
    with alone():
        with alone():
            pass
        assert world_size() == 1
    assert world_size() == 2

"""No raw sample crosses the wire: every payload of every federated scheme is searched for every private row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from limbeck.schemes import build, perform
from limbeck.schemes.federated import fedavg
from limbeck.schemes.federated.wire import unpack
from tests.schemes.federated.scene import overheard, scene
from tests.schemes.federated.test_fedlgd import FEW as VIRTUAL
from tests.schemes.federated.test_fedlgd import images

SPLIT = {"count": 2, "alpha": 1.0, "least": 4}
#: What each method names, and no more.
NAMED = {
    "fedavg": {"weights", "samples"},
    "fedmd": {"scores", "round"},
    "knfu": {"scores", "round"},
    "fedlgd": {"weights", "images", "means", "deviations", "present"},
}
OPTIONS = {
    "fedavg": {**SPLIT, "epochs": 1},
    "fedmd": {**SPLIT, "epochs": 1, "start": 1, "start_public": 1},
    "knfu": {**SPLIT, "epochs": 1},
    # Clients' virtual images are real ones here, and stay where they are.
    "fedlgd": {**VIRTUAL, "start": "real", "warm_up": 0, "match_steps": 0, "every": 1},
}


def raw_rows(payloads: list[bytes], rows: Tensor) -> list[tuple[int, int]]:
    """Which payloads hold which rows: their very bytes, or numbers that are almost theirs."""
    flat, found = rows.flatten(1).float(), []
    for number, payload in enumerate(payloads):
        found += [(number, k) for k, row in enumerate(flat) if row.numpy().tobytes() in payload]
        for tensor in unpack(payload).values():
            if tensor.is_floating_point() and tensor.numel() and tensor.numel() % flat.shape[1] == 0:
                apart = torch.cdist(tensor.float().reshape(-1, flat.shape[1]), flat, p=torch.inf)
                found += [(number, int(k)) for k in (apart < 1e-3).nonzero()[:, 1]]
    return found


def all_heard(key: str) -> tuple[list[bytes], Tensor]:
    given = images() if key == "fedlgd" else scene()
    with overheard() as heard:
        perform(build(key, **OPTIONS[key]), given, quiet=True)
    return heard, torch.cat([batch.inputs for batch in given.train.plain()])


@pytest.mark.parametrize("key", sorted(NAMED))
def test_nothing_but_what_the_method_names_crosses_and_no_sample_is_in_it(key):
    heard, rows = all_heard(key)
    assert len(heard) == 3 * 2 * 2  # rounds, clients, ways
    assert {name.partition("/")[0] for payload in heard for name in unpack(payload)} == NAMED[key]
    assert raw_rows(heard, rows) == []


def test_a_client_that_gives_samples_away_is_found(monkeypatch):
    answer = fedavg.Averaging.answer

    def traitor(self, number, kept, told, place):
        keeps, says = answer(self, number, kept, told, place)
        samples = next(self.owners.loaders[number].bare().batches()).inputs[:6]
        return keeps, {**says, "weights/0.weight": samples * (1.0 if place.number == 0 else 1.00001)}

    monkeypatch.setattr(fedavg.Averaging, "answer", traitor)
    heard, rows = all_heard("fedavg")
    found = {number for number, _ in raw_rows(heard, rows)}
    assert found == {2, 3, 6, 7, 10, 11}  # all that was said, told apart from what was heard, and almost equal ones too

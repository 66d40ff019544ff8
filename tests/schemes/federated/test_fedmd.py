"""FedMD: the consensus, how it is digested, who has which model, and what a lost client misses."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from limbeck.core.errors import ConfigError
from limbeck.schemes import build, perform
from limbeck.schemes.federated import scores
from limbeck.schemes.federated.clients import Simulated
from limbeck.schemes.federated.scores import Told, still
from limbeck.schemes.federated.wire import below, unpack
from tests.schemes.federated.scene import net, overheard, points, scene

FEW = {"count": 3, "alpha": 1.0, "least": 4, "epochs": 1, "start": 1, "start_public": 1}


def server_of(given, **options):
    (training,) = build("fedmd", **{**FEW, **options}).trainings(given)
    return training.stages[0].distiller


def test_the_consensus_is_the_mean_of_those_who_answered():
    server = server_of(scene())
    said = {k: torch.randn(server.scores.shape[1:], dtype=torch.float64) for k in (0, 2)}
    told, learned = server.fuse(said)
    assert torch.equal(told[0], learned)
    assert torch.allclose(learned, (said[0] + said[2]) / 2)


def test_digesting_is_descent_on_the_mean_absolute_distance_of_logits():
    given = scene(weight_decay=0.0, optimizer_options={"momentum": 0.0}, batch=60)
    server = server_of(given, digest_epochs=3)
    place = scores.Round.of(0, 1, 0, given.config)
    told = torch.randn(server.scores.shape[1:])
    digested, plain = net(3), net(3)
    server.scoring.digested(digested, told, 0, place)
    x = points()[0][server.scoring.rows]
    for _ in range(3):
        loss = (plain(x) - told).abs().mean()
        for p, slope in zip(plain.parameters(), torch.autograd.grad(loss, list(plain.parameters())), strict=True):
            p.data -= 0.1 * slope
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(digested.parameters(), plain.parameters(), strict=True))


def test_scores_stand_by_ids_and_samples_are_seen_as_they_are():
    given = scene()
    rows = torch.tensor([7, 3, 50])
    told = Told(rows, torch.arange(9.0).view(3, 3), 60)
    (batch,) = still(given.train).chosen(rows).batches()
    assert sorted(batch.index.tolist()) == [3, 7, 50]
    wanted = {7: [0.0, 1.0, 2.0], 3: [3.0, 4.0, 5.0], 50: [6.0, 7.0, 8.0]}
    assert told(batch).logits.tolist() == [wanted[i] for i in batch.index.tolist()]


def test_clients_have_architectures_of_their_own_and_only_scores_cross(tmp_path):
    given = scene(epochs=3)
    given.players = {"small": net(4, wide=2), "large": net(5, wide=9)}
    with overheard() as heard:
        fitted = perform(build("fedmd", **FEW, models=["small", "large"]), given, out=tmp_path / "run", quiet=True)
    names = [set(unpack(payload)) for payload in heard]
    assert set().union(*names) == {"scores", "round"}
    assert not any(names[:3])  # nothing is told in the first round
    lines = [line["terms"] for line in fitted.history if line["split"] == "train"]
    # Twelve public samples of three classes in single precision, and the header of the file.
    assert all(0 < line["bytes_up"] - 3 * 12 * 3 * 4 < 3 * 100 for line in lines)
    assert 0 < lines[-1]["clients_worst"] <= lines[-1]["clients_mean"] <= 1


def test_before_its_first_round_a_client_learns_public_labels_then_its_own(monkeypatch):
    seen = []

    def learn(model, loss, loader, place, *, epochs, teacher=None, **_):
        seen.append((place.number, loader.shown, epochs, teacher is not None))
        return model

    monkeypatch.setattr(scores, "learn", learn)
    given = scene(epochs=2)
    options = {**FEW, "count": 1, "alpha": None, "start": 4, "start_public": 3, "epochs": 2, "digest_epochs": 5}
    perform(build("fedmd", **options), given, quiet=True)
    assert seen == [
        (0, 12, 3, False),
        (0, 48, 4, False),
        (0, 48, 2, False),
        (0, 12, 5, True),  # the student
        (1, 12, 5, True),
        (1, 48, 2, False),
        (1, 12, 5, True),
    ]


def test_who_misses_a_round_keeps_its_model_and_comes_back(monkeypatch):
    ask, kept = Simulated.ask, []

    def without(self, place, keeps, told):
        kept.append({k: v.clone() for k, v in below("weights", keeps[1]).items()})
        return ask(self, place, keeps, {n: t for n, t in told.items() if (n, place.number) != (1, 1)})

    monkeypatch.setattr(Simulated, "ask", without)
    perform(build("fedmd", **FEW), scene(epochs=4), quiet=True)
    changed = [any(not torch.equal(a[n], b[n]) for n in a) for a, b in itertools.pairwise(kept)]
    assert changed == [True, False, True]


@pytest.mark.slow
def test_it_learns(tmp_path):
    given = scene(count=160, batch=32, epochs=4, lr=0.3)
    fitted = perform(build("fedmd", count=3, alpha=0.3, start=5, start_public=5, digest_epochs=6), given, quiet=True)
    assert fitted.validation["accuracy"] > 0.75
    assert type(given.student) is nn.Sequential


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"public": 0.0}, "scheme.public"),
        ({"digest": "fitnets"}, "only scores cross the wire"),
        ({"models": ["nobody"]}, "players.nobody"),
    ],
)
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        server_of(scene(), **options)

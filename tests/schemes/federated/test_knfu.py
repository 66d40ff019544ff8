"""KnFu: whose knowledge weighs how much for whom, and what follows for who is told what."""

from __future__ import annotations

import math

import pytest
import torch

from limbeck.core.errors import ConfigError
from limbeck.schemes import build, perform
from limbeck.schemes.federated.knfu import effectiveness
from limbeck.schemes.federated.wire import unpack
from tests.schemes.federated.scene import net, overheard, points, scene

FEW = {"count": 3, "alpha": 1.0, "least": 4, "epochs": 1}


def beliefs(count: int = 5, classes: int = 4) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(count, classes, dtype=torch.float64).mul(2).softmax(dim=1)


def server_of(given, **options):
    (training,) = build("knfu", **{**FEW, **options}).trainings(given)
    return training.stages[0].distiller


@pytest.mark.parametrize("distance", ["l2", "js"])
def test_weights_by_their_definition(distance):
    p, beta = beliefs(), 3.0

    def apart(a, b):
        if distance == "l2":
            return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))
        middle = [(x + y) / 2 for x, y in zip(a, b, strict=True)]
        return sum(q * math.log(q / m) for one in (a, b) for q, m in zip(one, middle, strict=True)) / 2

    rows = p.tolist()
    found = effectiveness(p, beta, distance)
    for k, own in enumerate(rows):
        gaps = [apart(own, other) for other in rows]
        raw = [math.exp(-beta * gap / max(gaps)) for gap in gaps]
        assert found[k].tolist() == pytest.approx([value / sum(raw) for value in raw], abs=1e-12)


def test_rows_sum_to_one_and_follow_the_clients():
    p = beliefs()
    order = torch.tensor([3, 0, 4, 1, 2])
    found = effectiveness(p)
    assert torch.allclose(found.sum(dim=1), torch.ones(5, dtype=torch.float64))
    assert torch.allclose(effectiveness(p[order]), found[order][:, order])


def test_no_beta_is_the_mean_and_a_large_one_is_oneself():
    p = beliefs()
    assert torch.allclose(effectiveness(p, 0.0), torch.full((5, 5), 0.2, dtype=torch.float64))
    assert torch.allclose(effectiveness(p, 1e6), torch.eye(5, dtype=torch.float64))
    assert torch.allclose(effectiveness(p[:1].expand(3, -1)), torch.full((3, 3), 1 / 3, dtype=torch.float64))


def test_groups_of_disjoint_classes_do_not_hear_each_other():
    p = torch.tensor([[0.5, 0.5, 0, 0], [0.6, 0.4, 0, 0], [0, 0, 0.5, 0.5], [0, 0, 0.4, 0.6]])
    found = effectiveness(p)
    assert float(found[:2, 2:].max()) < 1e-3
    assert float(found[2:, :2].max()) < 1e-3
    assert float(found[0, 1]) > 0.05


def test_who_was_lost_hears_only_those_who_spoke():
    server = server_of(scene())
    size = server.scores.shape[1:]
    said = {k: torch.randn(size).softmax(dim=1) for k in (0, 2)}
    told, learned = server.fuse(said)
    assert torch.allclose(learned, (said[0] + said[2]) / 2)
    assert torch.allclose(told.sum(dim=-1), torch.ones(told.shape[:2]))  # rows stay distributions
    share = (told[1] - said[2]) / (said[0] - said[2])  # of the first, whatever the sample and class
    assert float(share.std()) < 1e-3
    assert 0 < float(share.mean()) < 1


def test_what_is_told_is_learned_at_its_temperature():
    given = scene(weight_decay=0.0, optimizer_options={"momentum": 0.0}, batch=60)
    server = server_of(given, temperature=3.0)
    from limbeck.schemes.federated.local import Round

    told = torch.randn(server.scores.shape[1:]).softmax(dim=1)
    digested, plain = net(3), net(3)
    server.scoring.digested(digested, told, 0, Round.of(0, 1, 0, given.config))
    q = (plain(points()[0][server.scoring.rows]) / 3.0).log_softmax(dim=1)
    loss = 9.0 * (told * (told.log() - q)).sum(dim=1).mean()
    slopes = torch.autograd.grad(loss, list(plain.parameters()))
    for a, b, slope in zip(digested.parameters(), plain.parameters(), slopes, strict=True):
        assert torch.allclose(a, b - 0.1 * slope, atol=1e-6)


def test_each_hears_its_own_mixture_and_only_predictions_cross(tmp_path):
    given = scene(epochs=2, batch=32)
    given.players = {"small": net(4, wide=2), "large": net(5, wide=9)}
    options = {**FEW, "alpha": 0.3, "models": ["small", "large"]}
    with overheard() as heard:
        fitted = perform(build("knfu", **options), given, out=tmp_path / "run", quiet=True)
    payloads = [unpack(payload) for payload in heard]
    assert {name for payload in payloads for name in payload} == {"scores", "round"}
    told = [p["scores"] for p in payloads if "round" in p][:3]
    said = [p["scores"] for p in payloads if "scores" in p and "round" not in p][:3]
    assert not torch.equal(told[0], told[1])
    weights = effectiveness(torch.stack(said).mean(dim=1))
    assert torch.allclose(torch.stack(told), torch.einsum("kj,jmc->kmc", weights, torch.stack(said)), atol=1e-6)
    lines = [line["terms"] for line in fitted.history if line["split"] == "train"]
    assert all(0 < line["clients_worst"] <= line["clients_mean"] <= 1 for line in lines)


def test_without_beta_everybody_is_told_the_mean():
    server = server_of(scene(), beta=0.0)
    said = {k: torch.randn(server.scores.shape[1:]).softmax(dim=1) for k in range(3)}
    told, learned = server.fuse(said)
    assert all(torch.allclose(one, learned, atol=1e-7) for one in told)


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": -1},
        {"each": 0},
        {"beta": -1.0},
        {"temperature": 0.0},
        {"distance": "cosine"},
        {"public": 1.5},
        {"alpha": -1.0},
    ],
)
def test_what_cannot_be_is_refused(options):
    with pytest.raises(ConfigError, match=f"scheme.{next(iter(options))}"):
        server_of(scene(), **options)

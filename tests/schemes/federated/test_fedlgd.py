"""FedLGD: both ways of matching, the pull between them, and what each round does with which images."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.objective import Terms
from limbeck.data import as_loader
from limbeck.engine import TrainConfig
from limbeck.objectives import CrossEntropy
from limbeck.schemes import Cast, build, perform
from limbeck.schemes.federated import distilling, virtual
from limbeck.schemes.federated.distilling import Anchored, noise, some_of_each
from limbeck.schemes.federated.local import Round
from limbeck.schemes.federated.wire import unpack
from tests.schemes.federated.scene import overheard, scene

FEW = {"count": 2, "alpha": None, "images": 2, "server_images": 2, "warm_up": 2, "match_steps": 2, "server_steps": 3}


def net(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 2))


def shapes(count: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Bars, upright or flat, in noise."""
    torch.manual_seed(seed)
    x, y = torch.randn(count, 1, 4, 4) * 0.3, torch.arange(count) % 2
    x[y == 0, :, :, 1] += 1.5
    x[y == 1, :, 1] += 1.5
    return x, y


def images(count: int = 40, **train: object) -> Cast:
    config = TrainConfig(**{"epochs": 3, "lr": 0.1, **train})
    data = as_loader(shapes(count), batch_size=8, train=True)
    judged = as_loader(shapes(60, seed=5))
    return Cast(net(), Terms.of(CrossEntropy()), None, config, data, judged, fresh=lambda number: net(number % 1000))


def server_of(given: Cast, **options: object):
    (training,) = build("fedlgd", **{**FEW, **options}).trainings(given)
    return training.stages[0].distiller


def test_means_are_matched_by_their_definition_and_gradients_reach_virtual_images_alone():
    torch.manual_seed(0)
    real = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    made = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y, z = torch.tensor([0, 1, 0, 2, 1, 0, 3]), torch.tensor([0, 0, 1, 2])
    found = virtual.matching_loss(real, y, made, z, 5)
    wanted = sum((real[y == c].mean(0) - made[z == c].mean(0)).square().sum() for c in (0, 1, 2))
    assert torch.allclose(found, wanted)
    found.backward()
    assert real.grad is None
    assert float(made.grad.abs().min()) > 0
    same = virtual.same_view([made.detach().view(4, 1, 1, 3)] * 2)
    assert float(virtual.matching_loss(same[0].flatten(1), z, same[1].flatten(1), z, 5)) == 0


def test_gradients_are_matched_row_by_row_whatever_their_size():
    torch.manual_seed(0)
    real = [
        torch.randn(3, 2, 2, 2, dtype=torch.float64),
        torch.randn(3, dtype=torch.float64),
        torch.randn(4, 3).double(),
    ]
    made = [torch.randn_like(g) for g in real]
    wanted = 0.0
    for r, m in ((real[0].reshape(3, 8), made[0].reshape(3, 8)), (real[2], made[2])):
        for a, b in zip(r.tolist(), m.tolist(), strict=True):
            dot = sum(p * q for p, q in zip(a, b, strict=True))
            wanted += 1 - dot / (math.hypot(*a) * math.hypot(*b) + 1e-6)
    assert float(virtual.gradient_loss(real, made)) == pytest.approx(wanted, abs=1e-12)
    assert float(virtual.gradient_loss(real, [3 * g for g in real])) == pytest.approx(0, abs=1e-5)
    scaled = float(virtual.gradient_loss([100 * g for g in real], made))
    assert scaled == pytest.approx(wanted, abs=1e-4)
    turned = [-real[0], *real[1:]]
    assert float(virtual.gradient_loss(real, turned)) == pytest.approx(6, abs=1e-4)


def test_discrepancy_of_kernels_by_its_definition():
    torch.manual_seed(0)
    first, second = torch.randn(4, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64) + 1
    rows = torch.cat([first, second]).tolist()
    gaps = [[sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for q in rows] for p in rows]
    width = sum(map(sum, gaps)) / 90 / 4
    k = [[sum(math.exp(-gap / (width * 2**i)) for i in range(5)) for gap in line] for line in gaps]

    def mean(a: range, b: range) -> float:
        return sum(k[i][j] for i in a for j in b) / (len(a) * len(b))

    x, y = range(4), range(4, 10)
    wanted = mean(x, x) + mean(y, y) - 2 * mean(x, y)
    assert float(virtual.kernel_distance(first, second)) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("kind", virtual.KINDS)
def test_one_view_of_all_that_gradients_pass(kind):
    torch.manual_seed(1)
    batch = torch.randn(3, 2, 8, 8, requires_grad=True)
    first, second = virtual.same_view([batch, batch[1:]], [kind])
    assert torch.equal(first[1:], second)
    first.sum().backward()
    assert float(batch.grad.abs().sum()) > 0
    views = [virtual.same_view([batch], [kind])[0].detach() for _ in range(8)]
    assert any(not torch.equal(view, views[0]) for view in views)
    assert all(view.shape == batch.shape for view in views)


def test_noise_has_the_statistics_of_its_class():
    torch.manual_seed(0)
    means, deviations = torch.tensor([[1.0, -1.0], [5.0, 0.0]]), torch.tensor([[0.1, 2.0], [1.0, 0.0]])
    found = noise(torch.tensor([0, 1]).repeat_interleave(400), means, deviations, torch.Size([2, 3, 3]))
    for c in (0, 1):
        own = found[400 * c : 400 * (c + 1)]
        assert torch.allclose(own.mean(dim=(0, 2, 3)), means[c], atol=0.1)
        assert torch.allclose(own.std(dim=(0, 2, 3)), deviations[c], atol=0.1)


def test_statistics_are_those_of_a_clients_own_pixels():
    server = server_of(images())
    x, y = server.virtual_work.own(1)
    found = server.virtual_work.statistics(1)
    for c in (0, 1):
        assert float(found["means"][c, 0]) == pytest.approx(float(x[y == c].mean()), abs=1e-5)
        assert float(found["deviations"][c, 0]) == pytest.approx(float(x[y == c].std(correction=0)), abs=1e-4)


def test_some_of_each_class():
    labels = torch.tensor([2, 0, 0, 0, 2, 5])
    for _ in range(5):
        assert labels[some_of_each(labels, 2)].bincount(minlength=6).tolist() == [2, 0, 2, 0, 0, 1]


@pytest.mark.parametrize("pull", ["contrastive", "mmd", "l2"])
def test_the_pull_is_added_to_the_loss(pull):
    server = server_of(images(), pull=pull, weight=3.0)
    torch.manual_seed(2)
    batch = Batch(torch.randn(6, 1, 4, 4), torch.arange(6) % 2)
    anchors = Batch(torch.randn(4, 1, 4, 4), server.virtual_work.anchor_labels)
    model = net(4)
    anchored = Anchored(model, Terms.of(CrossEntropy()), None, anchors=anchors, scheme=server.virtual).setup(batch)
    losses = anchored(batch)
    e, a = model[:3](batch.inputs), model[:3](anchors.inputs)
    if pull == "contrastive":
        rows, groups = F.normalize(torch.cat([e, a])), torch.cat([batch.labels, anchors.labels])
        terms = []
        for i in range(10):
            others = [j for j in range(10) if j != i]
            whole = torch.logsumexp(torch.stack([rows[i] @ rows[j] / 0.07 for j in others]), 0)
            mates = [j for j in others if groups[j] == groups[i]]
            terms.append(-sum(rows[i] @ rows[j] / 0.07 - whole for j in mates) / len(mates))
        wanted = sum(terms) / 10
    elif pull == "mmd":
        wanted = virtual.kernel_distance(e, a)
    else:
        y, z = batch.labels, anchors.labels
        wanted = sum((e[y == c].mean(0) - a[z == c].mean(0)).square().sum() for c in (0, 1))
    task = F.cross_entropy(model(batch.inputs), batch.labels)
    assert losses.total.item() == pytest.approx((task + 3 * wanted).item(), rel=1e-4)


def test_the_servers_images_are_moved_towards_the_averaged_step():
    given = images()
    server = server_of(given, server_steps=30, lr_images=0.5)
    place = Round.of(0, 1, 0, given.config)
    x, y = shapes()
    slopes = torch.autograd.grad(F.cross_entropy(given.student(x), y), list(given.student.parameters()))
    state = {n: p.detach() - 0.1 * g for (n, p), g in zip(given.student.named_parameters(), slopes, strict=True)}
    torch.manual_seed(0)
    server.images.copy_(torch.randn_like(server.images))

    def apart() -> float:
        loss = F.cross_entropy(given.student(server.images), server.virtual_work.anchor_labels)
        return float(virtual.gradient_loss(slopes, torch.autograd.grad(loss, list(given.student.parameters()))))

    before, weights = apart(), copy.deepcopy(given.student.state_dict())
    server.images.copy_(server.matched(state, place))
    assert apart() < 0.7 * before
    assert all(torch.equal(weights[n], p) for n, p in given.student.state_dict().items())


def test_which_images_are_made_and_which_cross_in_which_round(monkeypatch):
    steps, pulled = [], []
    distilled, train = distilling.VirtualWork.distilled, distilling.VirtualWork.train

    def counted(self, number, given, labels, nets, count, place):
        steps.append((place.number, number, count))
        return distilled(self, number, given, labels, nets, count, place)

    def watched(self, number, given, labels, anchors, pull, place):
        pulled.append((place.number, anchors is not None, pull))
        return train(self, number, given, labels, anchors, pull, place)

    monkeypatch.setattr(distilling.VirtualWork, "distilled", counted)
    monkeypatch.setattr(distilling.VirtualWork, "train", watched)
    with overheard() as heard:
        perform(build("fedlgd", **FEW, every=2, times=1), images(epochs=6), quiet=True)
    assert steps == [(0, 0, 2), (0, 1, 2), (2, 0, 2), (2, 1, 2)]
    assert pulled[::2] == [(0, False, False), (1, True, True), (2, True, False), *((r, True, True) for r in (3, 4, 5))]
    kinds = [{name.partition("/")[0] for name in unpack(payload)} for payload in heard]
    told = [kinds[4 * r : 4 * r + 2] for r in range(6)]
    said = [kinds[4 * r + 2 : 4 * r + 4] for r in range(6)]
    with_images = [{"weights", "images"}] * 2
    assert told == [[{"weights"}] * 2, with_images, [{"weights"}] * 2, with_images, *[[{"weights"}] * 2] * 2]
    assert said == [[{"weights", "means", "deviations", "present"}] * 2, *[[{"weights"}] * 2] * 5]


def test_without_pull_or_renewal_it_is_fedavg_on_distilled_images(monkeypatch):
    """Equal weights, since clients have as many images each; the server's are left out of what they learn from."""
    given = images(epochs=2)
    kept = {}
    train = distilling.VirtualWork.train

    def alone(self, number, made, labels, anchors, pull, place):
        kept[number] = made, labels
        train(self, number, made, labels, None, pull, place)

    monkeypatch.setattr(distilling.VirtualWork, "train", alone)
    perform(build("fedlgd", **{**FEW, "images": 4}, weight=0.0, times=0), given, quiet=True)
    wanted = {name: value.clone() for name, value in net().state_dict().items()}
    for number in range(2):
        states = []
        for client in range(2):
            model = net()
            model.load_state_dict(wanted)
            x, y = kept[client]
            place = Round.of(number, 2, 0, given.config)
            optimizer = torch.optim.SGD(
                [
                    {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 5e-4},
                    {"params": [p for p in model.parameters() if p.ndim == 1]},
                ],
                lr=place.config.lr,
                momentum=0.9,
            )
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            states.append(model.state_dict())
        wanted = {n: (states[0][n] + states[1][n]) / 2 for n in wanted}
    for name, value in given.student.state_dict().items():
        assert torch.allclose(value, wanted[name], atol=1e-6)


@pytest.mark.slow
def test_it_learns_from_what_no_real_image_is_in(tmp_path):
    given = images(epochs=6, lr=0.2)
    options = {**FEW, "images": 4, "warm_up": 40, "server_steps": 10, "augment": []}
    fitted = perform(build("fedlgd", **options), given, out=tmp_path / "run", quiet=True)
    assert fitted.validation["accuracy"] > 0.8


def test_a_client_has_images_of_its_own_classes_alone():
    server = server_of(images(60), alpha=0.05, count=3, least=5)
    work = server.virtual_work
    for number, loader in enumerate(work.owners.loaders):
        assert set(work.labels(number).tolist()) == set(loader.labels[loader.only].tolist())
    assert min(len(work.labels(number)) for number in range(3)) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"augment": ["jitter"]}, "scheme.augment"),
        ({"images": 0}, "scheme.images"),
        ({"pull": "push"}, "scheme.pull"),
        ({"temperature": 0.0}, "scheme.temperature"),
    ],
)
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        server_of(images(), **options)


def test_vectors_and_parts_of_batches_are_refused():
    with pytest.raises(DataError, match="virtual images are made of images"):
        perform(build("fedlgd", **FEW), scene(), quiet=True)
    with pytest.raises(ConfigError, match=r"train\.accumulate"):
        server_of(images(accumulate=2))
